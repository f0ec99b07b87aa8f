"""Measure the fused loss against PyTorch's operators, torch.compile and the peers that are installed.

    python -m benchmarks.loss                                  # this machine's CPU, some minutes
    python -m benchmarks.loss --device cuda --out FOLDER
    python -m benchmarks.loss --table benchmarks/results/FOLDER/loss.csv

Writes loss.csv (a row a case, variant and mode), loss.md (the table of the README) and loss.png.

Modes: forward+backward through autograd with fresh gradients; forward under no_grad; backward after an untimed forward
(ours writes its gradients in the forward where it can, so that little is left there). On a GPU also graph, the step
inside a CUDA graph, and host, the time to enqueue it, autograd's engine included; the variant engine is that alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import report
from .cases import Case, Data, cases_for
from .measure import (
    MODES,
    Times,
    copy_seconds,
    engine_only,
    errors,
    launches,
    measure_graph,
    measure_host,
    measure_times,
    once,
    peak_bytes,
)
from .variants import Loss, context, variants_for

# Seconds for all variants of one case together, by mode; the largest cases take their five repetitions whatever it is.
BUDGET = {"forward+backward": 12.0, "forward": 4.0, "backward": 4.0}
GPU_BUDGET = {"forward+backward": 2.0, "forward": 1.0, "backward": 1.0}


def build(
    case: Case, data: Data, device: torch.device, only: list[str] | None
) -> tuple[dict[str, Loss], dict[str, Any]]:
    """The variants that run this case, and what each returned; a variant that fails is named and left out."""
    losses, results = {}, {}
    compiled = only is None or any(name.startswith("compile") for name in only)
    for name, factory in variants_for(device, compiled=compiled, tuned=case.tuned):
        if only is not None and name not in only:
            continue
        try:
            loss = factory(case)
            with context(loss):
                results[name] = once(loss, data)
            losses[name] = loss
        except Exception as error:  # a peer that cannot do this case must not cost the others their figures
            print(
                f"  {name} left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}", flush=True
            )
    return losses, results


def measure_case(case: Case, device: torch.device, only: list[str] | None, share: float) -> Iterator[dict[str, Any]]:
    """The rows of one case; `share` scales the time that is spent."""
    torch.compiler.reset()  # or the many static shapes would end in one dynamic graph
    data = case.draw(device)
    losses, results = build(case, data, device, only)
    found = errors(case, data, results)
    del results
    facts = {}
    for name, loss in losses.items():
        facts[name] = {
            "loss_error": found[name][0],
            "gradient_error": found[name][1],
            "peak_mb": peak_bytes(loss, data) / 1e6,
            "launches": launches(loss, data),
        }
    sets = [data]
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = math.ceil(2 * cache / (case.graph.num_logits * case.tensor_bytes))
        sets += [case.draw(device, seed) for seed in range(1, min(wanted, 64))]

    def row(name: str, mode: str, times: Times, **more: Any) -> dict[str, Any]:
        # Alone, a backward has no least bytes: it may find its work done. Nor has the host's part.
        copy = copies.get(mode)
        least = {} if copy is None else {
            "minimal_mb": case.minimal_bytes(mode) / 1e6, "copy_ms": 1e3 * copy, "copy_share": copy / times.median,
        }  # fmt: skip
        return {
            "case": case.name, "rows": case.rows, "classes": case.num_classes,
            "dtype": str(case.dtype).removeprefix("torch."), "variant": name, "mode": mode,
            "eager_goal": case.eager_factor, "compile_goal": case.compile_factor,
            "median_ms": 1e3 * times.median, "least_ms": 1e3 * times.least, "p20_ms": 1e3 * times.p20,
            "p80_ms": 1e3 * times.p80, "repetitions": times.repetitions,
            **least, **more,
        }  # fmt: skip

    copies = {mode: copy_seconds(case, device, mode) for mode in ("forward+backward", "forward")}
    copies["graph"] = copies["forward+backward"]
    budget = BUDGET if device.type == "cpu" else GPU_BUDGET
    for mode in MODES:
        timed = measure_times(losses, sets, mode, budget=share * budget[mode])
        for name, times in timed.items():
            yield row(name, mode, times, **facts[name])
    if device.type == "cuda":
        for name, loss in losses.items():
            in_graph = measure_graph(loss, sets[:32])
            if in_graph is not None:
                yield row(name, "graph", in_graph, **facts[name])
        if case.tensor_bytes < 1e6:
            for name, loss in {**losses, "engine": engine_only(data)}.items():
                yield row(name, "host", measure_host(loss, data), **facts.get(name, {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/DEVICE)")
    parser.add_argument("--case", action="append", help="a part of a case's name; may be given again")
    parser.add_argument("--variant", action="append", help="a variant by name; may be given again")
    parser.add_argument("--time", type=float, default=1.0, help="factor on the time that is spent (default: 1)")
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the table of earlier results and stop")
    options = parser.parse_args()
    if options.table is not None:
        print(_tables(report.read(options.table)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.loss: no CUDA device; --device cpu measures the CPU", file=sys.stderr)
        return 1
    folder = options.out or Path(__file__).resolve().parent / "results" / report.device_folder(device)
    made = report.provenance(device)
    rows: list[dict[str, Any]] = []
    for case in cases_for(device):
        if options.case and not any(part in case.name for part in options.case):
            continue
        print(case.name, flush=True)
        for row in measure_case(case, device, options.variant, options.time):
            rows.append({**row, **made})
            print(
                f"  {row['mode']:<17} {row['variant']:<14} {row['median_ms']:10.4g} ms "
                f"({row['p20_ms']:.4g} … {row['p80_ms']:.4g}, {row['repetitions']} ×)"
                + (f"  {100 * row['copy_share']:5.1f} % of a copy" if "copy_share" in row else ""),
                flush=True,
            )
        report.write(folder / "loss.csv", rows)  # after each case: what is measured is kept, whatever comes
    if not rows:
        print("benchmarks.loss: no case of that name", file=sys.stderr)
        return 1
    kept = report.read(folder / "loss.csv")
    text = _tables(kept)
    (folder / "loss.md").write_text(text + "\n", encoding="utf-8")
    try:
        report.plot(kept, folder / "loss.png")
    except ImportError:
        print("matplotlib is not installed: no plot")
    print(text)
    return 0


def _tables(rows: list[dict[str, str]]) -> str:
    return "\n\n".join(filter(None, (report.table(rows), report.latency_table(rows))))


if __name__ == "__main__":
    raise SystemExit(main())
