"""Launch every kernel of a backend on small input once, for a memory or race checker to watch.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitize --backend cuda

The sizes lie on both sides of each change of kernel. Of the loss: many rows a block, one row a block, rows over a
cluster, two sweeps. Of the fusion: small and large tiles of the products, whole images and bands of rows in a tile,
each memory order, tf32. Without a checker it says whether all results are finite.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import fflfast
from fflfast import DistillGraph, distill_loss
from fflfast.nn import FeatureFusion

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

# (batch, channels of the maps, height, width, C_out): odd sizes in small tiles, a pixel, a row, eight maps, bands of
# rows, and what fills a large GPU with large tiles.
SIZES = (
    (5, (16, 24), 8, 8, 40),
    (3, (5, 3), 5, 6, 7),
    (70, (9, 8), 1, 1, 5),
    (2, (7, 2, 1, 3, 8, 5, 4, 6), 1, 33, 11),
    (2, (6, 9), 64, 64, 10),
    (256, (256, 256), 7, 7, 256),
)
LAYOUTS = ("nchw", "channels_last", "strided")
# Which norms train, and whether autograd records; neither and no autograd is the inference kernel.
MODES = (
    ((True, True), True),
    ((False, True), True),
    ((True, False), True),
    ((False, False), True),
    ((False, False), False),
)
# The products of float32 once with tf32, where PyTorch's switch for it is on.
PRECISIONS = (("float32", False), ("bfloat16", False), ("float16", False), ("float32", True))

Found = Iterator[tuple[str, list[Tensor]]]


def losses(device: str, quick: bool) -> Found:
    """(what was called, its results) of each call of the loss."""
    classes, dtypes = (CLASSES[1::3], DTYPES[:2]) if quick else (CLASSES, DTYPES)
    generator = torch.Generator("cpu").manual_seed(0)
    for (name, graph), dtype, (num_classes, rows) in itertools.product(GRAPHS.items(), dtypes, classes):
        shape = (rows, num_classes)
        logits = [torch.randn(shape, generator=generator, device="cpu") for _ in range(graph.num_logits)]
        index = torch.randint(num_classes, (rows,), generator=generator, device="cpu")
        index[0] = -100
        targets = [index.to(device), torch.softmax(logits[0], 1).to(device)]
        # The fast form (mean), the base form (per row, and mean in float16), and no gradient at all.
        for target, reduction, grad in (
            (targets[0], "mean", True),
            (targets[1], "none", True),
            (targets[0], "sum", False),
        ):
            leaves = [z.to(device, dtype).requires_grad_(grad) for z in logits]
            loss, terms = distill_loss(leaves, target, graph, temperature=3.0, reduction=reduction)
            found = torch.autograd.grad(2 * loss.sum(), leaves, allow_unused=True) if grad else ()
            yield f"{name}, {dtype}, {shape}, {reduction}", [loss, terms, *(g for g in found if g is not None)]


def fusions(device: str, quick: bool) -> Found:
    """(what was called, its results) of each call of the fusion."""
    sizes, layouts, precisions = (SIZES[::5], LAYOUTS[:2], PRECISIONS[:2]) if quick else (SIZES, LAYOUTS, PRECISIONS)
    generator = torch.Generator("cpu").manual_seed(0)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    for (batch, channels, height, width, out), layout, (dtype, tf32) in itertools.product(sizes, layouts, precisions):
        module = FeatureFusion(channels, out, 3).to(device)
        maps = [torch.randn(batch, c, height, width, generator=generator, device="cpu") for c in channels]
        switch.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            for training, grad in MODES:
                module.depthwise_norm.train(training[0])
                module.pointwise_norm.train(training[1])
                leaves = [_laid_out(x.to(device, getattr(torch, dtype)), layout).requires_grad_(grad) for x in maps]
                with torch.set_grad_enabled(grad):
                    results = [module.pooled(leaves)]
                wanted = [*leaves, *(p for n, p in module.named_parameters() if "classifier" not in n)]
                if grad:
                    results += torch.autograd.grad(2 * results[0].sum(), wanted)
                sizes_of = f"{batch} × {channels} × {height} × {width} → {out}"
                yield (
                    f"{sizes_of}, {layout}, {dtype}{' as tf32' * tf32}, {training}, {grad}",
                    [*results, *module.buffers()],
                )
        finally:
            switch.fp32_precision = before


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.cat([x, x], 3)[:, :, :, : x.shape[3]].detach()
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


OPERATORS = {"distill_loss": losses, "fuse_features": fusions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", help="the backend to run (default: cuda)")
    parser.add_argument("--device", default="cuda", help="where (default: cuda)")
    parser.add_argument("--operator", choices=tuple(OPERATORS), help="this one alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="two dtypes, the most different sizes")
    options = parser.parse_args()
    failed = False
    for name, run in OPERATORS.items():
        if options.operator not in (None, name):
            continue
        calls, wrong = 0, []
        with fflfast.use_backend(options.backend):
            for call, values in run(options.device, options.quick):
                calls += 1
                if not all(bool(v.isfinite().all()) for v in values):
                    wrong.append(call)
        where = f"{options.backend} on {options.device}"
        print(f"{name}: {calls} calls of {where}, {len(wrong)} with a result that is not finite")
        for line in wrong:
            print(f"  {line}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
