"""Several optimizers in one step: a method's own beside the run's, and Adam in place of SGD."""

from __future__ import annotations

import pytest
import torch
from steps import CPU, Reads, batches, bits, gradients, make, same_bits
from torch import nn

import fflfast
from fflfast import execution
from fflfast.methods import DML
from fflfast.training.optimizer import build_optimizers, optimizer_tensors, restore_optimizers

OWN = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 0.1}


class Judged(DML):
    """DML beside which a judge of the logits learns by an optimizer of its own, from half a norm with a bias."""

    extra_term_names = ("judge",)
    own = OWN
    poison = False

    def __init__(self, cohort, num_classes, options=None):
        super().__init__(cohort, num_classes, options)
        self.judge = nn.Linear(num_classes, 3)
        self.slow = nn.Linear(3, 1)
        self.seen = nn.Buffer(torch.zeros(()))

    def parameter_options(self):
        return {"judge": self.own, "slow": {"lr": 1e-3}}

    def extra_terms(self, output, batch, state):
        self.seen += 1
        judged = self.judge(output.logits[0].detach())
        if self.poison:
            judged.register_hook(lambda gradient: gradient * torch.nan)
        return [(0.5, (self.slow(judged) - 1).square().mean())]

    def after_step(self, bad=None):
        if bad is None:
            self.seen.mul_(2)
        else:
            self.seen.copy_(torch.where(bad, self.seen, self.seen * 2))


JUDGED = {"method": f"{__name__}:Judged"}


@pytest.fixture(autouse=True)
def _no_interpreter():
    """Steps in fp16 would run in Triton's interpreter here, at seconds a step."""
    with fflfast.use_backend("reference"):
        yield


def _state(step):
    return optimizer_tensors(step.optimizers, step.learner)


def _everything(step):
    averages = step.averages.state() if step.averages else ()
    return bits([*step.learner.state_dict().values(), *_state(step).values(), *averages])


def test_each_parameter_learns_as_its_optimizer_written_out():
    step, twin = (make(**JUDGED) for _ in range(2))
    named = dict(twin.learner.named_parameters())
    judge = [p for name, p in named.items() if name.startswith("method.judge.")]
    slow = [p for name, p in named.items() if name.startswith("method.slow.")]
    rest = [p for name, p in named.items() if not name.startswith("method.")]
    groups = [{"params": rest}, {"params": slow, "lr": 1e-3}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=False)
    adam = torch.optim.Adam(judge, lr=2e-3, weight_decay=0.1, foreach=False)
    for k, batch in enumerate(batches(step, 4)):
        factor = 0.5**k
        step.set_schedule(learning_rate=0.1 * factor, kl_weight=0.5)
        step(batch, epoch=0, step=k)
        for group, peak in zip([*sgd.param_groups, *adam.param_groups], (0.1, 1e-3, 2e-3), strict=True):
            group["lr"] = peak * factor
        ready = twin.task.training_batch(
            batch, twin.table, epoch=torch.tensor(0), step=torch.tensor(k), views=1, channels_last=True
        )
        twin.learner(ready, twin.state).loss.backward()
        for optimizer in (sgd, adam):
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in step.learner.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-6, msg=name)
    assert [type(o).__name__ for o in step.optimizers] == ["SGD", "Adam"]
    assert all(int(value) == 4 for name, value in _state(step).items() if name.endswith("/step"))


def test_one_scalar_a_peak_rate_and_a_fill_only_where_it_changes():
    step = make(**JUDGED)
    rates = [group["lr"] for optimizer in step.optimizers for group in optimizer.param_groups]
    assert rates[0] is step.state.learning_rate
    assert [round(rate.item(), 7) for rate in rates] == [0.05, 5e-4, 1e-3]
    before = [rate.data_ptr() for rate in rates]
    step.set_schedule(learning_rate=0.01, kl_weight=0.5)
    assert [round(rate.item(), 7) for rate in rates] == [0.01, 1e-4, 2e-4]
    assert [g["lr"].data_ptr() for o in step.optimizers for g in o.param_groups] == before


def test_every_parameter_that_learns_belongs_to_one_optimizer():
    def freeze(learner):
        learner.method.slow.bias.requires_grad_(False)

    step = make(**JUDGED, prepare=freeze)
    owned = [id(p) for o in step.optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in step.learner.parameters() if p.requires_grad)
    frozen = step.learner.get_parameter("method.slow.bias")
    assert id(frozen) not in owned
    before = bits([frozen])
    step(batches(step, 1)[0], epoch=0, step=0)
    assert same_bits(bits([frozen]), before)
    assert len({name.rpartition("/")[0] for name in _state(step)}) == len(owned)


@pytest.mark.parametrize("changes", [JUDGED, {"optimizer": "adam", "lr": 1e-3}], ids=["two", "adam"])
@pytest.mark.parametrize(
    "options", [{}, {"amp": "fp16", "nan": "skip", "ema": 0.9}, {"accumulate": 3, "clip_norm": 0.5}]
)
def test_plans_and_a_way_back(changes, options):
    """Every plan gives the bits of serial, and what was put back goes on alike."""
    results = []
    for plan in ("serial", "graph"):
        torch.manual_seed(0)
        step = make(**changes, **options)
        step.use(execution.create(plan, step.learner, CPU))
        for k, batch in enumerate(batches(step, 4)):
            step(batch, epoch=0, step=k)
        results.append(_everything(step))
    assert same_bits(*results)
    before, held = execution.Snapshot(step.changing, CPU), _everything(step)
    again = []
    for _ in range(2):
        step(batches(step, 1)[0], epoch=1, step=0)
        again.append(_everything(step))
        before.restore()
        assert same_bits(_everything(step), held)
    assert same_bits(*again)
    assert not same_bits(again[0], held)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("changes", [JUDGED, {"optimizer": "adam", "lr": 1e-3}], ids=["two", "adam"])
def test_state_is_there_from_the_start_and_restored_in_place(changes, channels_last):
    step, fresh = (make(**changes, channels_last=channels_last) for _ in range(2))
    for optimizer in fresh.optimizers:
        optimizer.state.clear()  # as an optimizer of torch begins
    some = batches(step, 3)
    own, places = _state(step), [value.data_ptr() for value in _state(step).values()]
    for name, parameter in step.learner.named_parameters():
        of_it = {key.rpartition("/")[2]: value for key, value in own.items() if key.rpartition("/")[0] == name}
        assert {"exp_avg", "exp_avg_sq", "step"} == of_it.keys() or of_it.keys() == {"momentum_buffer"}
        assert all(value.stride() == parameter.stride() for value in of_it.values() if value.dim())
    for k, batch in enumerate(some[:2]):
        step(batch, epoch=0, step=k)
        fresh(batch, epoch=0, step=k)
    assert same_bits(_everything(step), _everything(fresh))
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in own.items()}
    held = bits(own.values())
    step(some[2], epoch=0, step=2)
    restore_optimizers(step.optimizers, step.learner, saved)
    assert same_bits(bits(_state(step).values()), held)
    assert [value.data_ptr() for value in _state(step).values()] == places
    restore_optimizers(step.optimizers, step.learner, {})
    assert not any(value.any() for value in own.values())


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_skipped_step_leaves_every_optimizer_alone(clip_norm):
    """Only the judge's gradients are bad; no optimizer steps, and the method hears of it."""
    step = make(**JUDGED, nan="skip", ema=0.9, clip_norm=clip_norm)
    some = batches(step, 3)
    step(some[0], epoch=0, step=0)
    assert step.learner.method.seen == 2
    before = _everything(step)
    step.learner.method.poison = True
    with Reads() as bad:
        step(some[1], epoch=0, step=1)
    assert same_bits(_everything(step), before)
    assert not any(hasattr(optimizer, "found_inf") for optimizer in step.optimizers)
    step.learner.method.poison = False
    with Reads() as good:
        step(some[2], epoch=0, step=2)
    assert not same_bits(_everything(step), before)
    assert step.learner.method.seen == 6
    assert good.count == bad.count
    assert {int(value) for name, value in _state(step).items() if name.endswith("/step")} == {2}


def test_an_overflow_of_one_optimizer_halves_the_one_scale():
    step = make(**JUDGED, amp="fp16")
    some = batches(step, 2)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 16.0})
    step(some[0], epoch=0, step=0)
    before = _everything(step)
    step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 1e38})
    step(some[1], epoch=0, step=1)
    names = [*step.learner.state_dict(), *_state(step)]
    pairs = zip(names, before, _everything(step), strict=True)
    changed = [name for name, was, now in pairs if not torch.equal(was, now)]
    assert changed
    assert all("running" in name or "tracked" in name or name == "method.seen" for name in changed)
    assert step.scaler.get_scale() == pytest.approx(5e37)


def test_clipping_is_of_all_gradients_together():
    free, tight = make(**JUDGED), make(**JUDGED, clip_norm=0.25)
    seen = [gradients(step) for step in (free, tight)]
    (batch,) = batches(free, 1)
    for step in (free, tight):
        step(batch, epoch=0, step=0)
    norm = torch.stack([g.norm() for g in seen[0].values()]).norm()
    assert norm > 0.25
    assert any(name.startswith("method.judge") for name in seen[0])
    for name, gradient in seen[1].items():
        torch.testing.assert_close(gradient, seen[0][name] * (0.25 / norm), rtol=1e-4, atol=1e-8)


def test_norms_and_biases_decay_in_no_optimizer_where_the_config_says_so():
    step = make(**JUDGED, decay_norm_and_bias=False)
    decay = {id(p): g["weight_decay"] for o in step.optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in step.learner.named_parameters():
        expected = 0.0 if parameter.ndim < 2 else 0.1 if name.startswith("method.judge.") else 1e-4
        assert decay[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"optimizer": "lion"}, "expected an optimizer of sgd, adam, got 'lion'"),
        ({"weigth_decay": 0.1}, "weigth_decay is no setting of the optimizer sgd"),
        ({"optimizer": "adam", "momentum": 0.1}, "momentum is no setting of the optimizer adam"),
    ],
)
def test_what_does_not_exist_is_named(monkeypatch, own, text):
    step = make(**JUDGED)
    monkeypatch.setattr(type(step.learner.method), "own", own)
    with pytest.raises(ValueError, match=text):
        build_optimizers(step.learner, step.config)


def test_what_an_own_optimizer_is_not_told_is_pytorchs(monkeypatch):
    step = make(**JUDGED)
    monkeypatch.setattr(type(step.learner.method), "own", {"optimizer": "adam"})
    _, adam = build_optimizers(step.learner, step.config)
    (group,) = adam.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0, (0.9, 0.999))
