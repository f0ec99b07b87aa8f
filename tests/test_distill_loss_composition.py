"""distill_loss inside PyTorch: autograd, compile, fake tensors, autocast, opcheck, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import GRAPHS, random_logits, run

import fflfast
from fflfast import DistillGraph, distill_loss, kd_loss, kl_div_with_logits

FFL = GRAPHS["ffl2"]
Y = torch.tensor([0, 3, -100, 2])


def leaves(dtype=torch.float32, shape=(4, 5)):
    return [z.requires_grad_() for z in random_logits(3, shape, dtype)]


# ---- autograd


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_any_grad_output_and_a_second_backward(route, backend, reduction):
    logits = leaves(torch.float64)
    loss = distill_loss(logits, Y, FFL, temperature=3.0, reduction=reduction).loss
    unit = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    kept = [g.clone() for g in unit]
    expanded = torch.tensor(2.5, dtype=torch.float64).expand(loss.shape)
    scaled = torch.autograd.grad(loss, logits, expanded, retain_graph=True)
    rows = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None] if reduction == "none" else torch.tensor(-3.0)
    other = torch.autograd.grad(loss, logits, rows.reshape(loss.shape).double())
    for u, k, s, o in zip(unit, kept, scaled, other, strict=True):
        assert torch.equal(u, k), "an earlier backward's result has changed"
        torch.testing.assert_close(s, 2.5 * u, rtol=1e-13, atol=0)
        torch.testing.assert_close(o, rows.double() * u, rtol=1e-13, atol=0)


def test_float32_grad_output_of_a_float64_loss_and_strided_rows(route, backend):
    logits = leaves(torch.float64)
    loss = distill_loss(logits, Y, FFL, reduction="none").loss
    weights = torch.rand(8, dtype=torch.float64)[::2]
    got = torch.autograd.grad(loss, logits, weights, retain_graph=True)
    expected = torch.autograd.grad((loss * weights.clone()).sum(), logits)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_inputs_are_not_modified_and_bits_repeat(route, backend):
    logits = random_logits(3, (4, 5))
    copies = [z.clone() for z in logits]
    first, second = (run(distill_loss, logits, Y, FFL, temperature=3.0) for _ in range(2))
    assert all(torch.equal(z, c) for z, c in zip(logits, copies, strict=True))
    for a, b in zip((first[0], first[1], *first[2]), (second[0], second[1], *second[2]), strict=True):
        assert torch.equal(a, b)


def test_only_those_that_ask_get_gradients(route, backend):
    logits = random_logits(3, (4, 5))
    logits[1].requires_grad_()
    distill_loss(logits, Y, FFL).loss.backward()
    assert logits[0].grad is None
    assert logits[1].grad is not None
    free = distill_loss(random_logits(3, (4, 5)), Y, FFL)
    assert not free.loss.requires_grad


def test_terms_are_detached_and_loss_is_their_weighted_sum(route, backend):
    graph = GRAPHS["cl3"]
    out = distill_loss(leaves(torch.float64), Y, graph, temperature=2.0, kl_weight=0.3, ce_weight=0.6)
    assert not out.terms.requires_grad
    assert out.terms.shape == (graph.num_terms,)
    weights = torch.tensor([0.6] * 3 + [0.3] * 3, dtype=torch.float64)
    torch.testing.assert_close(out.loss.detach(), (weights * out.terms).sum(), rtol=1e-6, atol=0)


def test_double_backward_raises_a_clear_error(route, backend):
    logits = leaves()
    loss = distill_loss(logits, Y, FFL).loss
    grads = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(grads[0].sum(), logits)


def test_change_in_place_between_forward_and_backward(route, backend):
    # Either the gradient is that of the values that the forward saw, or PyTorch says what happened.
    logits = leaves()
    expected = torch.autograd.grad(distill_loss([logits[0], logits[1], logits[2] * 2], Y, FFL).loss, logits)
    loss = distill_loss([logits[0], logits[1], scaled := logits[2] * 2], Y, FFL).loss
    scaled.add_(1)
    if route == "eager" and backend != "reference":
        for g, e in zip(torch.autograd.grad(loss, logits, retain_graph=True), expected, strict=True):
            assert torch.equal(g, e)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


# ---- compile, fake tensors, opcheck


def test_compiled_fullgraph_without_recompiling_on_values():
    def loss_of(logits, target, temperature, kl_weight):
        return distill_loss(logits, target, FFL, temperature=temperature, kl_weight=kl_weight).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)

    def check(batch, temperature, kl_weight):
        logits = leaves(shape=(batch, 5))
        target = torch.arange(batch) % 5
        got = torch.autograd.grad(loss := compiled(logits, target, temperature, kl_weight), logits)
        expected = torch.autograd.grad(same := loss_of(logits, target, temperature, kl_weight), logits)
        torch.testing.assert_close(loss, same)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)

    check(4, 3.0, 0.5)
    check(4, 2.0, 0.5)
    check(4, 2.0, 0.25)
    check(6, 2.0, 0.25)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(2, 12):
            check(4 + k, 1.0 + k / 7, k / 10)


@pytest.mark.parametrize("call", ["kl", "kd", "module", "fresh graph"])
def test_the_other_entry_points_compile(call):
    calls = {
        "kl": lambda a, b, c: kl_div_with_logits(a, b, temperature=2.0),
        "kd": lambda a, b, c: kd_loss(a, b, Y, temperature=4.0, alpha=0.5),
        "module": lambda a, b, c: fflfast.nn.DistillLoss(FFL, temperature=3.0)([a, b, c], Y).loss,
        "fresh graph": lambda a, b, c: distill_loss([a, b, c], Y, DistillGraph.ffl(2)).loss,
    }
    torch._dynamo.reset()
    logits = leaves()
    compiled = torch.compile(calls[call], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*logits), calls[call](*logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_gives_the_same_numbers(dtype):
    torch._dynamo.reset()
    logits = leaves(dtype)

    def loss_of(*z):
        return distill_loss([t * 2 for t in z], Y, FFL, temperature=3.0).loss

    loss = torch.compile(loss_of, fullgraph=True)(*logits)
    grads = torch.autograd.grad(loss, logits)
    same = loss_of(*logits)
    torch.testing.assert_close(loss, same)
    for g, e in zip(grads, torch.autograd.grad(same, logits), strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(3, 2, 7), (2, 1, 7), (2, 3, 1), (1, 4, 5)], ids=str)
def test_opcheck_of_transposed_logits_and_target(shape, reduction):
    logits = [z.transpose(0, 1).requires_grad_() for z in random_logits(3, shape)]
    target = torch.zeros(shape[:-1], dtype=torch.int64).t()
    scalars = [torch.tensor(v) for v in (3.0, 0.5, 1.0)]
    arguments = (logits, target, *scalars, FFL.key, 0.0, -100, 0.0, reduction)
    torch.library.opcheck(torch.ops.fflfast.distill_loss.default, arguments)
    compiled = torch.compile(
        lambda z: distill_loss(z, target, FFL, reduction=reduction).loss * 2, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(logits), distill_loss(logits, target, FFL, reduction=reduction).loss * 2)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["ffl2", "trainable", "okdhp2"])
def test_opcheck(backend, name, reduction):
    graph = GRAPHS[name]
    logits = [z.requires_grad_() for z in random_logits(graph.num_logits, (4, 5))]
    target = Y if graph.needs_target else None
    scalars = [torch.tensor(v) for v in (3.0, 0.5, 1.0)]
    arguments = (logits, target, *scalars, graph.key, 0.1, -100, 0.0, reduction)
    torch.library.opcheck(torch.ops.fflfast.distill_loss.default, arguments)
    loss, _, statistics = (t.detach() for t in torch.ops.fflfast.distill_loss(*arguments))
    plain = [z.detach() for z in logits]
    needs = [True] * graph.num_logits
    backward = (torch.ones_like(loss), plain, target, statistics, *arguments[2:], needs)
    torch.library.opcheck(torch.ops.fflfast.distill_loss_backward.default, backward)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fake_tensors_have_the_shapes_of_real_ones(reduction):
    with FakeTensorMode():
        logits = [torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        loss, terms = distill_loss(logits, torch.zeros(4, dtype=torch.int64), FFL, reduction=reduction)
        loss.sum().backward()
        assert loss.shape == ((4,) if reduction == "none" else ())
        assert terms.shape == (6,)
        assert loss.dtype == terms.dtype == torch.float32
        assert logits[0].grad.dtype == torch.bfloat16


def test_meta_tensors():
    logits = [torch.empty(4, 5, device="meta", requires_grad=True) for _ in range(3)]
    loss = distill_loss(logits, torch.empty(4, dtype=torch.int64, device="meta"), FFL).loss
    loss.backward()
    assert logits[0].grad.shape == (4, 5)


def test_autocast_leaves_the_loss_in_float32(route, backend):
    logits = leaves()
    plain = distill_loss(logits, Y, FFL, temperature=3.0).loss
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        under = distill_loss(logits, Y, FFL, temperature=3.0).loss
        half = distill_loss([z.bfloat16() for z in logits], Y, FFL, temperature=3.0).loss
    assert under.dtype == half.dtype == torch.float32
    assert torch.equal(plain, under)


def test_scalars_as_tensors_of_any_real_dtype_change_in_place(route, backend):
    logits = random_logits(3, (4, 5))
    temperature, kl_weight = torch.tensor(3), torch.tensor(0.5, dtype=torch.float64)
    first = distill_loss(logits, Y, FFL, temperature=temperature, kl_weight=kl_weight).loss
    assert torch.equal(first, distill_loss(logits, Y, FFL, temperature=3, kl_weight=0.5).loss)
    kl_weight.fill_(0.25)
    second = distill_loss(logits, Y, FFL, temperature=temperature, kl_weight=kl_weight).loss
    assert torch.equal(second, distill_loss(logits, Y, FFL, temperature=3.0, kl_weight=0.25).loss)


def test_bad_class_on_a_device_makes_that_row_nan(backend):
    # What the public function catches on a CPU reaches the operator elsewhere; it must not read out of bounds.
    logits = leaves(torch.float64)
    target = torch.tensor([0, 5, -1, 2])
    scalars = [torch.tensor(1.0, dtype=torch.float64)] * 3
    nothing = [scalars[0], scalars[0] * 0, scalars[0] * 0]
    loss = torch.ops.fflfast.distill_loss(logits, target, *nothing, FFL.key, 0.0, -100, 0.0, "none")[0]
    assert loss.isnan().tolist() == [False, True, True, False]
    loss, terms, _ = torch.ops.fflfast.distill_loss(logits, target, *scalars, FFL.key, 0.0, -100, 0.0, "none")
    assert loss.isnan().tolist() == [False, True, True, False]
    assert terms.isnan().all()
    loss.sum().backward()
    for z in logits:
        assert z.grad[[1, 2]].isnan().all()
        assert z.grad[[0, 3]].isfinite().all()


# ---- modules


def test_distill_loss_module_takes_new_scalars_and_copies():
    module = copy.deepcopy(fflfast.nn.DistillLoss(FFL, temperature=3.0, label_smoothing=0.1, target_eps=1e-7))
    logits = random_logits(3, (4, 5))
    settings = {"label_smoothing": 0.1, "target_eps": 1e-7}
    assert torch.equal(module(logits, Y).loss, distill_loss(logits, Y, FFL, temperature=3.0, **settings).loss)
    changed = module(logits, Y, temperature=2.0, kl_weight=0.1, ce_weight=0.5).loss
    expected = distill_loss(logits, Y, FFL, temperature=2.0, kl_weight=0.1, ce_weight=0.5, **settings).loss
    assert torch.equal(changed, expected)


def test_kl_module():
    s, t = random_logits(2, (4, 5))
    module = fflfast.nn.KLDivWithLogitsLoss(temperature=2.0, reduction="sum")
    expected = F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="sum") * 4
    torch.testing.assert_close(module(s, t), expected)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": random_logits(2, (4, 5))}, ValueError, "graph has 3 logits tensors"),
        ({"logits": torch.randn(3, 4, 5)}, TypeError, "sequence of 3 tensors"),
        ({"logits": [*random_logits(2, (4, 5)), torch.randn(4, 6)]}, ValueError, r"\(4, 6\) for 'fused'"),
        ({"logits": [torch.zeros(4, 5, dtype=torch.int64)] * 3}, TypeError, "floating-point"),
        ({"logits": [torch.zeros(4, 0)] * 3}, ValueError, "C ≥ 1"),
        ({"logits": [torch.tensor(1.0)] * 3}, ValueError, "C ≥ 1"),
        ({"logits": [torch.zeros(4, 5), torch.zeros(4, 5), None]}, TypeError, "NoneType"),
        (
            {"logits": [torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, 5, device="meta")]},
            ValueError,
            "one device",
        ),
        ({"target": None}, ValueError, "target must be given"),
        ({"target": Y.int()}, TypeError, "long"),
        ({"target": Y[:3]}, ValueError, r"shape \(4,\)"),
        ({"target": torch.rand(4, 4)}, ValueError, "target probabilities"),
        ({"target": torch.rand(4, 5, requires_grad=True)}, ValueError, "must not require grad"),
        ({"target": torch.tensor([0, 1, 5, 2])}, ValueError, "got 5"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, "got -1"),
        ({"target": [0, 1, 2, 3]}, TypeError, "tensor or None"),
        ({"graph": 2}, TypeError, "DistillGraph"),
        ({"temperature": 0.0}, ValueError, "greater than 0"),
        ({"temperature": -1}, ValueError, "greater than 0"),
        ({"temperature": 1e-46}, ValueError, "at least"),
        ({"kl_weight": 1e39}, ValueError, "finite in torch.float32"),
        ({"kl_weight": torch.tensor(1e39, dtype=torch.float64, device="cpu")}, ValueError, "finite in torch.float32"),
        ({"logits": [torch.zeros(4, 5).to_sparse()] * 3}, TypeError, "dense"),
        ({"logits": [torch.zeros(4, 5).to(torch.float8_e4m3fn)] * 3}, TypeError, "float8"),
        ({"ignore_index": 2**70}, ValueError, "int64"),
        ({"temperature": float("nan")}, ValueError, "greater than 0"),
        ({"temperature": torch.tensor(0.0, device="cpu")}, ValueError, "greater than 0"),
        ({"temperature": torch.ones(1)}, ValueError, "0-dim"),
        ({"temperature": torch.tensor(1.0, requires_grad=True)}, ValueError, "must not require grad"),
        ({"temperature": "3"}, TypeError, "number"),
        ({"kl_weight": torch.tensor(1.0, requires_grad=True)}, ValueError, "must not require grad"),
        ({"kl_weight": float("inf")}, ValueError, "finite"),
        ({"ce_weight": None}, TypeError, "number"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing"),
        ({"target_eps": -1e-7}, ValueError, "target_eps"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index"),
        ({"reduction": "avg"}, ValueError, "reduction"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_say_what_was_expected(change, error, message):
    if message in ("got 5", "got -1") and Y.device.type != "cpu":
        pytest.skip("only a device knows the values of its tensors")
    arguments = {"logits": random_logits(3, (4, 5)), "target": Y, "graph": FFL} | change
    with pytest.raises(error, match=message):
        distill_loss(**arguments)


@pytest.mark.parametrize("alpha", [None, True, "0.5"])
def test_kd_loss_checks_alpha_by_its_name(alpha):
    s, t = random_logits(2, (4, 5))
    with pytest.raises(TypeError, match="kd_loss: alpha"):
        kd_loss(s, t, Y, temperature=4.0, alpha=alpha)
    with pytest.raises(ValueError, match="kd_loss: alpha"):
        kd_loss(s, t, Y, temperature=4.0, alpha=torch.tensor(0.5, requires_grad=True))


def test_forced_backends():
    logits = random_logits(3, (4, 5))
    assert fflfast.backends()["reference"] == "available"
    with fflfast.use_backend("reference"):
        distill_loss(logits, Y, FFL)
    with pytest.raises(ValueError, match="expected one of auto"), fflfast.use_backend("tpu"):
        pass
    for name, state in fflfast.backends().items():
        if state != "available":
            with pytest.raises(ValueError, match=name), fflfast.use_backend(name):
                pass


def test_environment_variable_forces_a_backend(monkeypatch):
    monkeypatch.setenv("FFLFAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FFLFAST_BACKEND"):
        distill_loss(random_logits(3, (4, 5)), Y, FFL)
