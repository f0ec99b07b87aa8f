"""MCL-OKD: the loss and its gradients against plain float64, and a bank that is the same everywhere."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from functools import partial
from itertools import pairwise

import pytest
import torch
from method_truths import CLASSES, assert_learns, batch, ce, kl, make_cohort
from steps import Reads, bits, same_bits
from training_runs import start as start_python

from fflfast.cohort import Learner, StepState
from fflfast.data import Batch
from fflfast.methods import resolve
from fflfast.methods.mcl_okd import MCL, MCLOptions
from fflfast.methods.memory import EmbeddingBank
from fflfast.ops.counters import hash_words
from fflfast.training.guard import StepGuard

DOUBLE = torch.float64
TARGETS = torch.tensor([0, 1, 1, 2, 4, 4, 4, 0, 1, 2, 2, 2, 4, 0, 1, 1])  # no image of class 3


def learner(cohort, *, attach=True, **options):
    torch.manual_seed(1)
    method = MCL(cohort, CLASSES, MCLOptions(**{"negatives": 5, "embedding_size": 6, **options}))
    own = Learner(cohort, method).to(next(cohort.parameters()).dtype)
    if attach:
        method.attach(TARGETS)
    return own


def known(rows=6, seed=0, **options):
    """A batch of images of the training set that `TARGETS` describes."""
    index = torch.randperm(len(TARGETS), generator=torch.Generator().manual_seed(seed))[:rows]
    return Batch(batch(rows, seed=seed, **options).images, TARGETS[index], index)


def parts_of_others(image, count):
    """The images of other classes than this one's, by class, cut into parts."""
    order = sorted(range(len(TARGETS)), key=lambda i: (TARGETS[i].item(), i))
    others = [i for i in order if TARGETS[i] != TARGETS[image]]
    edges = [len(others) * k // count for k in range(count + 1)]
    return [others[start:stop] for start, stop in pairwise(edges)]


def drawn(seed, draws, image, count):
    """The negatives of an image, in Python's integers."""
    parts = parts_of_others(image, count)
    return [part[hash_words(seed, draws, image, k) * len(part) >> 32] for k, part in enumerate(parts)]


def embedded(truth, output):
    vectors = []
    for layer, feature_map in zip(truth.method.embeddings, output.features, strict=True):
        v = feature_map.mean((2, 3)) @ layer.weight.T + layer.bias
        vectors.append(v / v.square().sum(1, keepdim=True).sqrt())
    return vectors


def bank_contrast(truth, output, given, *, tau=0.1, count=5):
    """Σ NCE(a, b) as the source computes it: P = e/Z, h = P/(P + K/n), Z = n · mean e, a pair at a time."""
    memory, n = truth.method.memory, len(TARGETS)
    vectors, total = embedded(truth, output), 0.0
    chosen = [
        [i, *drawn(memory.seed.item(), memory.draws.item(), i, count)] for i in given.index.tolist()
    ]  # fmt: skip
    for a in range(len(vectors)):
        for b in range(len(vectors)):
            if a != b:
                e = (torch.einsum("ijd,id->ij", memory.bank[torch.tensor(chosen), a], vectors[b]) / tau).exp()
                p = e / (n * e.detach().mean())
                h = p / (p + count / n)
                total = total - (h[:, 0].log() + (1 - h[:, 1:]).log().sum(1)).mean()
    return total


def batch_contrast(truth, output, given, *, tau=0.1):
    vectors, total, rows = embedded(truth, output), 0.0, len(given.target)
    for a in range(len(vectors)):
        for b in range(len(vectors)):
            for i in range(rows if a != b else 0):
                others = [j for j in range(rows) if j == i or given.target[j] != given.target[i]]
                e = {j: (vectors[a][j] @ vectors[b][i] / tau).exp() for j in others}
                total = total - (e[i] / sum(e.values())).log() / rows
    return total


def formula(contrast, given, *, weight=0.025, temperature=3.0, kl_weight=1.0, ce_weight=1.0):
    def terms(truth, output):
        z = output.logits
        return [
            *((ce_weight, ce(x, given.target)) for x in z),
            (kl_weight, kl(torch.stack(z).mean(0).detach(), z[-1], temperature)),
            (weight, contrast(truth, output, given)),
        ]

    return terms


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_loss_with_a_bank_is_its_formula(n):
    given = known(dtype=DOUBLE)
    own = learner(make_cohort(n, dtype=DOUBLE), contrast_temperature=0.2)
    own(given)  # a bank that has seen images
    assert_learns(own, given, formula(partial(bank_contrast, tau=0.2), given))


def test_the_loss_within_a_batch_is_its_formula():
    given = known(dtype=DOUBLE)
    own = learner(make_cohort(3, dtype=DOUBLE), form="batch", contrast_weight=0.3)
    state = StepState(kl_weight=0.5, ce_weight=0.75, temperature=2.0)
    truth = formula(batch_contrast, given, weight=0.3, temperature=2.0, kl_weight=0.5, ce_weight=0.75)
    assert_learns(own, given, truth, state)
    assert not list(own.method.buffers())


def test_unlike_networks_on_a_bank():
    given = known(dtype=DOUBLE)
    assert_learns(learner(make_cohort(arch=["tiny", "resnet8"], dtype=DOUBLE)), given, formula(bank_contrast, given))


def bank_of(targets, networks=2, dim=4):
    torch.manual_seed(2)
    bank = EmbeddingBank(networks, dim, 0.5)
    bank.attach(targets)
    return bank, torch.arange(len(targets))


def test_negatives_are_those_of_integer_arithmetic():
    bank, index = bank_of(TARGETS)
    for draws in range(3):
        wanted = [drawn(bank.seed.item(), draws, image, 5) for image in index.tolist()]
        assert bank.draw(index, 5).tolist() == wanted
    assert bank.eval().draw(index, 5).tolist() == bank.draw(index, 5).tolist()  # an evaluation counts no draw
    assert bank.draws == 3


def test_negatives_are_of_other_classes_differ_and_reach_all():
    bank, index = bank_of(TARGETS)
    seen = torch.zeros(len(TARGETS), len(TARGETS))
    for _ in range(400):
        chosen = bank.draw(index, 5)
        assert (TARGETS[chosen] != TARGETS[:, None]).all()
        assert (chosen.sort().values.diff() > 0).all()
        seen.scatter_add_(1, chosen, torch.ones(chosen.shape))
    even = torch.zeros_like(seen)
    for image in index.tolist():
        for part in parts_of_others(image, 5):
            even[image, part] = 1 / len(part)
    assert (seen / 400 - even).abs().max() < 0.1  # four standard deviations
    for row, other in zip(bank.draw(index, 64), even > 0, strict=True):  # more than there are
        assert row.unique().tolist() == index[other].tolist()


def test_negatives_of_a_large_set_in_int64():
    """Places beyond 2³¹/K do not overflow: ImageNet's size and the source's largest K."""
    n, count = 1_300_000, 16_384
    bank, _ = bank_of(torch.arange(n) // 1300, 1, 1)
    chosen = bank.draw(torch.tensor([0, n - 1]), count)
    assert chosen.min() >= 0
    assert chosen.max() < n
    assert (chosen[0] >= 1300).all()
    assert (chosen[1] < n - 1300).all()
    assert (chosen.diff() > 0).all()
    assert chosen[0, -1] > n - 100
    assert chosen[1, 0] < 100


def test_a_step_moves_the_rows_of_its_images_alone():
    own, given = learner(make_cohort(2, dtype=DOUBLE), momentum=0.3), known(dtype=DOUBLE)
    before = own.method.memory.bank.clone()
    assert 0.5 < before.square().sum(2).mean() < 1.5
    vectors = torch.stack(embedded(own, own.cohort(given.images)), 1).detach()
    own(given)
    after = own.method.memory.bank
    moved = 0.3 * before[given.index] + 0.7 * vectors
    torch.testing.assert_close(after[given.index], moved / moved.square().sum(2, keepdim=True).sqrt())
    rest = torch.ones(len(TARGETS), dtype=torch.bool)
    rest[given.index] = False
    assert torch.equal(after[rest], before[rest])
    assert own.method.memory.draws == 1
    kept = bits(own.buffers())
    own.eval()(given)
    assert same_bits(bits(own.buffers()), kept)


def test_a_state_dict_goes_on_bit_for_bit():
    own = learner(make_cohort(2))
    own(known())
    saved = deepcopy(own.state_dict())
    assert not any("by_class" in name or "spans" in name for name in saved)
    losses = [own(known(seed=k)).loss.item() for k in (1, 2)]
    again = learner(make_cohort(2, seed=3))
    again.load_state_dict(saved)
    assert [again(known(seed=k)).loss.item() for k in (1, 2)] == losses
    assert same_bits(bits(own.state_dict().values()), bits(again.state_dict().values()))


def test_a_bank_loads_without_the_training_set():
    own = learner(make_cohort(2))
    own(known())
    bare = learner(make_cohort(2), attach=False)
    bare.load_state_dict(own.state_dict())
    assert torch.equal(bare.method.memory.bank, own.method.memory.bank)
    with torch.no_grad():
        assert list(bare.eval().predict(known().images)) == ["sub0", "sub1", "ensemble"]
    assert bare.method.main_output == "sub1"
    bare.train()
    with pytest.raises(ValueError, match=r"no images to draw from; call attach"):
        bare(known())
    bare.method.attach(TARGETS)  # keeps what was loaded
    assert torch.equal(bare.method.memory.bank, own.method.memory.bank)
    other = learner(make_cohort(2))
    other.method.attach(TARGETS[:12])
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(own.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        learner(make_cohort(2), attach=False, embedding_size=7).load_state_dict(own.state_dict())


def test_a_step_that_is_left_out_leaves_no_trace():
    own = learner(make_cohort(2))
    guard = StepGuard(own)
    before = bits(own.buffers())
    for bad in (True, False):
        guard.begin()
        own(known())
        guard.undo(torch.tensor(bad))
        own.method.after_step(torch.tensor(bad))
        assert same_bits(bits(own.buffers()), before) == bad


def test_buffers_that_processes_keep_equal_are_named():
    own = learner(make_cohort(2))
    assert {name for name, _ in own.method.named_buffers()} == set(MCL.replicated)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_have_one_bank(tmp_path):
    process = start_python("-c", "import bank_processes; bank_processes.drive()", cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    codes = json.loads((tmp_path / "ends.json").read_text(encoding="utf-8"))["bank"]["codes"]
    assert codes == [0, 0], "".join((tmp_path / f"bank-{rank}.err").read_text(encoding="utf-8") for rank in range(2))
    alone, first, second = (torch.load(tmp_path / f"bank{rank}.pt") for rank in ("", "-0", "-1"))
    assert alone.keys() == first.keys() == second.keys()
    assert same_bits(bits(first.values()), bits(second.values()))
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12)


def test_an_empty_share_gives_zeros_with_a_graph():
    for form in ("bank", "batch"):
        own = learner(make_cohort(2), form=form).eval()
        out = own(known(0))
        assert out.loss == 0
        assert not out.terms.any()
        out.loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in own.parameters())


def test_under_autocast_contrast_is_in_float32():
    for form in ("bank", "batch"):
        own, given = learner(make_cohort(2), form=form), known()
        with torch.autocast("cpu", torch.bfloat16):
            output = own.cohort(given.images)
        assert output.features[0].dtype == torch.bfloat16
        plain = deepcopy(own.method).extra_terms(output, given, None)
        with torch.autocast("cpu", torch.bfloat16):
            cast = own.method.extra_terms(output, given, None)
        assert cast[0][1].dtype == torch.float32
        assert torch.equal(cast[0][1], plain[0][1])


def test_a_low_temperature_overflows_nothing():
    for form in ("bank", "batch"):
        own = learner(make_cohort(2), form=form, contrast_temperature=0.002)
        double = deepcopy(own).double()
        single, truth = (
            each.method.extra_terms(each.cohort(given.images), given, None)[0][1]
            for each, given in ((own, known()), (double, known(dtype=DOUBLE)))
        )
        torch.testing.assert_close(single.double(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", ["bank", "batch"])
def test_a_step_asks_the_device_nothing(form):
    own, given = learner(make_cohort(2), form=form), known()
    places = [buffer.data_ptr() for buffer in own.buffers()]
    with Reads() as reads:
        own(given).loss.backward()
    assert reads.count == 0
    assert [buffer.data_ptr() for buffer in own.buffers()] == places


def test_what_cannot_be_contrasted_is_refused():
    own, given = learner(make_cohort(2)), known()
    with pytest.raises(ValueError, match="one class an image"):
        own(given._replace(target=torch.full((6, CLASSES), 0.2)))
    for index, said in ((None, "got none"), (given.index.int(), r"got torch.int32 \(6,\)"), (given.index[:5], "5,")):
        with pytest.raises(ValueError, match=rf"MCL: the bank needs batch\.index.*{said}"):
            own(given._replace(index=index))
    learner(make_cohort(2), form="batch")(given._replace(index=None))
    bank = EmbeddingBank(2, 4, 0.5)
    with pytest.raises(ValueError, match="at least two classes, got 1"):
        bank.attach(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 \(n,\), one class an image, got torch.float32 \(4, 2\)"):
        bank.attach(torch.zeros(4, 2))
    for setting in ("mixup", "cutmix"):
        assert "mixed images have two" in MCL.refusal({"mixup": 0.0, "cutmix": 0.0, setting: 0.2})
    assert MCL.refusal({"mixup": 0.0, "cutmix": 0.0}) is None


@pytest.mark.parametrize(
    "options",
    [{"form": "memory"}, {"embedding_size": 0}, {"negatives": 1.5}, {"contrast_temperature": 0.0},
     {"momentum": 1.0}, {"contrast_weight": -0.1}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"MCLOptions: {next(iter(options))}"):
        MCLOptions(**options)


def test_recipe_and_name():
    assert resolve("mcl_okd") is MCL
    assert MCL.shared_stages == 1
    assert MCL.recipe["schedule"] == "cosine"
    assert (MCL.recipe["lr"], MCL.recipe["batch_size"], MCL.recipe["weight_decay"]) == (0.05, 64, 5e-4)
    assert (MCLOptions().negatives, MCLOptions().contrast_weight, MCLOptions().ramp_up_epochs) == (256, 0.025, 0)


def test_more_negatives_than_images_are_told():
    with pytest.warns(UserWarning, match=f"{10 * len(TARGETS)} negatives for each image, but some have only"):
        learner(make_cohort(2), negatives=10 * len(TARGETS))
