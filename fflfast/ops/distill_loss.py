"""The operator fflfast::distill_loss: schema, fake, autograd and backend choice.

Two routes lead to the same implementations. Plain eager tensors take one `autograd.Function`, which costs a
third of a registered operator with a list of tensors; whatever traces (torch.compile, torch.export, FakeTensor,
opcheck) sees the registered operators. On both, a second derivative raises instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..graph import DistillGraph
from . import reference
from .backends import Implementation, choose

__all__ = ["IMPLEMENTATIONS", "LossOptions", "distill_loss", "is_traced"]


class LossOptions(NamedTuple):
    """What is fixed when a loss is written down, as opposed to T, λ and μ."""

    graph: DistillGraph
    label_smoothing: float
    ignore_index: int
    target_eps: float
    reduction: str  # none, mean or sum


# Roles: forward(logits, target, T, λ, μ, *options) -> (loss, terms);
#        backward(grad_loss, logits, target, T, λ, μ, *options, needs_grad) -> list of M tensors.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(
        {"forward": reference.distill_loss, "backward": reference.distill_loss_backward},
        lambda *case: None,
    ),
}

DOUBLE_BACKWARD = (
    "fflfast.distill_loss: expected to be differentiated once, got a second derivative (create_graph=True and "
    "another backward), which the operator does not have; write the loss with torch.nn.functional for that"
)


def distill_loss(
    logits: Sequence[Tensor], target: Tensor | None, scalars: tuple[Tensor, Tensor, Tensor], options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Loss and detached terms of logits of one shape and dtype; scalars = (T, λ, μ), 0-dim. Arguments are checked."""
    if is_traced(logits[0]):
        graph, *rest = options
        loss, terms = torch.ops.fflfast.distill_loss(list(logits), target, *scalars, graph.key, *rest)
        return loss, terms.detach()
    return _DistillLoss.apply(options, target, *scalars, *logits)


def is_traced(tensor: Tensor) -> bool:
    """Whether the call is being traced, or the tensor has no values to look at."""
    return (
        torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter) or is_in_torch_dispatch_mode()
    )


# ---- eager route ----------------------------------------------------------------------------------------------


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: LossOptions, target: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        logits, scalars = tensors[3:], tensors[:3]
        chosen = choose("distill_loss", IMPLEMENTATIONS, logits, target, options)
        loss, terms = chosen.functions["forward"](logits, target, *scalars, *options)
        ctx.options, ctx.chosen = options, chosen
        ctx.save_for_backward(target, *tensors)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[5:]
        if grad_loss is None:
            return (None,) * (5 + len(needs))
        saved = ctx.saved_tensors
        # Without create_graph there is nothing to guard, and the second Function's cost is saved.
        run = _Gradient.apply if torch.is_grad_enabled() else _Gradient.compute
        grads = run(ctx.chosen, ctx.options, needs, grad_loss, *saved)
        return (None,) * 5 + tuple(g if need else None for g, need in zip(grads, needs, strict=True))


class _Gradient(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative can say that it does not exist."""

    @staticmethod
    def compute(chosen: Implementation, options: LossOptions, needs: Sequence[bool], *tensors: Any) -> tuple[Any, ...]:
        grad_loss, target, *scalars_and_logits = tensors
        scalars, logits = scalars_and_logits[:3], scalars_and_logits[3:]
        return tuple(chosen.functions["backward"](grad_loss, logits, target, *scalars, *options, needs))

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
    f"{_OPTIONS}) -> (Tensor, Tensor)"
)
_library.define(
    "distill_loss_backward(Tensor grad_loss, Tensor[] logits, Tensor? target, Tensor temperature, Tensor kl_weight, "
    f"Tensor ce_weight, {_OPTIONS}, bool[] needs_grad) -> Tensor[]"
)


def _forward_op(
    logits: list[Tensor], target: Tensor | None, t: Tensor, kl: Tensor, ce: Tensor, graph: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    options = LossOptions(DistillGraph.from_key(graph), *rest)
    chosen = choose("distill_loss", IMPLEMENTATIONS, logits, target, options)
    return chosen.functions["forward"](logits, target, t, kl, ce, *options)


def _backward_op(
    grad_loss: Tensor,
    logits: list[Tensor],
    target: Tensor | None,
    t: Tensor,
    kl: Tensor,
    ce: Tensor,
    graph: str,
    *rest: Any,
) -> list[Tensor]:
    *rest_options, needs = rest
    options = LossOptions(DistillGraph.from_key(graph), *rest_options)
    chosen = choose("distill_loss", IMPLEMENTATIONS, logits, target, options)
    return chosen.functions["backward"](grad_loss, logits, target, t, kl, ce, *options, needs)


def _fake_forward(
    logits: list[Tensor], target: Tensor | None, t: Tensor, kl: Tensor, ce: Tensor, graph: str, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(logits[0].dtype)
    rows = logits[0].shape[:-1] if rest[-1] == "none" else ()
    terms = logits[0].new_empty(DistillGraph.from_key(graph).num_terms, dtype=dtype)
    return logits[0].new_empty(rows, dtype=dtype), terms


def _fake_backward(grad_loss: Tensor, logits: list[Tensor], *rest: Any) -> list[Tensor]:
    return [
        torch.empty_like(z, memory_format=torch.contiguous_format) if need else z.new_empty(0)
        for z, need in zip(logits, rest[-1], strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, *scalars = inputs[:5]
    ctx.options = inputs[5:]
    ctx.has_target = target is not None
    ctx.save_for_backward(*scalars, *logits, *([target] if ctx.has_target else []))
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    target = saved.pop() if ctx.has_target else None
    scalars, logits = saved[:3], saved[3:]
    needs = list(ctx.needs_input_grad[0])
    grads = torch.ops.fflfast.distill_loss_backward(grad_loss, logits, target, *scalars, *ctx.options, needs)
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
