"""The matrix intrinsics of csrc/cuda/simt.h, emulated, against plain products: which lane holds which number."""

from __future__ import annotations

import ctypes

import pytest
import simt_build
import torch
from simt_build import EMULATOR

SEEDS = range(6)
COUNT = 3  # products on one accumulator
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}


@pytest.fixture(scope="module")
def library():
    return simt_build.build("matrices", EMULATOR / "matrices.cu", torch_library=False)


@pytest.fixture(autouse=True)
def _reset(library):
    library.reset()


def call(library, name, given, out, *, blocks=1, option=0):
    given = given.contiguous()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, out)]
    if library.library.matrix_kernel(name.encode(), *pointers, ctypes.c_int64(blocks), option):
        raise RuntimeError("the launch was refused")
    return out


def integers(*shape, seed):
    """Numbers whose products and sums every dtype here holds exactly, in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def lanes():
    """g = lane // 4 and t = lane % 4 of the fragments' definition in the PTX ISA."""
    lane = torch.arange(32)
    return lane // 4, lane % 4


def words(matrix, rows, columns, dtype):
    """(32, words) of 32 bits: what each lane holds at (rows, columns), two 16-bit numbers a word, the lower first."""
    held = torch.stack([matrix[r, c] for r, c in zip(rows, columns, strict=True)], 1).to(dtype).contiguous()
    return held.view(torch.int32)


def fragments(a, b, c, dtype):
    """(32, 10) words: the four of a (16, K), the two of b (K, 8), the four floats of c (16, 8)."""
    g, t = lanes()
    along = [[t], [t + 4]] if dtype == torch.float32 else [[2 * t, 2 * t + 1], [2 * t + 8, 2 * t + 9]]
    a_rows, a_columns, b_rows = [], [], []
    for part in along:
        for rows in (g, g + 8):
            a_rows += [rows] * len(part)
            a_columns += part
        b_rows += part
    of_a = words(a, a_rows, a_columns, dtype)
    of_b = words(b, b_rows, [g] * len(b_rows), dtype)
    of_c = torch.stack([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]], 1)
    return torch.cat([of_a, of_b, of_c.view(torch.int32)], 1)


def product(library, name, seed=0):
    """(what the warp computes of Σ (c + a·b), the same in plain terms), both (16, 8)."""
    dtype = DTYPES[name]
    k = 8 if dtype == torch.float32 else 16
    a, b, c = (integers(COUNT, *shape, seed=seed + n) for n, shape in enumerate([(16, k), (k, 8), (16, 8)]))
    given = torch.stack([fragments(*operands, dtype) for operands in zip(a, b, c, strict=True)])
    held = call(library, name, given, torch.full((32, 4), float("nan")), option=COUNT)
    g, t = lanes()
    out = torch.full((16, 8), float("nan"))
    for n, (rows, columns) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
        out[rows, columns] = held[:, n]
    return out, (a @ b + c).sum(0)


def matrices(library, name, seed=0):
    """(what each lane holds of four 8 × 8 matrices of 16 bits, what it should hold), both (32, 4, 2)."""
    given = torch.randint(2**15, (4, 8, 8), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    out = call(library, name, given, torch.zeros(32, 4, dtype=torch.int32), option=48)
    g, t = lanes()
    wanted = given.mT if name == "transposed" else given
    truth = torch.stack([wanted[:, g, 2 * t], wanted[:, g, 2 * t + 1]], -1).transpose(0, 1)
    return out.view(torch.int16).view(32, 4, 2), truth


KERNELS = {**dict.fromkeys(DTYPES, product), "matrices": matrices, "transposed": matrices}
SITES = {product: (1,), matrices: (2, 3)}


@pytest.mark.parametrize("name", KERNELS)
def test_right_in_every_order(library, name):
    for seed in SEEDS:
        library.seed(seed)
        ours, truth = KERNELS[name](library, name, seed)
        assert torch.equal(ours, truth), seed


@pytest.mark.parametrize(("name", "site"), [(n, site) for n, kind in KERNELS.items() for site in SITES[kind]])
def test_notices_a_skipped_site(library, name, site):
    library.skip(site)
    noticed = 0
    for seed in SEEDS:
        library.seed(seed)
        noticed += not torch.equal(*KERNELS[name](library, name, seed))
    assert noticed > 0
    assert site in {s for _, s in library.visited()}


def test_there_are_no_other_sites(library):
    assert library.sites() == {1, 2, 3}


def test_rows_of_matrices_are_aligned(library):
    with pytest.raises(RuntimeError, match="refused"):
        call(library, "matrices", torch.zeros(256, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32), option=24)


def test_tensor_cores_see_the_tf32_part_of_a_float(library):
    a, b, c = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    a[:, 0], b[0, :] = 1 + 2**-10 + 2**-11, 1.0
    out = call(library, "tf32", fragments(a, b, c, torch.float32), torch.empty(32, 4), option=1)
    assert torch.equal(out, torch.full((32, 4), 1 + 2**-10))


def test_rounds_to_the_nearest_tf32(library):
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-(2**31), 2**31, (2**14,), generator=generator).to(torch.int32).view(torch.float32)
    x[:6] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, float("inf"), float("-inf"), float("nan")])
    bits = call(library, "rounded", x, torch.empty(2**14, dtype=torch.int32), blocks=2**14 // 32)
    ours = bits.view(torch.float32)
    assert torch.equal(ours[:5], torch.tensor([1 + 2**-10, -1 - 2**-10, 1.0, float("inf"), float("-inf")]))
    assert torch.equal(ours.isnan(), x.isnan())
    held = x.isfinite()
    assert torch.all(bits[held] & 0x1FFF == 0)
    # The bits of floats count up with their size: a tf32 number is 2^13 of them from the next.
    assert torch.all((bits[held].long() - x.view(torch.int32)[held]).abs() <= 2**12)
