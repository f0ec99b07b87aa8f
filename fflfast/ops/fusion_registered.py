"""The registered operators of the fusion: what torch.compile, FakeTensor and opcheck see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fusion_stages, reference
from .fusion_arguments import no_autocast
from .fusion_backends import choose_stages
from .fusion_stages import BatchNorm, Gradients, Saved

__all__ = ["DOUBLE_BACKWARD"]

DOUBLE_BACKWARD = (
    "fflfast.fuse_features: expected to be differentiated once, got a second derivative (create_graph=True and another "
    'backward), which only the reference in eager code and one process has (fflfast.use_backend("reference"))'
)
_NORM = (
    "Tensor? weight{0}, Tensor? bias{0}, Tensor? mean{0}, Tensor? var{0}, float eps{0}, bool training{0}, str? group{0}"
)
_ARGUMENTS = (
    f"Tensor[] features, Tensor depthwise_weight, {_NORM.format(1)}, Tensor pointwise_weight, {_NORM.format(2)}"
)
_library = torch.library.Library("fflfast", "FRAGMENT")
_library.define(
    f"fuse_features({_ARGUMENTS}) -> (Tensor pooled, Tensor y, Tensor active, Tensor moments1, Tensor count1, "
    "Tensor moments2, Tensor count2)"
)
_library.define(
    "fuse_features_backward(Tensor grad, Tensor y, Tensor active, Tensor moments1, Tensor count1, Tensor moments2, "
    f"Tensor count2, {_ARGUMENTS}, bool[] needs_grad) -> Tensor[]"
)
_library.define(f"fuse_features_inference({_ARGUMENTS}) -> Tensor")
_library.define(
    "update_running(Tensor[] moments, Tensor[] counts, Tensor(a!)[] running, Tensor(b!)[] batches, float[] momentum) "
    "-> ()"
)


def _unflat(arguments: Sequence[Any]) -> tuple[list[Tensor], Tensor, Tensor, BatchNorm, BatchNorm]:
    features, dw, *rest = arguments
    return features, dw, rest[7], BatchNorm(*rest[:7]), BatchNorm(*rest[8:15])


def _forward_op(*arguments: Any) -> Saved:
    features, dw, pw, one, two = _unflat(arguments)
    with no_autocast(features[0].device.type):
        saved = fusion_stages.forward(choose_stages(features, dw, pw).functions, features, dw, pw, one, two)
    # Counts are kept and shared by calls, which what a registered operator returns may not be.
    return saved._replace(count1=saved.count1.clone(), count2=saved.count2.clone())


def _inference_op(*arguments: Any) -> Tensor:
    features, dw, pw, one, two = _unflat(arguments)
    run = choose_stages(features, dw, pw).functions["inference"]
    with no_autocast(features[0].device.type):
        return run(features, dw, one.frozen(), pw, two.frozen(), fusion_stages.allows_tf32())


def _backward_op(grad: Tensor, *rest: Any) -> list[Tensor]:
    features, dw, pw, one, two = _unflat(rest[6:-1])
    functions = choose_stages(features, dw, pw).functions
    saved = Saved(grad, *rest[:6])
    with no_autocast(grad.device.type):
        *gradients, maps = fusion_stages.backward(functions, grad, features, dw, pw, one, two, saved, rest[-1])
    return [*gradients, *maps]


def _fake_forward(*arguments: Any) -> Saved:
    features, dw, pw, one, two = _unflat(arguments)
    x = features[0]
    batch, out = x.shape[0], pw.shape[0]
    wide = reference.accumulation_dtype(x.dtype)

    def moments(norm: BatchNorm, channels: int) -> tuple[Tensor, Tensor]:
        size = (2, channels) if norm.training else (0,)
        device = x.device if norm.training and norm.group is not None else "cpu"
        return x.new_empty(size, dtype=wide), x.new_empty((), dtype=wide, device=device)

    y = x.new_empty(batch, x.shape[2] * x.shape[3], out)
    active = x.new_empty(2, batch, out, dtype=wide)
    return Saved(x.new_empty(batch, out), y, active, *moments(one, dw.shape[0]), *moments(two, out))


def _fake_inference(*arguments: Any) -> Tensor:
    features, _, pw, _, _ = _unflat(arguments)
    return features[0].new_empty(features[0].shape[0], pw.shape[0])


def _fake_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    features, dw, pw, one, two = _unflat(rest[6:-1])
    needs = rest[-1]
    wide = rest[1].new_empty
    sums = any((*needs[:4], *needs[6:])) or one.group is not None or two.group is not None
    return [
        torch.empty_like(dw, memory_format=torch.contiguous_format) if needs[0] else dw.new_empty(0),
        wide((2, dw.shape[0]) if sums else (0,)),
        torch.empty_like(pw, memory_format=torch.contiguous_format) if needs[3] else pw.new_empty(0),
        wide(2, pw.shape[0]),
        *(torch.empty_like(x) if need else x.new_empty(0) for x, need in zip(features, needs[6:], strict=True)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, dw, pw, one, two = _unflat(inputs)
    ctx.norms = (one.without_tensors(), two.without_tensors())
    ctx.num_features = len(features)
    ctx.save_for_backward(*output[1:], *one[:4], *two[:4], dw, pw, *features)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors  # unpacked once: each look at it runs the hooks of whoever saved them
    saved, rest = tensors[:6], tensors[6:]
    one, two = (norm.with_tensors(*rest[4 * i : 4 * i + 4]) for i, norm in enumerate(ctx.norms))
    dw, pw, *features = rest[8:]
    given = ctx.needs_input_grad
    needs = [*given[1:4], *given[9:12], *given[0]]
    arguments = (features, dw, *one, pw, *two)
    grads = torch.ops.fflfast.fuse_features_backward(grad, *saved, *arguments, needs)
    split = Gradients.of(grads).split(needs)
    none = (None,) * 5
    return split[6:], *split[:3], *none, *split[3:6], *none


def _raise_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(DOUBLE_BACKWARD)


def _update_op(
    moments: list[Tensor], counts: list[Tensor], running: list[Tensor], batches: list[Tensor], momentum: list[float]
) -> None:
    stages = choose_stages([running[0].view(1, -1, 1, 1)]).functions
    stages["update_running"](moments, counts, running, batches, momentum)


_library.impl("fuse_features", _forward_op, "CompositeExplicitAutograd")
_library.impl("fuse_features_inference", _inference_op, "CompositeExplicitAutograd")
_library.impl("fuse_features_backward", _backward_op, "CompositeExplicitAutograd")
_library.impl("update_running", _update_op, "CompositeExplicitAutograd")
torch.library.register_fake("fflfast::fuse_features", _fake_forward, lib=_library)
torch.library.register_fake("fflfast::fuse_features_inference", _fake_inference, lib=_library)
torch.library.register_fake("fflfast::fuse_features_backward", _fake_backward, lib=_library)
torch.library.register_fake("fflfast::update_running", lambda *arguments: None, lib=_library)
torch.library.register_autograd("fflfast::fuse_features", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fflfast::fuse_features_backward", _raise_double_backward, lib=_library)
