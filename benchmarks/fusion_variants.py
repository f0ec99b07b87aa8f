"""Who computes a case of the fusion: ours through each backend, and the same modules of PyTorch, eager and compiled.

A variant is a module from a list of feature maps to pooled features; all have the same weights under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fflfast.nn import FeatureFusion

from .calls import Call, Variant, available_backends, context, under
from .fusion_cases import FusionCase, FusionData
from .measure import once

__all__ = ["Composition", "Pooled", "fusion_errors", "fusion_variants_for"]


class Composition(nn.Module):
    """The fusion as one would write it: concatenate, then one torch module after the other, then the mean.

    Args:
        channels, out_channels: ΣC_k and C_out.
        channels_last: bring the concatenated feature maps into this order, where cuDNN and oneDNN are fastest.
    """

    def __init__(self, channels: int, out_channels: int, channels_last: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = torch.cat(list(features), 1).contiguous(memory_format=self.layout)
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        return F.relu(self.pointwise_norm(self.pointwise(x))).mean((2, 3))


class Pooled(FeatureFusion):
    """Ours up to the pooled features."""

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        del self.classifier

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.pooled(features)


def _composition(case: FusionCase, channels_last: bool) -> Composition:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = Composition(case.total_channels, case.channels, channels_last)
    for conv in (module.depthwise, module.pointwise):
        conv.to(case.dtype)  # norms stay in float32
    return module.to(memory_format=module.layout)


def _ours(backend: str, device: torch.device) -> Callable[[FusionCase], Call]:
    def build(case: FusionCase) -> Call:
        module = Pooled([case.channels] * case.maps, case.channels)
        for conv in (module.depthwise, module.pointwise):
            conv.to(case.dtype)
        module.load_state_dict(_composition(case, False).state_dict())
        return under(backend, module.to(device))

    return build


def _eager(device: torch.device, channels_last: bool) -> Callable[[FusionCase], Call]:
    return lambda case: _composition(case, channels_last).to(device)


def _compiled(device: torch.device, **options: Any) -> Callable[[FusionCase], Call]:
    def build(case: FusionCase) -> Call:
        return torch.compile(
            _composition(case, case.channels_last).to(device), dynamic=False, fullgraph=True, **options
        )

    return build


def fusion_variants_for(case: FusionCase, device: torch.device, compiled: bool = True) -> list[Variant]:
    """Everything that can run a case on a device, ours first."""
    found: list[Variant] = [(name, _ours(name, device)) for name in available_backends(device)]
    found.append(("eager", _eager(device, case.channels_last)))
    if not case.channels_last:
        # What pays for the change of order gets the faster kernels.
        found.append(("eager-channels_last", _eager(device, True)))
    if compiled:
        found.append(("compile", _compiled(device)))
        if case.tuned and device.type != "cpu":
            found.append(("compile-tuned", _compiled(device, mode="max-autotune-no-cudagraphs")))
    return found


@torch.no_grad()
def _set_statistics(module: Any, like: nn.Module) -> None:
    for own, other in zip(module.buffers(), like.buffers(), strict=True):
        own.copy_(other)


def fusion_errors(
    case: FusionCase, data: FusionData, calls: Mapping[str, Call], kind: str
) -> dict[str, dict[str, float]]:
    """Errors against float64, |got − exact| ÷ |exact| in the Euclidean norm, of the worst tensor: pooled features and,
    in training, gradients and the running statistics after one step.

    The largest element would be a matter of luck: among millions of values before a ReLU some are so close to 0 that a
    rounding decides.
    """
    exact = _composition(case, case.channels_last).double().to(data.grad.device)
    wide = FusionData([x.detach().double().requires_grad_() for x in data.features], data.grad.double())
    start = _composition(case, case.channels_last)
    if kind == "inference":
        with torch.no_grad():
            for norm in (exact.depthwise_norm, exact.pointwise_norm):
                norm.momentum = 1.0
            exact(wide.features)  # statistics that fit
            start.load_state_dict(exact.state_dict())
            truth: list[list[Tensor]] = [[exact.eval()(wide.features)]]
    else:
        pooled, gradients = once(exact, wide)
        truth = [[pooled], gradients, list(exact.buffers())]
    found = {}
    for name, call in calls.items():
        _set_statistics(call, start)
        with context(call):
            if kind == "inference":
                with torch.no_grad():
                    got = [[call(data.features)]]
            else:
                pooled, gradients = once(call, data)
                got = [[pooled], gradients, list(call.buffers())]  # type: ignore[attr-defined]
        names = ("output_error", "gradient_error", "statistics_error")
        found[name] = {key: max(map(_error, g, t)) for key, g, t in zip(names, got, truth, strict=False)}
    return found


def _error(got: Tensor, exact: Tensor) -> float:
    got, exact = got.double(), exact.double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300))
