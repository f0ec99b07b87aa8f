"""A picture of one training step on a GPU: which kernel runs when, on which stream, under each plan.

    python -m benchmarks.train.timeline --out FOLDER               # a GPU, some minutes
    python -m benchmarks.train.timeline --case "2 × ResNet-32"     # cases of benchmarks.train by a part of their names

By default each cohort of `benchmarks.train` in bfloat16, channels-last, at its first batch size. One picture a case, a
panel a plan, a row a stream. Kernels are coloured by the part of the step that asked for them, and by what they do
where that is not known, as in a graph, whose kernels all come of one launch. Its executor chooses streams of its own:
where there are more than a few, their kernels are packed into as many rows as ran at once.

The figures: `step` is the time of a step without the profiler, over blocks of steps, which prepare each other; the rest
is of the step in the picture, which runs alone and under the profiler, whose cost the host pays: where kernels are
short the gaps between them are wider than they otherwise are. `overlap` is the sum of the times of all kernels, copies
and fills ÷ the time in which at least one ran.

Writes timeline.csv, timeline.md and timeline-CASE.png. Needs matplotlib for the pictures.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fflfast.bench import Variant, subject
from fflfast.bench.subject import Job, opened
from fflfast.cohort import Learner
from fflfast.execution import PLANS
from fflfast.training import ConfigError, resolve

from .. import report
from ..measure import Times
from ..options import arguments, keep_table, results
from ..report import MADE
from .cases import Case, cases
from .timeline_picture import Panel, draw
from .trace import PREFIX, UNKNOWN, Figures, figures_of, kernels_of, kind_of, parts_of

__all__ = ["FIELDS", "main", "marked", "panel_of", "recorded", "table", "traced"]

FIELDS = (
    "case", "arch", "classes", "image_size", "batch", "plan", "step_ms", "p20_ms", "p80_ms",
    *(field.name for field in dataclasses.fields(Figures)), "coloured_by", "not_measured", "picture", *MADE,
)  # fmt: skip
# Timed blocks of steps, and profiled steps after one that warms the profiler up.
BLOCKS, STEPS, TRACES = 5, 5, 3

Events = list[dict[str, Any]]


# ---- recording ------------------------------------------------------------------------------------------------


@contextmanager
def marked(learner: Learner) -> Iterator[None]:
    """Put trunk, sub-networks, and fusion with loss into ranges of the profile, compiled or not."""
    cohort, method = learner.cohort, learner.method
    runner, count = cohort.runner, len(cohort)

    def run(thunks: Sequence[Callable[[], Any]]) -> list[Any]:
        parts = [f"sub-network {k}" if k < count else "beside" for k in range(len(thunks))]
        return runner([_ranged(part, thunk) for part, thunk in zip(parts, thunks, strict=True)])

    with (
        mock.patch.object(cohort, "runner", run),
        mock.patch.object(cohort, "forward", _ranged("trunk", cohort.forward)),
        mock.patch.object(method, "forward", _ranged("fusion and loss", method.forward)),
    ):
        yield


def _ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*arguments, **options)

    return run


def traced(action: Callable[[], object], device: torch.device) -> Events:
    """Return the events of the Chrome trace of an action, until the device is done with it."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"]


def recorded(job: Job) -> tuple[Times, Events]:
    """Return the time of a step and the trace of one, that whose span is the median of some.

    Raises:
        ConfigError: a loop that does not exist for these settings.
        RuntimeError: a plan that cannot run here.
    """
    device, learners = torch.device(job.config.device), []
    build = subject.build_learner

    def keep(*arguments: Any, **options: Any) -> Learner:
        learners.append(build(*arguments, **options))
        return learners[0]

    with mock.patch.object(subject, "build_learner", keep), opened(job) as steps:
        traced(lambda: None, device)  # CUPTI tells the kernels of a graph only if it was there before the graph
        steps.warm_up()
        times = Times.of([steps.block(STEPS) for _ in range(BLOCKS)])
        with marked(learners[0]):
            traces = [traced(lambda: steps.take(steps.pool[0]), device) for _ in range(1 + TRACES)]
    spans = [figures_of(kernels_of(events)).span_ms for events in traces[1:]]
    return times, traces[1 + spans.index(statistics.median_low(spans))]


# ---- results --------------------------------------------------------------------------------------------------


def panel_of(plan: str, events: Events) -> Panel:
    """Return what is drawn of a step: by parts where most kernels have one, by kinds otherwise."""
    kernels = kernels_of(events)
    parts = list(parts_of(events, kernels))
    if 2 * parts.count(UNKNOWN) < len(parts):
        return Panel(plan, kernels, parts, "part")
    return Panel(plan, kernels, list(map(kind_of, kernels)), "kind")


def _measured(case: Case, plan: str, device: torch.device) -> tuple[Panel | None, dict[str, Any]]:
    """The panel of a plan and its row's own columns; no panel, and the reason in the row, where it does not run."""
    try:
        config = resolve(case.config(device)).config
        job = Job(Variant("ours", plan, case.compile), config, case.classes, torch.get_num_threads())
        times, events = recorded(job)
    except (ConfigError, RuntimeError) as error:
        return None, {"not_measured": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    panel = panel_of(plan, events)
    if not panel.kernels:
        reason = "the profiler saw no kernel; it needs CUPTI and the right to profile"
        return None, {"not_measured": reason}
    figures = figures_of(panel.kernels)
    panel = dataclasses.replace(panel, title=_line(plan, times, figures))
    return panel, {
        "step_ms": 1e3 * times.median, "p20_ms": 1e3 * times.p20, "p80_ms": 1e3 * times.p80,
        **dataclasses.asdict(figures), "coloured_by": panel.coloured_by,
    }  # fmt: skip


def _line(plan: str, times: Times, figures: Figures) -> str:
    return (
        f"{plan}: step {1e3 * times.median:.3g} ms; in the picture {figures.span_ms:.3g} ms, on {figures.streams} "
        f"streams {figures.kernels} kernels, copies and fills of {figures.kernel_ms:.3g} ms, overlap "
        f"{figures.overlap:.2f}; two streams or more run in {100 * figures.two_streams:.0f} % of it, two kernels or "
        f"more in {100 * figures.two_kernels:.0f} %"
    )


def table(rows: list[report.Row]) -> str:
    """Return a picture and a Markdown table a case."""
    head = (
        "plan", "ms a step (20th … 80th percentile)", "ms in the picture", "ms of all kernels", "overlap",
        "two streams or more", "two kernels or more", "kernels", "streams", "coloured by",
    )  # fmt: skip
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        ran = [row for row in here if not row["not_measured"]]
        parts.append(f"### {case}")
        if ran:
            picture = ran[0]["picture"]
            parts += [f"![{case}]({picture})"] * bool(picture) + [report.markdown(head, map(_cells, ran))]
        notes = [f"- {row['plan']} not measured: {row['not_measured']}" for row in here if row["not_measured"]]
        parts += ["\n".join(notes)] * bool(notes)
    return "\n\n".join([*parts, report.made_with(rows)])


def _cells(row: report.Row) -> tuple[str, ...]:
    times = "{} ({} … {})".format(*(report.value(row, f"{key}_ms", "{:.4g}") for key in ("step", "p20", "p80")))
    shares = (f"{100 * float(row[key]):.0f} %" for key in ("two_streams", "two_kernels"))
    return (
        row["plan"], times, report.value(row, "span_ms", "{:.4g}"), report.value(row, "kernel_ms", "{:.4g}"),
        report.value(row, "overlap", "{:.2f}"), *shares, row["kernels"], row["streams"], row["coloured_by"],
    )  # fmt: skip


def _chosen(device: torch.device, parts: Sequence[str] | None) -> list[Case]:
    if parts is None:
        usual = [case for case in cases(device) if case.amp == "bf16" and case.channels_last and not case.compile]
        return list({case.label: case for case in reversed(usual)}.values())[::-1]  # the first batch size of each
    return [case for case in cases(device) if any(part in case.name for part in parts)]


def _file(case: Case) -> str:
    words = "".join(c if c.isalnum() else " " for c in case.name.lower()).split()
    return f"timeline-{'-'.join(words)}.png"


def _drawn(file: Path, case: Case, panels: list[Panel], device: str) -> str:
    """Draw and return the name of the file; empty where there is nothing to draw, or nothing to draw with."""
    if not panels:
        return ""
    try:
        draw(file, f"{case.name}: {device}", panels)
    except ImportError:
        print("matplotlib is not installed: no picture")
        return ""
    return file.name


def main() -> int:
    """Record every case that is asked for under each plan; returns the exit code."""
    parser = arguments("train.timeline", __doc__, device="cuda")
    parser.add_argument("--case", action="append", help="a part of a case's name; may be given again")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        reason = "no CUDA device" if device.type == "cuda" else f"{options.device} has no streams; take --device cuda"
        print(f"benchmarks.train.timeline: {reason}", file=sys.stderr)
        return 1
    file = results(options, device, "timeline")
    file.parent.mkdir(parents=True, exist_ok=True)
    made = report.provenance(device, "benchmarks.train.timeline")
    rows: list[dict[str, Any]] = []
    for case in _chosen(device, options.case):
        print(case.name, flush=True)
        panels, found = [], []
        for plan in PLANS:
            panel, own = _measured(case, plan, device)
            gc.collect()  # plan and learner know each other
            torch.cuda.empty_cache()
            panels += [panel] if panel else []
            found.append({"plan": plan, **own})
            print(f"  {panel.title if panel else own['not_measured']}", flush=True)
        picture = _drawn(file.with_name(_file(case)), case, panels, made["device"])
        common = {key: value for key, value in case.columns.items() if key in FIELDS}
        rows += [{**common, **row, "picture": picture, **made} for row in found]
        report.write(file, rows, FIELDS)  # after each case: what is measured is kept, whatever comes
    if not rows:
        print("benchmarks.train.timeline: no case of that name", file=sys.stderr)
        return 1
    keep_table(file, table)
    return 0 if any("step_ms" in row for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
