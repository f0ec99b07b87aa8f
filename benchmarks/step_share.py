"""What share of a whole FFL step the fusion module and the loss take, on plain PyTorch and on the kernels.

    python -m benchmarks.step_share                        # this machine's CPU, about two minutes
    python -m benchmarks.step_share --device cuda --out FOLDER

The step is the trainer's: two ResNet-32 on a shared trunk, 128 images of 32 × 32, 100 classes; augmentation, forward,
loss, backward, optimizer. "before" is the reference backend, "after" what is chosen here by itself. Times come from
torch.profiler: of the host where the CPU computes, of the kernels on a GPU. A part's backward is the time of the
autograd nodes that its forward made. Steps of all configurations take turns; medians.

Writes step_share.csv and step_share.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import fflfast
from fflfast.data import Batch
from fflfast.methods import base
from fflfast.ops.augment import normalization_table
from fflfast.tasks import Classification
from fflfast.training import TrainConfig, resolve
from fflfast.training.build import build_learner
from fflfast.training.step import TrainStep

from . import report
from .options import arguments, keep_table, results, usable_device
from .report import MADE

__all__ = ["PARTS", "Setup", "main", "profiled_step"]

PARTS = ("fusion", "loss")
STEP = "share of a step: step"
NODE = "autograd::engine::evaluate_function: "
FIELDS = (
    "layout", "backend", "fusion_backend", "part", "forward_ms", "backward_ms", "total_ms", "share", "step_ms", "steps",
    "batch", "arch", "amp", *MADE,
)  # fmt: skip


def _range(part: str) -> str:
    return f"share of a step: {part}"


@dataclass
class Nodes:
    """The autograd nodes that each part's forward made in a step, by their sequence numbers."""

    of: dict[str, set[int]] = field(default_factory=lambda: {part: set() for part in PARTS})

    def add(self, part: str, outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        """Everything between inputs and outputs, what accumulates into parameters left out."""
        seen = {x.grad_fn for x in inputs} | {None}
        waiting = [y.grad_fn for y in outputs]
        while waiting:
            node = waiting.pop()
            if node in seen or hasattr(node, "variable"):
                continue
            seen.add(node)
            self.of[part].add(node._sequence_nr())  # type: ignore[union-attr]
            waiting += [n for n, _ in node.next_functions]  # type: ignore[union-attr]


def _fusion(step: TrainStep) -> Any:
    method: Any = step.learner.method
    return method.fusion


@contextmanager
def _marked(step: TrainStep) -> Iterator[Nodes]:
    """Put both parts' forwards into ranges of the profile and note the nodes that they make."""
    nodes = Nodes()

    def marked(part: str, function: Callable[..., Any], output: Callable[[Any], Tensor]) -> Callable[..., Any]:
        def run(tensors: Any, *arguments: Any, **options: Any) -> Any:
            with record_function(_range(part)):
                result = function(tensors, *arguments, **options)
            nodes.add(part, [output(result)], tensors)
            return result

        return run

    fusion = _fusion(step)
    with (
        mock.patch.object(fusion, "forward", marked("fusion", fusion.forward, lambda z: z)),
        mock.patch.object(base, "distill_loss", marked("loss", base.distill_loss, lambda output: output.loss)),
    ):
        yield nodes


@dataclass
class Setup:
    """One configuration: a step in one memory order on one backend."""

    layout: str
    backend: str  # before or after
    step: TrainStep
    batch: Batch
    samples: list[dict[str, float]] = field(default_factory=list)

    @property
    def forced(self) -> str:
        return "reference" if self.backend == "before" else "auto"

    def run(self) -> None:
        """Take one step."""
        with fflfast.use_backend(self.forced), record_function(STEP):
            self.step(self.batch, epoch=0, step=0)

    def fusion_backend(self) -> str:
        """Whose kernels the fusion runs on."""
        from fflfast.ops.fusion_backends import IMPLEMENTATIONS, choose_stages

        channels = _fusion(self.step).in_channels[0]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.step.config.amp, torch.float32)
        like = torch.zeros(1, channels, 8, 8, dtype=dtype, device=self.step.device)
        with fflfast.use_backend(self.forced):
            chosen = choose_stages([like])
        return next(name for name, one in IMPLEMENTATIONS.items() if one is chosen)


def setup(layout: str, backend: str, device: torch.device, arch: str, batch: int, amp: Any) -> Setup:
    """The step as `fflfast train` builds it."""
    config = TrainConfig(
        data="synthetic", image_size=32, arch=[arch, arch], method="ffl", batch_size=batch, device=str(device), amp=amp,
        channels_last=layout == "channels_last",
    )  # fmt: skip
    resolved = resolve(config).config
    classes = 100
    learner = build_learner(resolved, classes).to(device)
    if resolved.channels_last:
        learner.to(memory_format=torch.channels_last)
    learner.train()
    table = normalization_table((127.5,) * 3, (64.0,) * 3)
    step = TrainStep(learner, Classification(classes, pad=resolved.pad, flip=resolved.flip), table, resolved, device)
    step.set_schedule(learning_rate=0.01, kl_weight=1.0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    target = torch.randint(classes, (batch,), generator=generator)
    return Setup(layout, backend, step, Batch(images.to(device), target.to(device), torch.arange(batch, device=device)))


def profiled_step(setup: Setup) -> dict[str, float]:
    """Milliseconds of the step and of each part's forward and backward."""
    on_gpu = setup.step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _marked(setup.step) as nodes, profile(activities=activities) as prof:
        setup.run()
        if on_gpu:
            torch.cuda.synchronize()
    events: Any = prof.events()
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]

    def spent(event: Any) -> float:
        return (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3

    found = {f"{part} {way}": 0.0 for part in PARTS for way in ("forward", "backward")}
    for event in host:
        for part in PARTS:
            if event.name == _range(part):
                found[f"{part} forward"] += spent(event)
            elif event.name.startswith(NODE) and event.sequence_nr in nodes.of[part]:
                found[f"{part} backward"] += spent(event)
    if on_gpu:
        # The backward runs in a thread of its own, outside the step's range.
        kernels = (e for e in events if e.device_type != torch.autograd.DeviceType.CPU)
        found["step"] = sum(e.time_range.elapsed_us() for e in kernels if not getattr(e, "is_user_annotation", False))
        found["step"] /= 1e3
    else:
        found["step"] = sum(spent(event) for event in host if event.name == STEP)
    return found


def rows_of(one: Setup) -> list[dict[str, Any]]:
    """A row a part."""
    fusion_backend = one.fusion_backend()
    median = {key: statistics.median(s[key] for s in one.samples) for key in one.samples[0]}
    rows = []
    for part in PARTS:
        totals = [s[f"{part} forward"] + s[f"{part} backward"] for s in one.samples]
        rows.append({
            "layout": one.layout, "backend": one.backend, "fusion_backend": fusion_backend, "part": part,
            "forward_ms": median[f"{part} forward"], "backward_ms": median[f"{part} backward"],
            "total_ms": statistics.median(totals), "step_ms": median["step"], "steps": len(one.samples),
            "share": statistics.median(t / s["step"] for t, s in zip(totals, one.samples, strict=True)),
            "batch": one.step.config.batch_size, "arch": " ".join(one.step.config.arch), "amp": one.step.config.amp,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """A line a memory order, before and after."""
    head = [
        "memory order",
        "",
        "step",
        *(f"{part}: forward + backward" for part in PARTS),
        *(f"{p}, share" for p in PARTS),
    ]
    lines = []
    for key in dict.fromkeys((row["layout"], row["backend"]) for row in rows):
        here = {row["part"]: row for row in rows if (row["layout"], row["backend"]) == key}
        first = here[PARTS[0]]
        lines.append([
            key[0], f"{key[1]} ({first['fusion_backend']})", f"{float(first['step_ms']):.4g} ms",
            *(f"{float(here[p]['forward_ms']):.3g} + {float(here[p]['backward_ms']):.3g} ms" for p in PARTS),
            *(f"{100 * float(here[p]['share']):.2g} %" for p in PARTS),
        ])  # fmt: skip
    first = rows[0]
    what = f"{first['arch']} on a shared trunk, batch {first['batch']}, amp {first['amp']}, {first['steps']} steps"
    return f"{report.markdown(head, lines)}\n\nMedians, {what}. {report.made_with(rows)}"


def main() -> int:
    parser = arguments("step_share", __doc__)
    parser.add_argument("--steps", type=int, default=15, help="profiled steps of each configuration (default: 15)")
    parser.add_argument("--batch", type=int, default=128, help="images in a step (default: 128)")
    parser.add_argument("--arch", default="resnet32", help="of both sub-networks (default: resnet32)")
    parser.add_argument(
        "--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="as fflfast train has it"
    )
    options = parser.parse_args()
    device = usable_device("step_share", options)
    if device is None:
        return 1
    setups = [
        setup(layout, backend, device, options.arch, options.batch, options.amp)
        for layout in ("channels_last", "nchw")
        for backend in ("before", "after")
    ]
    for one in setups:
        for _ in range(3):
            one.run()
    for _ in range(options.steps):
        for one in setups:
            one.samples.append(profiled_step(one))
    made = report.provenance(device, "benchmarks.step_share")
    file = results(options, device, "step_share")
    report.write(file, [{**row, **made} for one in setups for row in rows_of(one)], FIELDS)
    keep_table(file, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
