"""docs/drop-in.md holds: each of its blocks gives the loss and gradients of the lines that it replaces."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fflfast

# PyTorch warns of its own `reduction="mean"`.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "drop-in.md"
MARK = "# fflfast\n"
SETUP, *BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
TOLERANCE = {torch.float64: {"rtol": 1e-11, "atol": 1e-14}, torch.float32: {"rtol": 1e-4, "atol": 1e-6}}
# What learns on the page; teachers do not, unless a block's own lines train them.
LEARN = ("student", "trained", "maps", "lm_student")


def names(dtype: torch.dtype) -> dict:
    """The tensors and numbers that the page speaks of."""
    generator = torch.Generator("cpu").manual_seed(3)
    device = torch.get_default_device()

    def draw(*shape):
        logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return logits.to(device, dtype)

    def classes(*shape, num_classes):
        return torch.randint(num_classes, shape, generator=generator, device="cpu").to(device)

    target, labels, pixels = (
        classes(6, num_classes=11), classes(3, 7, num_classes=13), classes(2, 4, 5, num_classes=9)
    )  # fmt: skip
    labels[0, :4] = labels[2, 5] = -100
    pixels[:, 1] = 255
    space = {
        "student": draw(6, 11), "teacher": draw(6, 11), "trained": draw(6, 11), "target": target,
        "target_with_ignored": target.masked_fill(torch.arange(6, device=device) == 2, -100),
        "soft_target": draw(6, 11).softmax(1), "maps": draw(2, 9, 4, 5), "teacher_maps": draw(2, 9, 4, 5),
        "pixels": pixels, "lm_student": draw(3, 7, 13), "lm_teacher": draw(3, 7, 13), "lm_padded": draw(3, 7, 16),
        "labels": labels, "T": 2.5, "alpha": 0.3, "beta": 1.7,
    }  # fmt: skip
    space["teacher_p"] = F.softmax(draw(6, 11).masked_fill(draw(6, 11) > 4, -torch.inf), 1)
    for name in LEARN:
        space[name].requires_grad_()
    exec(SETUP, space)
    return space


def loss_and_gradients(code: str, dtype: torch.dtype):
    """What a half block leaves under the name `loss`, and its gradients; reduction none is weighted row by row."""
    space = names(dtype)
    exec(code, space)
    loss = space["loss"]
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    (loss * weights).sum().backward()
    return loss.detach(), {name: space[name].grad for name in LEARN if space[name].grad is not None}


def test_the_page_has_its_sections():
    text = PAGE.read_text(encoding="utf-8")
    assert SETUP.count(MARK) == 0
    assert all(block.count(MARK) == 1 for block in BLOCKS)
    assert len(BLOCKS) == text.count(MARK) >= 20
    for words in ("KLDivWithLogitsLoss", "torchdistill", "β = 0 and β = 1", "Other β are not a graph"):
        assert words in text


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition(MARK)[2].strip()[:60])
def test_both_halves_agree(block, dtype):
    theirs, ours = block.split(MARK)
    assert "fflfast" not in theirs
    loss, gradients = loss_and_gradients(ours, dtype)
    expected_loss, expected = loss_and_gradients(theirs, dtype)
    assert expected
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close((loss, gradients), (expected_loss, expected), **TOLERANCE[dtype])


def test_a_wrong_block_would_be_seen():
    theirs, ours = next(block.split(MARK) for block in BLOCKS if "alpha=1 - alpha" in block)
    loss, _ = loss_and_gradients(ours.replace("1 - alpha", "alpha"), torch.float64)
    assert not torch.allclose(loss, loss_and_gradients(theirs, torch.float64)[0])


# ---- the originals, written out from their definitions, apart from the page -------------------------------------


def torchdistill_kd(student, teacher, target, tau, alpha, beta=None, reduction="batchmean"):
    """α·CE + β·τ²·KL, β = 1−α by default; the bare KL where α is None or 0, or nothing is known of the target."""
    p_t, log_s = torch.softmax(teacher / tau, 1), torch.log_softmax(student / tau, 1)
    elements = p_t * (p_t.log() - log_s)
    kl = {"batchmean": elements.sum() / len(student), "mean": elements.mean(), "sum": elements.sum()}[reduction]
    if not alpha or target is None:
        return kl
    log_p = torch.log_softmax(student, 1)
    rows = -log_p[torch.arange(len(student), device=student.device), target]
    ce = rows.sum() if reduction == "sum" else rows.mean()
    return alpha * ce + (1 - alpha if beta is None else beta) * tau**2 * kl


def trl_jsd(student, teacher, beta, temperature, labels):
    """KL(teacher ‖ student) for β = 0, KL(student ‖ teacher) for β = 1, a mean over unmasked tokens, without T²."""
    log_s, log_t = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    p, log_p, log_q = (log_t.exp(), log_t, log_s) if beta == 0 else (log_s.exp(), log_s, log_t)
    tokens = (p * (log_p - log_q)).sum(-1)
    mask = (labels != -100).to(tokens.dtype)
    return (tokens * mask).sum() / mask.sum()


def check(ours, theirs, dtype, *leaves):
    """Equal losses, and equal gradients of the leaves."""
    results = []
    for function in (ours, theirs):
        z = [t.detach().clone().requires_grad_() for t in leaves]
        loss = function(*z)
        results.append((loss.detach(), torch.autograd.grad(loss, z)))
    torch.testing.assert_close(*results, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("alpha", "reduction"), [(0.3, "batchmean"), (0.9, "batchmean"), (0.4, "sum"), (1.0, "sum")])
def test_torchdistill(alpha, reduction, dtype):
    n = names(dtype)
    check(
        lambda s: fflfast.kd_loss(s, n["teacher"], n["target"], temperature=4.0, alpha=1 - alpha, reduction=reduction),
        lambda s: torchdistill_kd(s, n["teacher"], n["target"], 4.0, alpha, reduction=reduction),
        dtype,
        n["student"],
    )


@pytest.mark.parametrize("alpha", [None, 0])
def test_torchdistill_without_alpha_is_the_bare_divergence(alpha):
    n = names(torch.float64)
    check(
        lambda s: fflfast.kl_div_with_logits(s, n["teacher"], temperature=4.0) / 16,
        lambda s: torchdistill_kd(s, n["teacher"], n["target"], 4.0, alpha),
        torch.float64,
        n["student"],
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.9, 3.0])
@pytest.mark.parametrize("beta", [0, 1])
def test_trl(beta, temperature, dtype):
    n = names(dtype)
    edge = (1, 0, 1.0) if beta == 0 else (0, 1, 1.0, False)
    graph = fflfast.DistillGraph(2, (0, 0), edges=(edge,))
    settings = {"temperature": temperature, "kl_weight": 1 / temperature**2}
    check(
        lambda s: fflfast.distill_loss([s, n["lm_teacher"]], n["labels"], graph, **settings).loss,
        lambda s: trl_jsd(s, n["lm_teacher"], beta, temperature, n["labels"]),
        dtype,
        n["lm_student"],
    )


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_kl_module_is_kl_div(reduction, detach):
    n = names(torch.float64)
    module = fflfast.nn.KLDivWithLogitsLoss(temperature=2.0, reduction=reduction, detach_teacher=detach)

    def theirs(s, t):
        p = F.softmax((t.detach() if detach else t) / 2, 1)
        loss = F.kl_div(F.log_softmax(s / 2, 1), p, reduction=reduction) * 4
        return loss.sum() + 0 * t.sum()

    check(lambda s, t: module(s, t).sum() + 0 * t.sum(), theirs, torch.float64, n["student"], n["trained"])


def test_kd_module():
    n = names(torch.float64)
    module = fflfast.nn.KDLoss(
        temperature=2.0, alpha=0.9, label_smoothing=0.1, ignore_index=n["target"][0].item(), reduction="sum"
    )
    assert "temperature=2.0, alpha=0.9, reduction='sum'" in repr(module)
    settings = {"label_smoothing": 0.1, "ignore_index": module.ignore_index, "reduction": "sum"}
    case = n["student"], n["teacher"], n["target"]
    assert module(*case) == fflfast.kd_loss(*case, temperature=2.0, alpha=0.9, **settings)
    other = module(*case, temperature=torch.tensor(3.0), alpha=0.5)
    assert other == fflfast.kd_loss(*case, temperature=3.0, alpha=0.5, **settings)


def test_classes_masked_on_both_sides_add_nothing():
    n = names(torch.float64)
    mask = torch.zeros_like(n["student"], dtype=torch.bool)
    mask[:, 8:] = True
    student, teacher = (n[name].masked_fill(mask, -torch.inf) for name in ("student", "teacher"))
    loss = fflfast.kl_div_with_logits(student, teacher)
    torch.testing.assert_close(loss, fflfast.kl_div_with_logits(n["student"][:, :8], n["teacher"][:, :8]))
