"""The command behind `benchmarks.loss`, `benchmarks.fusion` and `benchmarks.augment`: measure cases, keep the rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from . import report
from .calls import Call, Variant, context
from .measure import Data, Times, engine_only, measure_graph, measure_host, measure_times, one_pass
from .options import arguments, keep_table, results, usable_device

__all__ = ["Benchmark", "Case", "run"]


class Case(Protocol):
    """One size of an operator; what it draws and what it may not take less than."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> dict[str, Any]: ...
    @property
    def bytes_of_inputs(self) -> int: ...
    def draw(self, device: torch.device, seed: int = 0) -> Data: ...
    def floors(self, device: torch.device) -> dict[str, dict[str, float]]: ...


@dataclass(frozen=True)
class Benchmark:
    """One operator's.

    Attributes:
        name: of the module and of the result files.
        about: text of --help.
        cases: what is measured on a device.
        variants: who takes part: of (case, device, whether torch.compile is wanted).
        modes: how a call is made, that of the floor of a CUDA graph first.
        facts: what is known of each variant beside its times: of (case, data, calls, "training" or "inference").
        floor: the column of `Case.floors` that is the time of the floor; its share of the measured time is FLOOR_share.
        tables: the text of the results.
        plot: writes the picture.
        fields: the columns of the results.
        small: bytes of inputs up to which the host's time counts on a GPU.
        time: factor on what a CPU spends on each case.
    """

    name: str
    about: str
    cases: Callable[[torch.device], Sequence[Any]]
    variants: Callable[[Any, torch.device, bool], list[Variant]]
    modes: Sequence[str]
    facts: Callable[[Any, Any, Mapping[str, Call], str], dict[str, dict[str, Any]]]
    floor: str
    tables: Callable[[list[dict[str, str]]], str]
    plot: Callable[[list[dict[str, str]], Path], None]
    fields: Sequence[str]
    small: float = 3e6
    time: float = 1.0


# Seconds for all variants of one case together, by mode; the largest cases take their five repetitions whatever it is.
BUDGET = {"forward+backward": 12.0, "forward": 4.0, "backward": 4.0, "inference": 4.0}
GPU_BUDGET = {"forward+backward": 2.0, "forward": 1.0, "backward": 1.0, "inference": 1.0}


def build(
    variants: Sequence[Variant], case: Case, data: Data, only: Sequence[str] | None, modes: Sequence[str]
) -> dict[str, Call]:
    """The variants that run this case; one that fails is named and left out."""
    calls = {}
    for name, factory in variants:
        if only is not None and name not in only:
            continue
        try:
            call = factory(case)
            with context(call):
                for mode in modes:
                    _set_mode(call, mode)
                    one_pass(mode, call, data)
            calls[name] = call
        except Exception as error:  # a peer that cannot do this case must not cost the others their figures
            print(
                f"  {name} left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}", flush=True
            )
    return calls


def _kind(mode: str) -> str:
    return "inference" if mode == "inference" else "training"


def _set_mode(call: Call, mode: str) -> None:
    """Bring a variant that is a module into what a mode measures."""
    if isinstance(call, torch.nn.Module):
        call.train(_kind(mode) == "training")


def measure_case(
    benchmark: Benchmark, case: Any, device: torch.device, only: Sequence[str] | None, share: float
) -> Iterator[dict[str, Any]]:
    """The rows of one case; `share` scales the time that is spent."""
    torch.compiler.reset()  # or the many static shapes would end in one dynamic graph
    data = case.draw(device)
    compiled = only is None or any(name.startswith("compile") for name in only)
    calls = build(benchmark.variants(case, device, compiled), case, data, only, benchmark.modes)
    sets = [data]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = math.ceil(2 * cache / case.bytes_of_inputs)
        sets += [case.draw(device, seed) for seed in range(1, min(wanted, 64))]
    floors = case.floors(device)
    floors["graph"] = floors[benchmark.modes[0]]
    budget, share = (BUDGET, share * benchmark.time) if device.type == "cpu" else (GPU_BUDGET, share)
    facts: dict[str, dict[str, dict[str, Any]]] = {}

    def row(name: str, mode: str, times: Times, known: dict[str, Any]) -> dict[str, Any]:
        floor: dict[str, Any] = dict(floors.get(mode, {}))
        if floor:
            floor[f"{benchmark.floor}_share"] = floor[f"{benchmark.floor}_ms"] / (1e3 * times.median)
        return {
            **case.columns, "variant": name, "mode": mode,
            "median_ms": 1e3 * times.median, "least_ms": 1e3 * times.least, "p20_ms": 1e3 * times.p20,
            "p80_ms": 1e3 * times.p80, "repetitions": times.repetitions,
            **floor, **known,
        }  # fmt: skip

    for mode in benchmark.modes:
        for call in calls.values():
            _set_mode(call, mode)
        if (kind := _kind(mode)) not in facts:
            facts[kind] = benchmark.facts(case, data, calls, kind)
        for name, times in measure_times(calls, sets, mode, budget=share * budget[mode]).items():
            yield row(name, mode, times, facts[kind][name])
    if device.type == "cuda":
        for name, call in calls.items():
            _set_mode(call, "training")
            in_graph = measure_graph(call, sets[:32])
            if in_graph is not None:
                yield row(name, "graph", in_graph, facts["training"][name])
        if case.bytes_of_inputs < benchmark.small:
            engine = {"engine": engine_only(data)} if any(leaf.requires_grad for leaf in data.leaves) else {}
            for name, call in {**calls, **engine}.items():
                yield row(name, "host", measure_host(call, data), facts["training"].get(name, {}))


def run(benchmark: Benchmark) -> int:
    """Parse the command line, measure, write the files; returns the exit code."""
    command = f"benchmarks.{benchmark.name}"
    parser = arguments(benchmark.name, benchmark.about)
    parser.add_argument("--case", action="append", help="a part of a case's name; may be given again")
    parser.add_argument("--variant", action="append", help="a variant by name; may be given again")
    parser.add_argument("--time", type=float, default=1.0, help="factor on the time that is spent (default: 1)")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the table of earlier results and stop")
    options = parser.parse_args()
    if options.table is not None:
        print(benchmark.tables(report.read(options.table)))
        return 0
    device = usable_device(benchmark.name, options)
    if device is None:
        return 1
    file = results(options, device, benchmark.name)
    made = report.provenance(device, command)
    rows: list[dict[str, Any]] = []
    for case in benchmark.cases(device):
        if options.case and not any(part in case.name for part in options.case):
            continue
        print(case.name, flush=True)
        for row in measure_case(benchmark, case, device, options.variant, options.time):
            rows.append({**row, **made})
            share = f"{benchmark.floor}_share"
            print(
                f"  {row['mode']:<17} {row['variant']:<14} {row['median_ms']:10.4g} ms "
                f"({row['p20_ms']:.4g} … {row['p80_ms']:.4g}, {row['repetitions']} ×)"
                + (f"  {100 * row[share]:5.1f} % of the {benchmark.floor}" if share in row else ""),
                flush=True,
            )
        report.write(file, rows, benchmark.fields)  # after each case: what is measured is kept, whatever comes
    if not rows:
        print(f"{command}: no case of that name", file=sys.stderr)
        return 1
    keep_table(file, benchmark.tables)
    try:
        benchmark.plot(report.read(file), file.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no plot")
    return 0
