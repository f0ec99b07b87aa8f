"""Launch every kernel of a backend on small input once, for a memory or race checker to watch.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitize --backend cuda

The sizes lie on both sides of each change of kernel: many rows a block, one row a block, rows over a cluster, two
sweeps. Without a checker it says whether all results are finite.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

import fflfast
from fflfast import DistillGraph, distill_loss

# Class counts, most of them odd, so that rows are not aligned; rows enough for more than one block of packed rows.
CLASSES = ((7, 70), (100, 33), (1000, 9), (1024, 9), (4097, 5), (10_000, 3), (32_000, 3), (65_537, 2), (131_072, 2))
TRAINABLE = DistillGraph(3, (1.0, 1.0, 0.0), ((0.5, 0.5, 0.0),), ((2, 0, 1.0, False), (3, 1, 1.0, False), (0, 2, 1.0)))
GRAPHS = {
    "one network": DistillGraph.single(),
    "KD": DistillGraph.kd(),
    "FFL": DistillGraph.ffl(2),
    "trainable teachers": TRAINABLE,
    "FFL of 3": DistillGraph.ffl(3),
    "DML of 5": DistillGraph.dml(5),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", help="the backend to run (default: cuda)")
    parser.add_argument("--device", default="cuda", help="where (default: cuda)")
    parser.add_argument("--quick", action="store_true", help="float32 and bfloat16, three class counts")
    options = parser.parse_args()
    classes, dtypes = (CLASSES[1::3], DTYPES[:2]) if options.quick else (CLASSES, DTYPES)
    generator, calls, wrong = torch.Generator("cpu").manual_seed(0), 0, []
    for (name, graph), dtype, (num_classes, rows) in itertools.product(GRAPHS.items(), dtypes, classes):
        shape = (rows, num_classes)
        logits = [torch.randn(shape, generator=generator, device="cpu") for _ in range(graph.num_logits)]
        index = torch.randint(num_classes, (rows,), generator=generator, device="cpu")
        index[0] = -100
        targets = [index.to(options.device), torch.softmax(logits[0], 1).to(options.device)]
        # The fast form (mean), the base form (per row, and mean in float16), and no gradient at all.
        for target, reduction, grad in (
            (targets[0], "mean", True),
            (targets[1], "none", True),
            (targets[0], "sum", False),
        ):
            leaves = [z.to(options.device, dtype).requires_grad_(grad) for z in logits]
            with fflfast.use_backend(options.backend):
                loss, terms = distill_loss(leaves, target, graph, temperature=3.0, reduction=reduction)
                found = torch.autograd.grad(2 * loss.sum(), leaves, allow_unused=True) if grad else ()
            values = (loss, terms, *(g for g in found if g is not None))
            calls += 1
            if not all(bool(v.isfinite().all()) for v in values):
                wrong.append(f"{name}, {dtype}, {shape}, {reduction}")
    print(f"{calls} calls of {options.backend} on {options.device}, {len(wrong)} with a result that is not finite")
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
