"""Every variant of every kernel in the form that `triton.compile` takes without a device.

For a case c: `triton.compile(ASTSource(c.fn, c.signature, c.constexprs, c.attrs), target, {"num_warps": c.num_warps})`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph import DistillGraph
from . import launch
from .augment_kernels import augment_kernel
from .distill_loss_kernels import backward_kernel, count_kernel, finish_kernel, forward_kernel, scale_kernel
from .fusion_offline import launches as fusion_launches
from .plan import INDEX, NO_TARGET, PROBABILITIES, plan

__all__ = ["Case", "cases"]

Path = tuple[int, ...]

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}
TRAINED_MIXTURE = DistillGraph(2, (1.0, 0.0), ((0.5, 0.5),), ((2, 0, 0.7, False), (1, 0, 1.3, False)))


class Case(NamedTuple):
    """One kernel variant: what to compile, and with how many warps."""

    name: str
    fn: Any
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Path, Any]
    num_warps: int


def cases() -> Iterator[Case]:
    """The fusion's, the augmentation's, then the loss's: the main path (FFL, each dtype, narrow and wide rows) and each
    option."""
    yield from _fusion()
    yield from _augmentation()
    ffl = DistillGraph.ffl(2)
    for dtype in SIZES:
        for num_classes in (100, 1000, 32000):
            yield from _loss(f"ffl2 {dtype} C={num_classes}", ffl, num_classes, dtype)
    yield from _loss("ffl2 bf16 C=10", ffl, 10, "bf16")
    yield from _loss("ffl2 bf16 C=4096", ffl, 4096, "bf16")
    yield from _loss("ffl2 bf16 C=50257, odd", ffl, 50257, "bf16")
    yield from _loss("ffl2 fp32 C=2", ffl, 2, "fp32")
    yield from _loss("ffl2 bf16 C=3999, odd", ffl, 3999, "bf16")
    yield from _loss("dml6 bf16 C=1000", DistillGraph.dml(6), 1000, "bf16")
    yield from _loss("ffl15 bf16 C=1000", DistillGraph.ffl(15), 1000, "bf16")
    yield from _loss("pcl5 fp32 C=32000", DistillGraph.pcl(5), 32000, "fp32")
    for num_classes in (100, 32000):
        shape = f"C={num_classes}"
        yield from _loss(f"single fp32 {shape}", DistillGraph.single(), num_classes, "fp32")
        yield from _loss(f"kd bf16 {shape}", DistillGraph.kd(), num_classes, "bf16")
        yield from _loss(f"ffl4 bf16 {shape}", DistillGraph.ffl(4), num_classes, "bf16")
        yield from _loss(f"ffl7 bf16 {shape}", DistillGraph.ffl(7), num_classes, "bf16")
        yield from _loss(f"dml4 bf16 {shape}", DistillGraph.dml(4), num_classes, "bf16")
        yield from _loss(f"dml3 fp32 {shape}", DistillGraph.dml(3), num_classes, "fp32")
        yield from _loss(f"cl3 bf16 {shape}", DistillGraph.cl(3), num_classes, "bf16")
        yield from _loss(f"okddip2 fp32 {shape}", DistillGraph.okddip(2), num_classes, "fp32")
        yield from _loss(f"okdhp3 fp32 {shape}, no target", DistillGraph.okdhp(3), num_classes, "fp32", kind=NO_TARGET)
        yield from _loss(f"trained mixture fp32 {shape}", TRAINED_MIXTURE, num_classes, "fp32")
        yield from _loss(f"ffl2 fp32 {shape}, smoothed", ffl, num_classes, "fp32", smooth=True)
        yield from _loss(f"ffl2 fp32 {shape}, soft", ffl, num_classes, "fp32", kind=PROBABILITIES, smooth=True)
        yield from _loss(f"ffl2 fp32 {shape}, eps", ffl, num_classes, "fp32", eps=True)
        yield from _loss(f"trained mixture fp32 {shape}, eps", TRAINED_MIXTURE, num_classes, "fp32", eps=True)
        yield from _loss(f"ffl2 bf16 {shape}, device scalars", ffl, num_classes, "bf16", by_pointer=0b111)
    for dtype, size in SIZES.items():
        acc = "fp64" if size == 8 else "fp32"
        yield _case(
            f"scale {dtype}", scale_kernel, launch.FEWEST_WARPS,
            grad_loss=f"*{acc}", grads=(f"*{dtype}",) * 3, units="i32", VEC=16 // size,
            BLOCK=launch.SCALE_BLOCK,
        )  # fmt: skip
    for acc in ("fp32", "fp64"):
        yield _case(
            f"finish {acc}", finish_kernel, launch.FEWEST_WARPS,
            partials=f"*{acc}", loss=f"*{acc}", terms=f"*{acc}", statistics=f"*{acc}", num_partials="i32",
            MEAN_LOSS=True, MEAN_TERMS=True, NUM_TERMS=6, BLOCK=launch.SUM_BLOCK,
        )  # fmt: skip
    yield _case(
        "count", count_kernel, launch.FEWEST_WARPS,
        target="*i64", counts="*i32", num_rows="i32", rows_each="i32", ignore_index="i32", BLOCK=launch.COUNT_BLOCK,
    )  # fmt: skip


def _augmentation() -> Iterator[Case]:
    """CIFAR's and ImageNet's images in both memory orders, counters as numbers and as pointers; evaluation."""
    for name, side, pad, dtype, channels_last, by_pointer in (
        ("32×32", 32, 4, "fp32", False, 0b000),
        ("32×32, channels_last", 32, 4, "bf16", True, 0b010),
        ("28×28, gray", 28, 4, "fp16", False, 0b111),
        ("224×224", 224, 0, "bf16", False, 0b010),
        ("224×224, channels_last", 224, 0, "bf16", True, 0b010),
        ("64×64, channels_last", 64, 4, "fp64", True, 0b000),
        ("224×224, evaluation", 224, None, "fp32", True, 0b000),
    ):
        words = ("*i64" if (by_pointer >> bit) & 1 else "i32" for bit in range(3))
        yield _case(
            f"augment {dtype} {name}", augment_kernel, launch.AUGMENT_WARPS,
            images="*u8", image_step="i32", steps=("i32",) * 3, index=None if pad is None else "*i64", index_step="i32",
            **dict(zip(("seed", "epoch", "view"), words, strict=True)), table=f"*{dtype}", table_steps=("i32",) * 2,
            out=f"*{dtype}", HEIGHT=side, WIDTH=side, PAD=pad or 0, FLIP=pad is not None, CHANNELS_LAST=channels_last,
            BY_POINTER=by_pointer, BLOCK=launch.AUGMENT_BYTES // SIZES[dtype],
        )  # fmt: skip


def _fusion() -> Iterator[Case]:
    for name, kernel, arguments, warps in fusion_launches():
        yield _case(name, kernel, warps, **{p.name: v if p.is_constexpr else _kind(v) for p, v in arguments})


def _kind(value: Any) -> Any:
    """The type of a launch's argument."""
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i64" if value >= 2**31 else "i32"
    return "fp32" if isinstance(value, float) else None


def _loss(
    name: str,
    graph: DistillGraph,
    num_classes: int,
    dtype: str,
    *,
    kind: int = INDEX,
    smooth: bool = False,
    eps: bool = False,
    by_pointer: int = 0,
) -> Iterator[Case]:
    """The forward kernel of both forms and the backward kernel for contiguous logits."""
    size, m = SIZES[dtype], graph.num_logits
    acc = "fp64" if size == 8 else "fp32"
    if size == 8:
        by_pointer = 0b11111
    vec = min(num_classes & -num_classes, 16 // size)
    tile = launch.tile(num_classes, size, m + graph.num_mixtures + len(graph.edges), vec)
    k = plan(graph, kind, smooth, eps, by_pointer, size == 8, tile.rows, tile.block, num_classes <= tile.block, vec)
    pointers, every = (f"*{dtype}",) * m, (1 << m) - 1
    scalars = [f"*{acc}" if (by_pointer >> bit) & 1 else acc for bit in range(5)]
    common = {
        "z": pointers,
        "z_stride": ("i32",) * m,
        "target": {NO_TARGET: None, INDEX: "*i64", PROBABILITIES: f"*{acc}"}[kind],
        "target_stride": "i32",
        **dict(zip(("temperature", "kl_weight", "ce_weight", "smoothing", "eps"), scalars, strict=True)),
        "ignore_index": "i32",
        "num_rows": "i32",
        "column_units": "i32",
    }
    for fast in (False, True):
        count = 0 if not fast else 3 if kind == INDEX else 1
        yield _case(
            f"{'fast' if fast else 'base'} forward {name}", forward_kernel, tile.warps,
            **common, loss=None, partials=f"*{acc}", statistics=None if fast else f"*{acc}", grads=pointers,
            counts=None, num_counts="i32", COUNT=count, COUNT_BLOCK=launch.COUNT_BLOCK, NEEDS=every if fast else 0, K=k,
        )  # fmt: skip
    yield _case(
        f"backward {name}", backward_kernel, tile.warps,
        **common, grad_loss=f"*{acc}", statistics=f"*{acc}", grads=pointers, PER_ROW=False, DIVIDE=True, NEEDS=every,
        K=k,
    )  # fmt: skip


def _case(name: str, fn: Any, num_warps: int, **arguments: Any) -> Case:
    """Sorts a kernel's arguments into types, constants and pointers of 16 aligned bytes, as a launch would."""
    signature: dict[str, Any] = {}
    constexprs: dict[Any, Any] = {}
    attrs: dict[Path, Any] = {}
    aligned = [["tt.divisibility", 16]]
    for position, parameter in enumerate(fn.arg_names):
        kind = arguments[parameter]
        if fn.params[position].is_constexpr or kind is None:
            signature[parameter], constexprs[(position,)] = "constexpr", kind
            continue
        signature[parameter] = kind
        if isinstance(kind, tuple):
            signature[parameter] = tuple("constexpr" if k is None else k for k in kind)
            constexprs.update({(position, i): None for i, k in enumerate(kind) if k is None})
            attrs.update({(position, i): aligned for i, k in enumerate(kind) if k is not None and k.startswith("*")})
        elif kind.startswith("*"):
            attrs[(position,)] = aligned
    return Case(name, fn, signature, constexprs, attrs, num_warps)
