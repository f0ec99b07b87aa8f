"""The launch policy of the Triton kernels: which tile a program takes, with how many warps, and how many programs.

One place, plain numbers, no search at run time. By reckoning, not measured yet: a thread should load 16 bytes of each
tensor at a time (4 float32 or 8 float16 elements) and hold no more of each tensor than leaves all M tensors, the
probabilities of the M + V distributions and one gradient in registers.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Tile", "programs", "tile"]

# The kernels unroll over the graph, so that its size is compile time: a graph beyond these is left to other backends.
MAX_LOGITS = 16
MAX_MIXTURES = 16
MAX_EDGES = 64

# (largest M + V + E of the graph, elements of one tensor that a thread holds, most warps of a program): more tensors,
# fewer elements of each. A program of 16 warps leaves a thread 128 registers on an NVIDIA GPU, one of 8 warps 255.
ELEMENTS = ((1, 16, 16), (8, 8, 16), (20, 4, 8), (MAX_LOGITS + MAX_MIXTURES + MAX_EDGES, 2, 8))
THREADS = 32  # lanes of a warp, as the reckoning goes; nothing depends on it
NARROW = 32
FEWEST_WARPS = 4

# A program takes several blocks of rows when there are more blocks than this, so that the sum over programs is short.
MAX_PROGRAMS = 2048
# Up to this many rows every program counts the rows itself (at most 32 KB out of the L2 cache); beyond, a kernel does.
COUNT_IN_KERNEL = 4096
COUNT_BLOCK = 1024
COUNT_PROGRAMS = 256
SUM_BLOCK = 1024
SCALE_BLOCK = 2048
SCALE_PROGRAMS = 1024
# The augmentation: each thread writes 16 adjacent bytes of the result.
AUGMENT_WARPS = 4
AUGMENT_BYTES = 16 * 32 * AUGMENT_WARPS


class Tile(NamedTuple):
    """What one program works on at a time: `rows` × `block` classes of every tensor, with `warps` warps."""

    rows: int
    block: int
    warps: int


def tile(num_classes: int, element_size: int, graph_size: int, vec: int) -> Tile:
    """The tile for rows of `num_classes`: a whole number of rows where they fit, else a part of one row.

    Args:
        graph_size: M + V + E, the number of tensors, mixtures and edges.
        vec: how many adjacent elements may be loaded at once.
    """
    elements, most_warps = next((count, warps) for limit, count, warps in ELEMENTS if graph_size <= limit)
    padded = 1 << max(num_classes - 1, 1).bit_length()
    if element_size == 8:
        elements, most_warps = elements // 2, 8
    if padded <= NARROW or vec == 1:
        # Statistics of many short rows, or the addresses of single elements, want registers too.
        elements = min(elements, 4)
    if padded > THREADS * elements * most_warps:
        # A part of a row: one load of 16 bytes a thread, as the sums of the row take registers of their own.
        elements = min(elements, max(16 // element_size, 2))
    warps = min(max(padded // (THREADS * elements), FEWEST_WARPS), most_warps)
    size = THREADS * elements * warps
    block = min(padded, size)
    return Tile(size // block, block, warps)


def programs(num_blocks: int) -> int:
    """How many programs share `num_blocks` blocks of rows."""
    return min(num_blocks, MAX_PROGRAMS)
