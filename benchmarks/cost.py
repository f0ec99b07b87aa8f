"""What a step of each method costs: its time over that of the same networks alone.

    OMP_NUM_THREADS=1 python -m benchmarks.cost                 # this machine's CPU, some minutes
    python -m benchmarks.cost --device cuda --arch resnet32 --batch-size 128

Every method with the networks that it is meant for (KD one, OKDDip two peers and a leader, OEM a second one of half
the width, all others two), each step as `fflfast train` takes it: views, memory bank, discriminators, averaged peers
and optimizers included, λ as after the ramp-up. The floor are the same networks, sharing the same layers, with
cross-entropy alone on one view. Method and floor live in processes of their own and take turns, a block of steps each;
medians of the blocks. The measurement is that of `fflfast bench train --method NAME --variants serial,floor`.

Writes cost.csv and the table between the two markers of docs/methods.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fflfast import methods, models
from fflfast.bench import measure
from fflfast.training import ConfigError, TrainConfig, resolve
from fflfast.training.build import open_bundle

from . import matrix, report
from .matrix import CLASSIFICATION, Document
from .options import arguments, results, usable_device
from .report import MADE

__all__ = ["FIELDS", "main", "run", "table"]

FIELDS = (
    "method", "arch", "batch", "image_size", "amp", "step_ms", "p20_ms", "p80_ms", "floor_ms", "over_floor_percent",
    "images_per_second", "peak_mb", "floor_peak_mb", "steps", "not_measured", *MADE,
)  # fmt: skip
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def row_of(name: str, teacher: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one method."""
    arch = [options.arch] * matrix.networks(name)
    config = TrainConfig(
        data=options.data, arch=arch, method=name, batch_size=options.batch_size, amp=options.amp, epochs=1,
        device=options.device, channels_last=True, plan=options.plan,
        teacher=str(teacher) if methods.resolve(name).needs_teacher else None,
    )  # fmt: skip
    resolved = resolve(config).config
    result = measure(resolved, steps=options.steps, variants=(options.plan, "floor"))
    row: dict[str, Any] = {
        "method": name, "arch": " ".join(resolved.arch), "batch": resolved.batch_size,
        "image_size": resolved.image_size, "amp": resolved.amp, "steps": result.steps,
    }  # fmt: skip
    for measured in result.rows:
        figures = result.figures(measured)
        if measured.variant.loop == "floor":
            row |= {"floor_ms": figures["step_ms"], "floor_peak_mb": figures["peak_mb"]}
        else:
            row |= {key: figures[key] for key in ("step_ms", "p20_ms", "p80_ms", "images_per_second", "peak_mb")}
            row["over_floor_percent"] = figures["overhead_percent"]
    row["not_measured"] = "; ".join(reason for plan, reason in result.refused.items() if plan == options.plan)
    return {key: "" if value is None else value for key, value in row.items()}


def table(rows: Sequence[dict[str, str]]) -> str:
    """The table between the markers."""
    lines = []
    for row in rows:
        if row["not_measured"]:
            lines.append((f"`{row['method']}`", row["arch"], f"not measured: {row['not_measured']}", *"–––––"))
            continue
        lines.append((
            f"`{row['method']}`",
            row["arch"],
            f"{float(row['step_ms']):.4g} ({float(row['p20_ms']):.4g} … {float(row['p80_ms']):.4g})",
            report.value(row, "floor_ms", "{:.4g}"),
            report.value(row, "over_floor_percent", "{:+.0f} %"),
            report.value(row, "images_per_second", "{:,.0f}"),
            report.value(row, "peak_mb", "{:,.0f}"),
            report.value(row, "floor_peak_mb", "{:,.0f}"),
        ))  # fmt: skip
    head = (
        "method", "networks", "ms a step (20th … 80th percentile)", "the networks alone", "over them", "images/s",
        "peak MB", "alone",
    )  # fmt: skip
    first = rows[0]
    about = (
        f"Batch {first['batch']}, {first['image_size']}×{first['image_size']}, {first['amp']}, {first['steps']} steps."
    )
    return "\n\n".join([report.markdown(head, lines), f"{about} {report.made_with(rows[0:1])}"])


def main() -> int:
    """Measure the methods that are asked for; returns the exit code."""
    parser = arguments("cost", __doc__)
    parser.add_argument("--only", help=f"methods, of {','.join(CLASSIFICATION)} (default: all)")
    parser.add_argument("--arch", default="resnet32", help="of every network (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"), help="default: off")
    parser.add_argument("--plan", default="serial", choices=("serial", "streams", "graph"), help="default: serial")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="to write (default: docs/methods.md)")
    parser.set_defaults(data="synthetic")
    options = parser.parse_args()
    return run(options, matrix.chosen(parser, "--only", options.only, CLASSIFICATION))


def run(options: argparse.Namespace, names: Sequence[str]) -> int:
    """Do what `main` was asked for."""
    device = usable_device("cost", options)
    if device is None:
        return 1
    document = Document(options.document, "cost")
    file = results(options, device, "cost")
    made = report.provenance(device, "benchmarks.cost")
    kept = {row["method"]: row for row in report.read(file)} if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = _untrained(options, Path(folder) / "teacher.safetensors")
        for name in names:
            print(name, flush=True)
            try:
                kept[name] = {**row_of(name, teacher, options), **made}
            except ConfigError as error:
                print(f"benchmarks.cost: {name}: {error}", file=sys.stderr)
                return 1
            rows = [kept[other] for other in CLASSIFICATION if other in kept]
            report.write(file, rows, FIELDS)  # after each method: what is measured is kept, whatever comes
            document.write(table(report.read(file)))
    print(table(report.read(file)))
    return 0


def _untrained(options: argparse.Namespace, path: Path) -> Path:
    """Write a network of the kind that is measured: a teacher costs the same whatever it knows."""
    data = open_bundle(TrainConfig(data=options.data))
    network = models.create(options.arch, data.num_classes)
    facts = {
        "data": data.name, "image_size": data.image_size, "class_names": list(data.class_names),
        "mean": list(data.mean), "std": list(data.std),
    }  # fmt: skip
    return models.export_sub_network(network, None, path, metadata=facts)


if __name__ == "__main__":
    raise SystemExit(main())
