"""Where distill_loss ends: transforms it does not have, infinite grad_output, dynamic floats, devices of scalars."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad
from truth import GRAPHS, assert_contract, random_logits, target_for

import fflfast
from fflfast import distill_loss, kd_loss, kl_div_with_logits

FFL = GRAPHS["ffl2"]


def leaves(shape=(4, 5)):
    return [z.requires_grad_() for z in random_logits(3, shape)]


# ---- transforms


def test_forward_mode_says_that_it_is_not_there(backend):
    logits, y = random_logits(3, (4, 5)), target_for(FFL, (4, 5))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits[0], torch.ones_like(logits[0]))
        with pytest.raises(RuntimeError, match="reverse mode"):
            distill_loss([dual, *logits[1:]], y, FFL)
        distill_loss(logits, y, FFL)  # without a tangent nothing is lost


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_function_transforms_say_that_they_are_not_there(backend, transform):
    logits, y = random_logits(3, (4, 5)), target_for(FFL, (4, 5))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(lambda z: distill_loss([z, *logits[1:]], y, FFL).loss)(logits[0])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.vmap(lambda *z: distill_loss(z, y[0], FFL).loss)(*logits)


# ---- grad_output


@pytest.mark.parametrize("factor", [math.inf, -math.inf, math.nan])
def test_ignored_rows_get_nothing_of_an_infinite_grad_output(route, backend, factor):
    logits, y = leaves(), target_for(FFL, (4, 5))
    y[1] = -100
    loss = distill_loss(logits, y, FFL).loss
    for _ in range(2):
        grads = torch.autograd.grad(loss, logits, torch.tensor(factor), retain_graph=True)
        for g in grads:
            assert (g[1] == 0).all()
            assert not g[0].isfinite().any()


# ---- compile


@pytest.mark.parametrize("call", ["loss", "kd", "kl"])
def test_compiles_with_everything_dynamic(call):
    y = target_for(FFL, (4, 5))
    calls = {
        "loss": lambda z, t, s: distill_loss(z, y, FFL, temperature=t, label_smoothing=s, target_eps=s / 10).loss,
        "kd": lambda z, t, s: kd_loss(z[0], z[1], y, temperature=t, alpha=0.5, label_smoothing=s),
        "kl": lambda z, t, s: kl_div_with_logits(z[0], z[1], temperature=t),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[call], backend="aot_eager", fullgraph=True, dynamic=True)
    logits = leaves()
    for temperature, smoothing in ((3.0, 0.1), (2.0, 0.2), (1.5, 0.0)):
        torch.testing.assert_close(
            compiled(logits, temperature, smoothing), calls[call](logits, temperature, smoothing)
        )


def test_scalars_stay_on_the_cpu_under_another_default_device():
    logits, y = leaves(), target_for(FFL, (4, 5))

    def loss_of(temperature):
        return distill_loss(logits, y, FFL, temperature=temperature).loss

    torch._dynamo.reset()
    expected = loss_of(3.0)
    with torch.device("meta"):
        torch.testing.assert_close(torch.compile(loss_of, backend="aot_eager", fullgraph=True)(3.0), expected)


def test_use_backend_inside_compiled_code_is_refused():
    logits, y = leaves(), target_for(FFL, (4, 5))

    def loss_of():
        with fflfast.use_backend("reference"):
            return distill_loss(logits, y, FFL).loss

    torch._dynamo.reset()
    with pytest.raises(Exception, match="outside of compiled code"):
        torch.compile(loss_of, backend="aot_eager", fullgraph=True)()


# ---- numbers


@pytest.mark.parametrize("name", ["ffl2", "kd", "dml3", "single"])
@pytest.mark.parametrize("temperature", [2.0, 3.0, 4.0, 5.0, 8.0, 16.0])
@pytest.mark.parametrize("kl_weight", [0.0, 1e-3])
def test_gradients_that_are_mostly_cross_entropy(backend, name, temperature, kl_weight):
    # λ is small at the start of a ramp-up; nothing then hides the error of exp(z − m) taken as a power.
    if backend in ("triton", "emulated") and temperature != 8.0:
        pytest.skip("no powers there")
    graph = GRAPHS[name]
    for seed in range(6):
        logits = random_logits(graph.num_logits, (16, 10), seed=seed)
        y = target_for(graph, (16, 10), seed)
        assert_contract(distill_loss, logits, y, graph, temperature=temperature, kl_weight=kl_weight)


@pytest.mark.parametrize("name", ["ffl2", "kd", "okdhp2"])
@pytest.mark.parametrize("temperature", [8.0, 20.5, 50.0])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 600])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_divergences_that_a_large_temperature_makes_small(backend, name, temperature, num_classes):
    if num_classes > 512 and temperature < 16:
        pytest.skip("sums of that many are taken in float32")
    graph = GRAPHS[name]
    for seed in range(6):
        logits = random_logits(graph.num_logits, (16, num_classes), scale=1.0, seed=seed)
        y = target_for(graph, (16, num_classes), seed)
        for reduction in ("mean", "none"):
            assert_contract(distill_loss, logits, y, graph, temperature=temperature, reduction=reduction)


def test_a_temperature_beyond_every_float_is_a_value_error():
    with pytest.raises(ValueError, match="finite"):
        distill_loss(random_logits(3, (4, 5)), target_for(FFL, (4, 5)), FFL, temperature=10**400)
