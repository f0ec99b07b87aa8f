"""What the machine could do at best: bytes copied, products computed and kernels launched a second.

    python -m benchmarks.device                        # this machine's CPU, some seconds
    python -m benchmarks.device --device cuda --out FOLDER

These are the yardsticks of the other benchmarks, each of which measures its own again in its own run. Writes device.csv
and device.md.

- copy: bytes read and written a second by a copy of 2 GB, on a CPU of 128 MB;
- product: multiplications and additions a second of torch.mm, the better of (8192, 1024, 1024) and (8192)³, on a CPU
  (1024)³; of random numbers, since a GPU's clock is higher on constant ones;
- launch, on a GPU: the host's time to enqueue the smallest operator, one after the other; the device's time a kernel in
  a row of them; and the same inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fflfast.streams import streams_of

from . import report
from .floor import copy_rate, matrix_rate
from .measure import DeviceClock, Times, host_clock
from .options import arguments, keep_table, results, usable_device
from .report import MADE

__all__ = ["FIELDS", "figures", "main", "table"]

FIELDS = ("figure", "value", "unit", *MADE)
KERNELS = 200
ROUNDS = 21
PRODUCT = (8192, 1024, 1024)


def figures(device: torch.device) -> Iterator[tuple[str, float, str]]:
    """Yield each figure's name, its value and its unit."""
    yield "copy", copy_rate([(1 << 25,)], torch.float32, device) / 1e9, "GB/s"
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])):
        yield f"product {_name(dtype)}", matrix_rate(*PRODUCT, dtype, device) / 1e12, "TFLOP/s"
    if device.type == "cuda":
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield "product tf32", matrix_rate(*PRODUCT, torch.float32, device) / 1e12, "TFLOP/s"
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        for name, times in _launches(device).items():
            yield name, 1e6 * times.median, "µs"


def _launches(device: torch.device) -> dict[str, Times]:
    """Times a kernel, of a row of the smallest ones."""
    number = torch.zeros(1, device=device)

    def row() -> None:
        for _ in range(KERNELS):
            number.add_(1)

    row()
    torch.cuda.synchronize(device)
    host = []
    for _ in range(ROUNDS):
        host.append(host_clock(row) / KERNELS)
        torch.cuda.synchronize(device)
    clock = DeviceClock(sum(host) / ROUNDS * KERNELS)
    replay = streams_of(number.device).record(row)
    replay()
    return {
        "launch, host": Times.of(host),
        "launch, device": Times.of([clock(row) / KERNELS for _ in range(ROUNDS)]),
        "launch in a graph, device": Times.of([clock(replay) / KERNELS for _ in range(ROUNDS)]),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: list[report.Row]) -> str:
    """Return the figures in Markdown."""
    lines = [(row["figure"], f"{float(row['value']):.4g} {row['unit']}") for row in rows]
    return f"{report.markdown(('what', 'measured'), lines)}\n\nMedians, of products the best. {report.made_with(rows)}"


def main() -> int:
    """Measure, write the files; returns the exit code."""
    options = arguments("device", __doc__).parse_args()
    device = usable_device("device", options)
    if device is None:
        return 1
    made = report.provenance(device, "benchmarks.device")
    file = results(options, device, "device")
    rows = [{"figure": figure, "value": value, "unit": unit, **made} for figure, value, unit in figures(device)]
    report.write(file, rows, FIELDS)
    keep_table(file, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
