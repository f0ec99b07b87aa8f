"""The record of a run: metrics.jsonl (intervals and epochs), metrics.csv (one row an epoch), TensorBoard if asked."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cohort import StepOutput
from .config import ConfigError
from .processes import SINGLE, Processes

__all__ = ["Interval", "Means", "MetricLog", "read_records", "summary_writer"]


_COUNTS = 3

_RECORD = {"kind": str, "epoch": int, "step": int}
"""What every record has, besides its values."""


class MetricLog:
    """Appends records to a run's folder; a resumed run first drops what the interrupted one wrote after its checkpoint.

    Args:
        folder: the run's folder.
        epoch: where the run stands: epochs finished …
        step: … and steps taken in all.
        tensorboard: write events to FOLDER/tensorboard as well.
    """

    def __init__(self, folder: Path, *, epoch: int = 0, step: int = 0, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        kept = [r for r in read_records(path) if (r["epoch"] < epoch if r["kind"] == "epoch" else r["step"] <= step)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(path)
        self._jsonl = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._file = open(folder / "metrics.csv", "w", encoding="utf-8", newline="")  # noqa: SIM115
        self._csv: csv.DictWriter | None = None
        for record in kept:
            if record["kind"] == "epoch":
                self._write_row(record)
        self._writer: Any = None
        if tensorboard:
            self._writer = summary_writer()(str(folder / "tensorboard"), purge_step=step)

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Append one record; ``kind`` is "train" (an interval of steps) or "epoch" (with the test result)."""
        record = {"kind": kind, "epoch": epoch, "step": step, **values}
        self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
        self._jsonl.flush()
        if kind == "epoch":
            self._write_row(record)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def _write_row(self, record: dict[str, Any]) -> None:
        row = {key: value for key, value in record.items() if key != "kind"}
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, list(row), extrasaction="ignore")
            self._csv.writeheader()
        self._csv.writerow(row)
        self._file.flush()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._jsonl.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, none where there is no file; lines cut short or damaged are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and all(isinstance(record.get(k), t) for k, t in _RECORD.items()):
            records.append(record)
    return records


def summary_writer() -> Any:
    """Return the class that writes TensorBoard events; ConfigError where that package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(f"--tensorboard needs: pip install tensorboard ({error})") from error
    return SummaryWriter


class Interval(NamedTuple):
    """What happened in an interval of steps.

    Attributes:
        means: of loss and terms over all images that count, empty if none does.
        steps: how many were taken …
        skipped: … and how many of them were left out, since loss or gradients were not finite.
    """

    means: dict[str, float]
    steps: int
    skipped: int


class Means:
    """Means over images of the loss and its terms, summed on the device, in place, until they are read.

    Args:
        names: of the loss and its terms.
        device: where to sum, so that the memory is there before the first step; None: where the first loss lies.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device | str | None = None) -> None:
        self.names = names
        self._block: Tensor | None = None
        self._totals = [0.0] * len(names)
        self._total_images = 0
        if device is not None:
            self._allocate(device)

    def _allocate(self, device: torch.device | str) -> Tensor:
        # Counts and sums lie in one block, so that the host gets both, exact, by one copy.
        self._block = torch.zeros(_COUNTS + (len(self.names) + 1) // 2, dtype=torch.int64, device=device)
        return self._block

    def _parts(self, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images that count, steps, and skipped ones among them, int64 (), and the sums, float32 (names,)."""
        images, steps, skipped = block[:_COUNTS].unbind()
        return images, steps, skipped, block[_COUNTS:].view(torch.float32)[: len(self.names)]

    def update(self, output: StepOutput, images: int, bad: Tensor | None = None) -> None:
        """Add one step of so many images; where ``bad``, a 0-dim bool, only count it as skipped."""
        values = torch.cat([output.loss.detach().reshape(1), output.terms]) * images
        block = self._allocate(values.device) if self._block is None else self._block
        counted, steps, skipped, sums = self._parts(block)
        steps.add_(1)
        if bad is None:
            counted.add_(images)
        else:
            values = values.masked_fill(bad, 0.0)
            counted.add_(~bad, alpha=images)
            skipped.add_(bad)
        sums.add_(values)

    def tensors(self) -> list[Tensor]:
        """Return what `update` changes."""
        return [] if self._block is None else [self._block]

    def peek(self, processes: Processes = SINGLE) -> Interval:
        """Return what happened since the last `read`; waits for the device.

        Args:
            processes: over whose images the means are; each of them calls this, and all get the same.
        """
        images, steps, skipped, sums = self._look(processes)
        return Interval(self._means(images, sums), steps, skipped)

    def read(self, processes: Processes = SINGLE) -> Interval:
        """Return what happened since the last call, as `peek` does, and begin anew."""
        images, steps, skipped, sums = self._look(processes)
        self._totals = [total + value for total, value in zip(self._totals, sums, strict=True)]
        self._total_images += images
        if self._block is not None:
            self._block.zero_()
        return Interval(self._means(images, sums), steps, skipped)

    def epoch_means(self) -> dict[str, float]:
        """Return the means over all that was read since `reset`, empty if no step counts."""
        return self._means(self._total_images, self._totals)

    def reset(self) -> None:
        """Begin anew, as if nothing had been counted."""
        self._totals, self._total_images = [0.0] * len(self.names), 0
        if self._block is not None:
            self._block.zero_()

    def _look(self, processes: Processes = SINGLE) -> tuple[int, int, int, list[float]]:
        """Bring counts and sums to the host."""
        if self._block is None:
            return 0, 0, 0, [0.0] * len(self.names)
        block = self._block
        if processes.count > 1:
            block = block.clone()
            images, _, _, sums = self._parts(block)
            processes.sum_([images, sums])  # the steps are the same everywhere
        images, steps, skipped, sums = self._parts(block.cpu())
        return int(images), int(steps), int(skipped), sums.tolist()

    def _means(self, images: int, sums: list[float]) -> dict[str, float]:
        return {name: value / images for name, value in zip(self.names, sums, strict=True)} if images else {}

    def state(self) -> dict[str, Any]:
        """Return this process's state as JSON values, exact; waits for the device."""
        images, steps, skipped, sums = self._look()
        return {
            "sums": sums,
            "images": images,
            "steps": steps,
            "skipped": skipped,
            "totals": list(self._totals),
            "total_images": self._total_images,
        }

    @staticmethod
    def share(states: Sequence[Mapping[str, Any]], rank: int, count: int) -> dict[str, Any]:
        """Return what process ``rank`` of ``count`` loads of the states that processes saved, one each.

        As many processes as then get their own back; of another number the first takes all images.
        """
        if len(states) == count:
            return dict(states[rank])
        sums = [math.fsum(values) for values in zip(*(state["sums"] for state in states), strict=True)]
        all_images = {"sums": sums, "images": sum(state["images"] for state in states)}
        return {**states[0], **(all_images if rank == 0 else {"sums": [0.0] * len(sums), "images": 0})}

    def load(self, state: Mapping[str, Any], device: torch.device | str | None = None) -> None:
        """Put back what `state` returned, in place; ``device`` says where to sum if no step has said it yet."""
        self._totals, self._total_images = list(state["totals"]), state["total_images"]
        block = self._allocate(device or "cpu") if self._block is None else self._block
        images, steps, skipped, sums = self._parts(block)
        images.fill_(state["images"])
        # Version 0.1 counted no steps, and had no sums where no step was taken since the last record.
        steps.fill_(state.get("steps", 0))
        skipped.fill_(state.get("skipped", 0))
        sums.copy_(torch.tensor(state["sums"] or [0.0] * len(self.names), dtype=torch.float32))
