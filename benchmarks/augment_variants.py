"""Who augments: ours through each backend, and PyTorch's operators as people write it, eager and compiled.

A variant is a function from (images, index, epoch) to normalised images. Ours draws from (seed, epoch, index), so that
it can be held against the reference bit by bit; what people write draws from the device's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fflfast
from fflfast.ops import augment_reference
from fflfast.ops.augment import IMPLEMENTATIONS, augment

from .augment_cases import MEAN, STD, AugmentCase, AugmentData
from .calls import Call, Variant, context, under

__all__ = ["PerImage", "Vectorised", "augment_variants_for", "differences", "nearest"]

SEED = 1
COMPILED_REFERENCE = "compile-reference"
# Images of a batch whose shift is searched for among all that there are.
SAMPLE = 16


class Vectorised(nn.Module):
    """The batch at once: pad as floats, then one gather of rows and columns.

    Args:
        case: what is asked for.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, case: AugmentCase) -> None:
        super().__init__()
        self.case = case
        self.layout = torch.channels_last if case.channels_last else torch.contiguous_format
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) / 255)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) / 255)

    def forward(self, images: Tensor, index: Tensor, epoch: Tensor) -> Tensor:
        x = images.float() / 255
        flipped = torch.rand(len(x), device=x.device) < 0.5
        if not self.case.pad:
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
            return self._normalised(x)
        pad, place = self.case.pad, torch.arange(self.case.size, device=x.device)
        top, left = torch.randint(2 * pad + 1, (2, len(x), 1), device=x.device)
        column = torch.where(flipped[:, None], place.flip(0), place)
        batch, channel = torch.arange(len(x), device=x.device), torch.arange(3, device=x.device)
        x = F.pad(x, (pad, pad, pad, pad), mode="reflect")
        return self._normalised(
            x[
                batch[:, None, None, None],
                channel[:, None, None],
                (top + place)[:, None, :, None],
                (left + column)[:, None, None],
            ]
        )

    def _normalised(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).to(self.case.dtype).contiguous(memory_format=self.layout)


class PerImage(Vectorised):
    """Image by image, as torchvision's transforms do, by numbers of the host, on a batch that is padded at once."""

    def forward(self, images: Tensor, index: Tensor, epoch: Tensor) -> Tensor:
        pad, size = self.case.pad, self.case.size
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the host's random numbers would be the same in every replay")
        x = images.float() / 255
        if pad:
            x = F.pad(x, (pad, pad, pad, pad), mode="reflect")
        shifts, flips = torch.randint(2 * pad + 1, (2, len(x))), torch.randint(2, (len(x),))
        moved = []
        for image, top, left, flipped in zip(x, *shifts.tolist(), flips.tolist(), strict=True):
            window = image[:, top : top + size, left : left + size]
            moved.append(window.flip(2) if flipped else window)
        return self._normalised(torch.stack(moved))


def _ours(backend: str, device: torch.device) -> Callable[[AugmentCase], Call]:
    def build(case: AugmentCase) -> Call:
        table = case.table(device)

        def call(images: Tensor, index: Tensor, epoch: Tensor) -> Tensor:
            return augment(
                images, index, seed=SEED, epoch=epoch, pad=case.pad, table=table, channels_last=case.channels_last
            )

        return under(backend, call)

    return build


def _reference(case: AugmentCase, device: torch.device) -> Call:
    """The definition, past the choice of a backend."""
    table = case.table(device)
    return lambda images, index, epoch: augment_reference.augment(
        images, index, SEED, epoch, 0, case.pad, True, table, case.channels_last
    )


def _compiled(make: Callable[[AugmentCase], Call], **options: Any) -> Callable[[AugmentCase], Call]:
    return lambda case: torch.compile(make(case), dynamic=False, fullgraph=True, **options)


def augment_variants_for(case: AugmentCase, device: torch.device, compiled: bool = True) -> list[Variant]:
    """Everything that can run a case on a device, ours first."""
    # Triton's interpreter on a CPU is for tests.
    elsewhere = ("triton",) if device.type == "cpu" else ()
    here = fflfast.backends()
    found: list[Variant] = [
        (name, _ours(name, device))
        for name in IMPLEMENTATIONS
        if name not in elsewhere and here[name] == "available"
    ]  # fmt: skip

    def vectorised(case: AugmentCase) -> Call:
        return Vectorised(case).to(device)

    found += [("eager", vectorised), ("eager-images", lambda case: PerImage(case).to(device))]
    if compiled:
        found.append(("compile", _compiled(vectorised)))
        if device.type != "cpu":
            found.append((COMPILED_REFERENCE, _compiled(lambda case: _reference(case, device))))
            if case.tuned:
                found.append(("compile-tuned", _compiled(vectorised, mode="max-autotune-no-cudagraphs")))
    return found


# ---- who is right ---------------------------------------------------------------------------------------------


def differences(case: AugmentCase, data: AugmentData, calls: Mapping[str, Call]) -> dict[str, float]:
    """The largest difference from the reference of each variant; infinite where dtype or memory order is another.

    What draws as the reference does is held against it number by number. Of the others each of the first images has to
    be one of those that the reference could have made of it.
    """
    wanted = _reference(case, data.images.device)(*data.arguments)
    found = {}
    for name, call in calls.items():
        with context(call), torch.no_grad():
            got = call(*data.arguments)
        if (got.shape, got.dtype, got.stride()) != (wanted.shape, wanted.dtype, wanted.stride()):
            found[name] = float("inf")
        elif name in IMPLEMENTATIONS or name == COMPILED_REFERENCE:
            found[name] = float((got.float() - wanted.float()).abs().max())
        else:
            found[name] = float(nearest(case, data, got)[0].max())
    return found


def nearest(case: AugmentCase, data: AugmentData, got: Tensor) -> tuple[Tensor, Tensor]:
    """The shift and flip of the first images of a result that come closest to it.

    Returns:
        float32 and int64 (n,): the largest difference from it, and its number, of 2·(2·pad + 1)² that there are.
    """
    images, pad, size = data.images[:SAMPLE], case.pad, case.size
    plain = augment_reference.normalize(images, case.table(images.device), False).float()
    padded = F.pad(plain, (pad, pad, pad, pad), mode="reflect")
    got = got[:SAMPLE].float()
    far = []
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            window = padded[:, :, top : top + size, left : left + size]
            far += [(got - shown).abs().amax((1, 2, 3)) for shown in (window, window.flip(3))]
    least = torch.stack(far).min(0)
    return least.values, least.indices
