"""The operator fflfast::distill_loss: schema, fake, autograd and backend choice.

Two routes lead to the same implementations. Plain eager tensors take one `autograd.Function`, which costs a
third of a registered operator with a list of tensors; whatever traces (torch.compile, torch.export, FakeTensor,
opcheck) sees the registered operators. On both, a second derivative raises instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph import DistillGraph
from . import native, reference
from .backends import Implementation, choose
from .tracing import is_traced, is_transformed

__all__ = ["IMPLEMENTATIONS", "LossOptions", "distill_loss", "is_traced"]


class LossOptions(NamedTuple):
    """What is fixed when a loss is written down, as opposed to T, λ and μ."""

    graph: DistillGraph
    label_smoothing: float
    ignore_index: int
    target_eps: float
    reduction: str  # none, mean or sum


def _fits_device(device: str) -> Callable[..., str | None]:
    where = f"the tensors are not {device.upper()} tensors"

    def refuses(logits: Sequence[Tensor], target: Tensor | None, options: LossOptions) -> str | None:
        if logits[0].device.type != device:
            return where  # spelled once: this is asked at every call
        return native.load(device) or native.fits(options.graph, device, logits[0].dtype) or _empty(logits)

    return refuses


def _triton_refuses(logits: Sequence[Tensor], target: Tensor | None, options: LossOptions) -> str | None:
    from .. import kernels  # when first asked for: not every machine has Triton

    device = logits[0].device.type
    return kernels.available() or kernels.refuses(device, options.graph) or _empty(logits)


def _empty(logits: Sequence[Tensor]) -> str | None:
    return None if logits[0].numel() else "there are no rows"


def _triton() -> Any:
    from ..kernels import distill_loss

    return distill_loss


def _reference_forward(
    logits: Sequence[Tensor], target: Tensor | None, scalars: Any, options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.distill_loss(logits, target, *scalars, *options)


def _reference_backward(
    grad_loss: Tensor, logits: Sequence[Tensor], target: Tensor | None, statistics: Tensor,
    scalars: Any, options: Any, needs: tuple[bool, ...],
) -> list[Tensor]:  # fmt: skip
    settings = (*scalars, *options, needs)
    return reference.distill_loss_backward(grad_loss, logits, target, statistics, *settings)


# Roles, with scalars = (T, λ, μ): forward(logits, target, scalars, options) -> (loss, terms, statistics);
#        backward(grad_loss, logits, target, statistics, scalars, options, needs_grad) -> list of M tensors;
#        forward_with_gradients(logits, target, scalars, options, needs_grad) -> (loss, terms, gradients for a
#        grad_output of 1) and scale(grad_loss, gradients) in place: optional, for reductions mean and sum.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "cuda": Implementation(
        native.distill_loss_functions(lambda: native.operators("fflfast_cuda"), native.table), _fits_device("cuda")
    ),
    "triton": Implementation(native.distill_loss_functions(_triton, lambda graph: graph), _triton_refuses),
    "cpu": Implementation(
        native.distill_loss_functions(lambda: native.operators("fflfast_cpu"), native.table), _fits_device("cpu")
    ),
    "reference": Implementation(
        {"forward": _reference_forward, "backward": _reference_backward},
        lambda *case: None,
    ),
}

DOUBLE_BACKWARD = (
    "fflfast.distill_loss: expected to be differentiated once, got a second derivative (create_graph=True and "
    "another backward), which the operator does not have; write the loss with torch.nn.functional for that"
)

TRANSFORMED = (
    "fflfast.distill_loss: expected to be differentiated in reverse mode by autograd, got forward mode or a transform "
    "of torch.func (grad, jvp, vmap), which the operator does not have; write the loss with torch.nn.functional for it"
)


def distill_loss(
    logits: Sequence[Tensor],
    target: Tensor | None,
    scalars: tuple[Tensor, Tensor, Tensor],
    options: LossOptions,
    traced: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and detached terms of logits of one shape and dtype; scalars = (T, λ, μ), 0-dim. Arguments are checked."""
    if is_transformed(logits):
        raise RuntimeError(TRANSFORMED)
    if traced:
        graph, *rest = options
        loss, terms, _ = torch.ops.fflfast.distill_loss(list(logits), target, *scalars, graph.key, *rest)
        return loss, terms.detach()
    chosen = _choose(logits, target, options)
    if torch.is_grad_enabled() and any(z.requires_grad for z in logits):
        call = _Call(chosen, options, target, scalars)
        loss = _DistillLoss.apply(call, *logits)
        return loss, call.terms
    return chosen.functions["forward"](logits, target, scalars, options)[:2]


def _choose(logits: Sequence[Tensor], target: Tensor | None, options: LossOptions) -> Implementation:
    try:
        return choose("distill_loss", IMPLEMENTATIONS, logits, target, options)
    except ValueError:
        # An empty batch has nothing for a kernel to do: it is no reason to refuse a forced backend.
        if logits[0].numel():
            raise
        return IMPLEMENTATIONS["reference"]


# ---- eager route ----------------------------------------------------------------------------------------------


class _Call:
    """What a call of the operator has beside its logits: each argument of a Function costs time of its own."""

    __slots__ = ("chosen", "options", "scalars", "target", "terms")
    terms: Tensor

    def __init__(
        self, chosen: Implementation, options: LossOptions, target: Tensor | None, scalars: tuple[Tensor, ...]
    ) -> None:
        self.chosen, self.options, self.target, self.scalars = chosen, options, target, scalars


class _DistillLoss(torch.autograd.Function):
    """Saves row statistics (base form), or writes the gradients at once and holds them for the first backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *logits: Tensor) -> Tensor:
        options, scalars, functions = call.options, call.scalars, call.chosen.functions
        gradients = statistics = None
        # A float16 gradient ÷ n would underflow before a GradScaler's factor can help: there the base form.
        at_once = options.reduction != "none" and logits[0].dtype != torch.float16
        if at_once and (run := functions.get("forward_with_gradients")) is not None:
            needs = ctx.needs_input_grad[1:]
            loss, call.terms, gradients = run(logits, call.target, scalars, options, needs)
        else:
            loss, call.terms, statistics = functions["forward"](logits, call.target, scalars, options)
        ctx.chosen, ctx.options, ctx.gradients = call.chosen, options, gradients
        ctx.save_for_backward(call.target, statistics, *scalars, *logits)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if grad_loss is None:
            return (None,) * (1 + len(needs))
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and not torch.is_grad_enabled():
            ctx.chosen.functions["scale"](grad_loss, gradients)
        else:
            # Without create_graph there is nothing to guard, and the second Function's cost is saved.
            run = _Gradient.apply if torch.is_grad_enabled() else _Gradient.compute
            gradients = run(ctx.chosen, ctx.options, needs, grad_loss, *ctx.saved_tensors)
        if all(needs):
            return None, *gradients
        return None, *(g if need else None for g, need in zip(gradients, needs, strict=True))


class _Gradient(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative can say that it does not exist."""

    @staticmethod
    def compute(chosen: Implementation, options: LossOptions, needs: Sequence[bool], *tensors: Any) -> tuple[Any, ...]:
        grad_loss, target, statistics, *rest = tensors
        scalars, logits = rest[:3], rest[3:]
        if statistics is None:
            statistics = chosen.functions["forward"](logits, target, scalars, options)[2]
        return tuple(chosen.functions["backward"](grad_loss, logits, target, statistics, scalars, options, needs))

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        return _Gradient.compute(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(DOUBLE_BACKWARD)


# ---- registered route -----------------------------------------------------------------------------------------

_OPTIONS = "str graph, float label_smoothing, int ignore_index, float target_eps, str reduction"
_library = torch.library.Library("fflfast", "FRAGMENT")
_library.define(
    "distill_loss(Tensor[] logits, Tensor? target, Tensor temperature, Tensor kl_weight, Tensor ce_weight, "
    f"{_OPTIONS}) -> (Tensor loss, Tensor terms, Tensor statistics)"
)
_library.define(
    "distill_loss_backward(Tensor grad_loss, Tensor[] logits, Tensor? target, Tensor statistics, "
    f"Tensor temperature, Tensor kl_weight, Tensor ce_weight, {_OPTIONS}, bool[] needs_grad) -> Tensor[]"
)


def _forward_op(
    logits: list[Tensor], target: Tensor | None, t: Tensor, kl: Tensor, ce: Tensor, graph: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    options = LossOptions(DistillGraph.from_key(graph), *rest)
    chosen = _choose(logits, target, options)
    return chosen.functions["forward"](logits, target, (t, kl, ce), options)


def _backward_op(
    grad_loss: Tensor,
    logits: list[Tensor],
    target: Tensor | None,
    statistics: Tensor,
    t: Tensor,
    kl: Tensor,
    ce: Tensor,
    graph: str,
    *rest: Any,
) -> list[Tensor]:
    *rest_options, needs = rest
    options = LossOptions(DistillGraph.from_key(graph), *rest_options)
    chosen = _choose(logits, target, options)
    return chosen.functions["backward"](grad_loss, logits, target, statistics, (t, kl, ce), options, tuple(needs))


def _fake_forward(
    logits: list[Tensor], target: Tensor | None, t: Tensor, kl: Tensor, ce: Tensor, graph: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    z, built = logits[0], DistillGraph.from_key(graph)
    dtype = reference.accumulation_dtype(z.dtype)
    sizes = (z.shape[:-1] if rest[-1] == "none" else (), built.num_terms, reference.statistics_size(z, built))
    loss, terms, statistics = (z.new_empty(size, dtype=dtype) for size in sizes)
    return loss, terms, statistics


def _fake_backward(grad_loss: Tensor, logits: list[Tensor], *rest: Any) -> list[Tensor]:
    return [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need else z.new_empty(0)
        for z, need in zip(logits, rest[-1], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, *scalars = inputs[:5]
    ctx.options = inputs[5:]
    ctx.has_target = target is not None
    ctx.save_for_backward(output[2], *scalars, *logits, *([target] if ctx.has_target else []))
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    statistics, *saved = ctx.saved_tensors
    target = saved.pop() if ctx.has_target else None
    scalars, logits = saved[:3], saved[3:]
    needs = list(ctx.needs_input_grad[0])
    backward = torch.ops.fflfast.distill_loss_backward
    grads = backward(grad_loss, logits, target, statistics, *scalars, *ctx.options, needs)
    none = (None,) * (4 + len(ctx.options))
    return ([g if need else None for g, need in zip(grads, needs, strict=True)], *none)


def _raise_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(DOUBLE_BACKWARD)


_library.impl("distill_loss", _forward_op, "CompositeExplicitAutograd")
_library.impl("distill_loss_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("fflfast::distill_loss", _fake_forward, lib=_library)
torch.library.register_fake("fflfast::distill_loss_backward", _fake_backward, lib=_library)
torch.library.register_autograd("fflfast::distill_loss", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fflfast::distill_loss_backward", _raise_double_backward, lib=_library)
