"""Many tensors laid end to end, so that a copy, a choice or a mean of all of them takes a few launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Packed"]


class Packed:
    """Tensors that stay where they are, read and written as one flat tensor a dtype.

    A flat tensor holds each in its own memory order (channels last, say), so that neither way reorders anything.

    Args:
        tensors: by name, all on one device. Their memory is looked up once: afterwards they may change in place only.

    Attributes:
        dtypes: one a flat tensor, in the order of `read`.

    Raises:
        ValueError: a tensor that does not fill its memory without gaps and overlaps, such as an expanded one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: dict[torch.dtype, dict[str, Tensor]] = {}
        self._flat: dict[torch.dtype, list[Tensor]] = {}
        for name, tensor in tensors.items():
            ordered = _in_memory_order(tensor.detach())
            if not ordered.is_contiguous():
                raise ValueError(
                    f"{name}: expected a tensor without gaps or overlaps in memory, got strides {tensor.stride()} for "
                    f"shape {tuple(tensor.shape)}; keep a contiguous one"
                )
            self._tensors.setdefault(tensor.dtype, {})[name] = tensor
            self._flat.setdefault(tensor.dtype, []).append(ordered.view(-1))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype of each flat tensor."""
        return tuple(self._flat)

    @torch.no_grad()
    def read(self, out: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return flat copies (total,), one a dtype; into ``out`` where given."""
        if out is None:
            return [torch.cat(parts) for parts in self._flat.values()]
        return [torch.cat(parts, out=flat) for parts, flat in zip(self._flat.values(), out, strict=True)]

    @torch.no_grad()
    def write(self, flats: Sequence[Tensor]) -> None:
        """Copy flat tensors, as `read` returns them, into the tensors in place."""
        for parts, flat in zip(self._flat.values(), flats, strict=True):
            torch._foreach_copy_(parts, flat.split([len(part) for part in parts]))

    def views(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return views of flat tensors by name, each in the shape and memory order of its tensor."""
        views = {}
        for tensors, flat in zip(self._tensors.values(), flats, strict=True):
            start = 0
            for name, tensor in tensors.items():
                views[name] = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + start)
                start += tensor.numel()
        return views


def _in_memory_order(tensor: Tensor) -> Tensor:
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
