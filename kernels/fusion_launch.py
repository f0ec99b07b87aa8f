"""The launch policy of the fusion kernels: tiles, warps, stages, and what is kept rather than formed again.

One place, plain numbers, no search at run time. By reckoning for an H200 (132 multiprocessors, 227 KB of shared memory
and 64 K registers each, about 3500 bf16 multiplications and additions a cycle and multiprocessor), not measured yet.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "Product",
    "Sweep",
    "casts",
    "epilogue",
    "keeps",
    "lanes",
    "parts",
    "persistent",
    "product",
    "sweep",
    "weight_gradient",
]

MULTIPROCESSORS = 132


class Sweep(NamedTuple):
    """A program that goes over pixels for one block of channels: `lanes` pixels apart are one thread's."""

    pixels: int
    channels: int
    lanes: int
    warps: int


class Product(NamedTuple):
    """A tile of rows × columns of a matrix product, `inner` terms at a time, `stages` of them in flight."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Widest first. 128 × 256 with two warpgroups is what wgmma needs to outrun the L2 cache: 85 operations a byte. The
# tiles after it exist for problems with too few tiles to fill the machine. float32 without tf32 runs on the ordinary
# units, where a wide tile is worth nothing.
TILES = {
    "16": (
        Product(128, 256, 64, 8, 3),
        Product(128, 128, 64, 8, 3),
        Product(64, 128, 64, 4, 3),
        Product(64, 64, 64, 4, 3),
        Product(32, 32, 64, 4, 3),
    ),
    "tf32": (Product(128, 128, 32, 8, 3), Product(64, 64, 32, 4, 3), Product(32, 32, 32, 4, 3)),
    "ieee": (Product(64, 64, 16, 4, 2), Product(32, 32, 16, 4, 2)),
}
# Where h is formed from the feature maps in the prologue: h and its taps stand beside the accumulators in registers,
# and the loads of taps cannot be in flight by stages. A tile of all outputs forms h once.
FORMING = {
    "16": (Product(64, 128, 32, 8, 1), Product(64, 64, 32, 4, 1), Product(32, 32, 32, 4, 1)),
    "tf32": (Product(64, 128, 32, 8, 1), Product(64, 64, 32, 8, 1), Product(32, 32, 32, 4, 1)),
    "ieee": (Product(64, 64, 16, 4, 1), Product(32, 32, 16, 4, 1)),
}
# More outputs than this make several tiles, each of which would form h again at about the price of its own product.
# (The statistics do not know the outputs, and take them to be as many as the channels.)
KEEP_FROM = {"16": 256, "tf32": 128, "ieee": 128}
# The backward product forms dy in its prologue from two tensors and six vectors: half as many terms at a time.
BACKWARD = {
    "16": (Product(128, 128, 32, 8, 4), Product(64, 64, 32, 4, 4), Product(32, 32, 32, 4, 4)),
    "tf32": (Product(64, 64, 32, 4, 3), Product(32, 32, 32, 4, 3)),
    "ieee": (Product(64, 64, 16, 4, 2), Product(32, 32, 16, 4, 2)),
}
# Products of such tiles would read a float32 weight from the L2 cache at twice the price of everything else.
CAST_FROM = 128 * 128

# Blocks of channels, and how much of them may be empty because no block straddles two maps.
BLOCKS = (256, 128, 64, 32, 16)
WASTE = 1.15

# Inference has scale and shift of its outputs beside a whole tile.
INFERENCE = {kind: tuple(tile for tile in tiles if tile.columns <= 128) for kind, tiles in TILES.items()}

SWEEP_WARPS = 4
MOST_COLUMNS = 64  # 128 bytes of a pixel's 16-bit channels
# Where pixels are adjacent in memory and channels are not, a thread of the statistics has one pixel of eight channels.
BY_WIDTH = Sweep(128, 8, 128, SWEEP_WARPS)
# Pixels of a thread: sums of nine taps leave room for two.
STATISTICS_PIXELS, GRADIENT_PIXELS = 4, 2
SWEEP_PROGRAMS = 4 * MULTIPROCESSORS
# The last program adds what all have left: few enough for it to be done in a microsecond or two.
MOST_PARTS = 128
MOST_SPLITS = 16
SUM_ROWS = 16

POOL_PIXELS, POOL_CHANNELS, POOL_WARPS = 16, 128, 4
IMAGES, IMAGE_CHANNELS, IMAGE_WARPS = 16, 64, 4
UPDATE_BLOCK, UPDATE_WARPS = 1024, 4
PREPARE = 256
GROUP = 8


def power(n: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def block_of(channels: tuple[int, ...], most: int) -> int:
    """The largest block of channels up to `most` that leaves few of them empty, the emptiest being no reason to go
    below 16."""
    total = sum(channels)
    for block in BLOCKS:
        if block <= most and sum(-(-c // block) for c in channels) * block <= WASTE * total:
            return block
    return BLOCKS[-1]


def parts(blocks: int, num_pixels: int, pixels: int) -> tuple[int, int]:
    """(programs that share the pixels of each of `blocks` blocks, pixels of each program: a whole number of tiles)."""
    wanted = min(max(SWEEP_PROGRAMS // blocks, 1), MOST_PARTS)
    each = -(-num_pixels // (wanted * pixels)) * pixels
    return -(-num_pixels // each), each


def sweep(channels: tuple[int, ...], unit: int, each: int) -> Sweep:
    """How statistics and gradients of feature maps go over memory: a thread has `unit` channels of `each` pixels."""
    block = block_of(channels, MOST_COLUMNS)
    lanes = max(32 * SWEEP_WARPS * unit // block, 1)
    return Sweep(each * lanes, block, lanes, SWEEP_WARPS)


def kind(element_size: int, tf32: bool) -> str:
    return "16" if element_size == 2 else "tf32" if tf32 else "ieee"


def keeps(channels: int, element_size: int) -> bool:
    """Whether the statistics keep h for the product: as many outputs as channels are expected, and no tf32."""
    return channels > KEEP_FROM[kind(element_size, False)]


def product(num_pixels: int, columns: int, tiles: tuple[Product, ...]) -> Product:
    """The first tile of a table that fills the machine; of tiles that form h the one that has most of the columns."""
    for tile in tiles[:-1]:
        count = -(-num_pixels // tile.rows) * -(-columns // tile.columns)
        if tile.columns < 2 * max(columns, 16) and (tile.stages == 1 or count >= MULTIPROCESSORS):
            return tile
    return tiles[-1]


def epilogue(tile: Product, channels: int, unit: int) -> tuple[int, int, int]:
    """(rows, columns, lanes) of the parts of its tile in which the backward product forms h."""
    columns = min(channels, MOST_COLUMNS)
    lanes = min(max(32 * tile.warps * unit // columns, 1), tile.rows)
    return min(GRADIENT_PIXELS * lanes, tile.rows), columns, lanes


def lanes(tile: Product) -> int:
    """Rows of a tile that a program loads at once, eight numbers a thread."""
    return min(max(256 * tile.warps // tile.columns, 1), tile.rows)


def casts(tile: Product) -> bool:
    """Whether a float32 weight is rounded by a launch of its own rather than in each program."""
    return tile.rows * tile.columns >= CAST_FROM


def persistent(groups: int, columns: int) -> tuple[int, int]:
    """(programs that share the groups of images, programs that share the tiles of outputs of a group)."""
    programs = min(groups, MULTIPROCESSORS)
    return programs, min(max(MULTIPROCESSORS // programs, 1), columns)


def weight_gradient(channels: int, outputs: int, num_pixels: int, kind: str) -> tuple[Product, int]:
    """(tile of channels × outputs, splits of the pixels)."""
    for tile in TILES[kind]:
        tiles = -(-channels // tile.rows) * -(-outputs // tile.columns)
        if tiles * MOST_SPLITS >= MULTIPROCESSORS:
            break
    splits = min(max(MULTIPROCESSORS // tiles, 1), MOST_SPLITS, -(-num_pixels // (4 * tile.inner)))
    return tile, splits
