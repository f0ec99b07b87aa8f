"""What `fflfast doctor` puts into the fusion module: random feature maps and every nasty kind its contract names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .accuracy import tensor_share
from .doctor_loss import Draw, broken
from .nn import FeatureFusion

__all__ = ["CHECKS", "FusionCheck", "plain_pooled"]

# Of the largest value. What a sum leaves after cancelling is a chance of the order, and two norms lie between the
# pooled features and most gradients; 16-bit values that are almost 0 before a ReLU are kept or dropped by a rounding.
_FLOORS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
_LAYOUTS = (torch.contiguous_format, torch.channels_last)

Shape = tuple[int, int, int, int]
Run = Callable[[FeatureFusion, Sequence[Tensor]], Tensor]


def _exact_convolutions() -> contextlib.AbstractContextManager[None]:
    """cuDNN's in full float32 and the same bits every time: the composition is judged too, and is the measure."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def plain_pooled(module: FeatureFusion, features: Sequence[Tensor]) -> Tensor:
    """What the module pools, written with PyTorch's operators on the concatenated feature maps."""
    size = (min(x.shape[2] for x in features), min(x.shape[3] for x in features))
    x = torch.cat([x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in features], 1)
    x = F.conv2d(x, module.depthwise.weight.to(x.dtype), padding=1, groups=x.shape[1])
    x = F.conv2d(F.relu(module.depthwise_norm(x)), module.pointwise.weight.to(x.dtype))
    return F.relu(module.pointwise_norm(x)).mean((2, 3))


@dataclass(frozen=True)
class FusionCheck:
    """One kind of input.

    Attributes:
        name: what the table shows.
        shapes: of the feature maps.
        out_channels: C_out.
        dtype: of the feature maps; the weights are float32, float64 for float64.
        layout: nchw, channels_last, or strided: slices and an expanded feature map.
        training: of the two norms; a frozen one takes its running statistics.
        gradients: all, maps alone, or none: no autograd, which is the inference kernel where both norms are frozen.
        momentum: of both norms.
        edit: changes the feature maps, (k, feature map in float64) -> feature map.
        centre: the depthwise weights have their centre tap alone, so that no border hides what the values do.
        quick: whether `--quick` has it.
        compiled: whether it also runs under torch.compile.
    """

    name: str
    shapes: tuple[Shape, ...]
    out_channels: int
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    training: tuple[bool, bool] = (True, True)
    gradients: str = "all"
    momentum: float | None = 0.1
    edit: Callable[[int, Tensor], Tensor] = lambda k, x: x
    centre: bool = False
    quick: bool = True
    compiled: bool = False

    operator = "fuse_features"
    device_only = False

    def prepare(self, device: torch.device) -> Callable[[bool], dict[str, float]]:
        """Draw weights and feature maps, and compute with PyTorch's operators in float64 and in the dtype.

        Returns a function that runs the backend of the moment, compiled or not, and maps each quantity to its
        worst error as a share of what is allowed; a broken promise that is no number is infinite.
        """
        draw = Draw(device, seed=sum(map(ord, self.name)))
        module = self._module(draw)
        features = [self._laid_out(self.edit(k, draw.normal(*s)).to(self.dtype)) for k, s in enumerate(self.shapes)]
        cotangents = [draw.normal(self.shapes[0][0], self.out_channels).to(self.dtype) for _ in range(2)]
        wide = self._rounded(module).double()
        exact = self._run(plain_pooled, wide, [x.double() for x in features], [g.double() for g in cotangents])
        module = module.double() if self.dtype == torch.float64 else module
        module, cotangents = module.to(device), [g.to(device) for g in cotangents]
        with _exact_convolutions():
            plain = [
                self._run(plain_pooled, module, [x.to(device, memory_format=f) for x in features], cotangents)
                for f in _LAYOUTS
            ]
        features = [x.to(device) if self.layout != "strided" else self._laid_out(x.to(device)) for x in features]
        compiled_pooled: list[Any] = []

        def measure(compiled: bool) -> dict[str, float]:
            if compiled and not compiled_pooled:
                compiled_pooled.append(torch.compile(FeatureFusion.pooled, fullgraph=True, dynamic=False))
            function: Run = compiled_pooled[0] if compiled else FeatureFusion.pooled
            # A compiled backward frees its buffers, so that it runs once.
            twice = cotangents[: 1 if compiled else 2]
            before = [x.clone() for x in features]
            with _exact_convolutions():
                got = self._run(function, module, features, twice)
                again = self._run(function, module, features, twice[:1])
            shares = {
                what: tensor_share(value, [p[what] for p in plain], exact[what], _FLOORS[self.dtype])
                for what, value in got.items()
            }
            shares["same bits when repeated"] = broken([(got[what], value) for what, value in again.items()])
            shares["input left alone"] = broken(zip(features, before, strict=True))
            if any(value.dtype != plain[0][what].dtype for what, value in got.items()):
                shares["dtypes"] = torch.inf
            return shares

        return measure

    def _module(self, draw: Draw) -> FeatureFusion:
        channels = [shape[1] for shape in self.shapes]
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            module = FeatureFusion(channels, self.out_channels, 1).requires_grad_(self.gradients == "all")
        with torch.no_grad():
            taps = draw.normal(*module.depthwise.weight.shape)
            if self.centre:
                taps *= torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], device="cpu")
            module.depthwise.weight.copy_(0.4 * taps)
            module.pointwise.weight.copy_(draw.normal(*module.pointwise.weight.shape) * sum(channels) ** -0.5)
            for norm, training in zip((module.depthwise_norm, module.pointwise_norm), self.training, strict=True):
                norm.train(training)
                norm.momentum = self.momentum
                for tensor, mean, spread in (
                    (norm.weight, 1.0, 0.5), (norm.bias, 0.3, 0.5), (norm.running_mean, 0.0, 0.3),
                ):  # fmt: skip
                    tensor.copy_(mean + spread * draw.normal(*tensor.shape))  # type: ignore[union-attr]
                norm.running_var.copy_(0.5 + draw.uniform(*norm.running_var.shape))  # type: ignore[union-attr]
        return module

    def _rounded(self, module: FeatureFusion) -> FeatureFusion:
        """A copy whose convolutions have the weights that the operator computes with."""
        module = copy.deepcopy(module)
        if self.dtype != torch.float64:
            for conv in (module.depthwise, module.pointwise):
                conv.to(self.dtype)
        return module

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "nchw":
            return x.contiguous()
        batch, channels, height, width = x.shape
        large = x.new_zeros(batch, 2 * channels, height, 2 * width + 3)
        inside = large[:, 1::2, :, 2 : 2 * width + 2 : 2]
        return inside.copy_(x)

    def _run(
        self, function: Run, module: FeatureFusion, features: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Pooled features, gradients for each cotangent and running statistics; the module's buffers stay."""
        start = [buffer.clone() for buffer in module.buffers()]
        leaves = [x.detach().requires_grad_(self.gradients != "none") for x in features]
        found: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self.gradients != "none"):
            pooled = function(module, leaves)
        found["pooled"] = pooled.detach()
        parameters = [(name, p) for name, p in module.named_parameters() if "classifier" not in name]
        wanted = [(f"feature map {k}", x) for k, x in enumerate(leaves)]
        wanted += parameters if self.gradients == "all" else []
        if self.gradients != "none":
            for i, cotangent in enumerate(cotangents):
                last = i + 1 == len(cotangents)
                gradients = torch.autograd.grad(pooled, [t for _, t in wanted], cotangent, retain_graph=not last)
                second = "second " if i else ""
                found |= {f"{second}gradient of {name}": g for (name, _), g in zip(wanted, gradients, strict=True)}
        with torch.no_grad():
            for (name, buffer), before in zip(module.named_buffers(), start, strict=True):
                found[name] = buffer.clone()
                buffer.copy_(before)
        return found


def _maps(*channels: int, batch: int = 4, size: tuple[int, int] = (8, 8)) -> tuple[Shape, ...]:
    return tuple((batch, c, *size) for c in channels)


def _nan(k: int, x: Tensor) -> Tensor:
    x[1, :, 0, 0] = torch.nan
    return x


_TWO = _maps(8, 8)
_FROZEN = (False, False)
_BF16, _FP16 = torch.bfloat16, torch.float16

CHECKS: tuple[FusionCheck, ...] = (
    FusionCheck("two maps, float32", _TWO, 8, compiled=True),
    FusionCheck("two maps, float64", _TWO, 8, torch.float64),
    FusionCheck("two maps, bfloat16", _TWO, 8, _BF16, compiled=True),
    FusionCheck("two maps, float16", _TWO, 8, _FP16),
    FusionCheck("channels_last, float32", _TWO, 8, layout="channels_last"),
    FusionCheck("channels_last, bfloat16", _maps(16, 24, size=(7, 7)), 20, _BF16, "channels_last"),
    FusionCheck("maps as slices of others", _maps(5, 6, size=(5, 7)), 9, layout="strided"),
    FusionCheck("unequal channels, 7×7", _maps(16, 1, 33, size=(7, 7)), 21),
    FusionCheck("unequal sizes", ((3, 6, 8, 6), (3, 5, 4, 9)), 7),
    FusionCheck("eight maps", _maps(1, 2, 3, 4, 5, 6, 7, 8, size=(3, 3)), 5),
    FusionCheck("one map", _maps(13), 4),
    # Where one tap is all that counts, a norm in training takes its size off again: its gradient is a rounding error.
    FusionCheck("one pixel", _maps(9, 7, batch=12, size=(1, 1)), 6, gradients="maps"),
    FusionCheck("one pixel, first norm frozen", _maps(9, 7, batch=12, size=(1, 1)), 6, training=(False, True)),
    FusionCheck("one sample", _maps(9, 7, batch=1, size=(4, 5)), 6),
    FusionCheck("one row of 33", _maps(3, 4, size=(1, 33)), 5),
    FusionCheck("64×64", _maps(3, 2, batch=2, size=(64, 64)), 5, quick=False),
    FusionCheck("(8, 2, 64, 8)", _maps(64, 64, batch=8), 64, quick=False),
    FusionCheck("(4, 2, 512, 7), bfloat16", _maps(512, 512, size=(7, 7)), 512, _BF16, "channels_last", quick=False),
    FusionCheck("first norm frozen", _TWO, 8, training=(False, True)),
    FusionCheck("second norm frozen", _TWO, 8, training=(True, False)),
    FusionCheck("frozen norms, trained", _TWO, 8, training=_FROZEN),
    FusionCheck("inference", _maps(16, 9, size=(7, 7)), 11, training=_FROZEN, gradients="none", compiled=True),
    FusionCheck("inference, bfloat16", _TWO, 8, _BF16, "channels_last", _FROZEN, "none"),
    FusionCheck("training without gradients", _TWO, 8, gradients="none"),
    FusionCheck("gradients of the maps alone", _TWO, 8, gradients="maps"),
    FusionCheck("cumulative average", _TWO, 8, momentum=None),
    FusionCheck("mean 1000, deviation 0.01", _TWO, 8, gradients="maps", edit=lambda k, x: 1000 + 1e-2 * x, centre=True),
    FusionCheck("dead channels", _TWO, 8, gradients="maps", edit=lambda k, x: torch.full_like(x, 2.0), centre=True),
    FusionCheck("values of size 10,000", _TWO, 8, edit=lambda k, x: 1e4 * x),
    FusionCheck("values of size 0.00001", _TWO, 8, edit=lambda k, x: 1e-5 * x),
    FusionCheck("a sample with NaN, inference", _TWO, 8, training=_FROZEN, gradients="none", edit=_nan),
    FusionCheck("a sample with NaN", _TWO, 8, gradients="none", edit=_nan),
)
