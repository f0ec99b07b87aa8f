"""What the machine could do at best, measured in the same run: bytes copied and products computed a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from .measure import DeviceClock, host_clock

__all__ = ["copy_rate", "matrix_rate"]


def copy_rate(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> float:
    """Bytes read and written a second when tensors are copied into memory that is already there.

    On a CPU tensors of these shapes are copied; on a GPU it is the rate of a copy of 4 GB, because a small copy
    measures its launch.
    """
    if device.type == "cpu":
        source = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    else:
        source = [torch.zeros(1 << 31, dtype=torch.uint8, device=device)]
    target = [torch.ones_like(t) for t in source]

    def copy() -> None:
        for a, b in zip(source, target, strict=True):
            b.copy_(a)

    return sum(2 * t.nbytes for t in source) / statistics.median(_seconds(copy, device))


def matrix_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions a second of torch.mm: the best of this size and of a large square one."""
    large = 1024 if device.type == "cpu" else 8192
    rates = []
    for m, k, n in ((rows, inner, columns), (large, large, large)):
        # Random numbers: a GPU's clock is higher while it multiplies ones.
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        product = torch.empty(m, n, dtype=dtype, device=device)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, product: torch.Tensor = product) -> None:
            torch.mm(a, b, out=product)

        rates.append(2.0 * m * k * n / min(_seconds(multiply, device)))
    return max(rates)


def _seconds(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of a piece of work, each a mean over a millisecond or more."""
    clock: Callable[[Callable[[], object]], float] = host_clock if device.type == "cpu" else DeviceClock(1e-4)
    estimate = min(clock(work) for _ in range(3))
    n = max(1, round(1e-3 / estimate))

    def many() -> None:
        for _ in range(n):
            work()

    return [clock(many) / n for _ in range(9 if estimate > 0.1 else 25)]
