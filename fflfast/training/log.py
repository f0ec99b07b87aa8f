"""The record of a run: metrics.jsonl (intervals and epochs), metrics.csv (one row an epoch), TensorBoard if asked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..cohort import StepOutput
from .config import ConfigError

__all__ = ["Means", "MetricLog", "read_records", "summary_writer"]


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


class Means:
    """Means over images of the loss and its terms, summed on the device until they are read."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: Tensor | None = None
        self._images = 0
        self._totals = [0.0] * len(names)
        self._total_images = 0

    def update(self, output: StepOutput, images: int) -> None:
        """Add one step of so many images."""
        values = torch.cat([output.loss.detach().reshape(1), output.terms]) * images
        self._sums = values if self._sums is None else self._sums + values
        self._images += images

    def peek(self) -> dict[str, float]:
        """Return the means since the last `read`, empty if there was no step; waits for the device."""
        if self._sums is None:
            return {}
        return dict(zip(self.names, (value / self._images for value in self._sums.tolist()), strict=True))

    def read(self) -> dict[str, float]:
        """Return the means since the last call and begin anew; waits for the device."""
        means = self.peek()
        for i, value in enumerate(means.values()):
            self._totals[i] += value * self._images
        self._total_images += self._images
        self._sums, self._images = None, 0
        return means

    def epoch_means(self) -> dict[str, float]:
        """Return the means over all that was read."""
        return {name: total / self._total_images for name, total in zip(self.names, self._totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, exact."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"sums": sums, "images": self._images, "totals": self._totals, "total_images": self._total_images}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Put back what `state` returned."""
        self._sums = None if state["sums"] is None else torch.tensor(state["sums"], device=device)
        self._images, self._totals, self._total_images = state["images"], state["totals"], state["total_images"]
