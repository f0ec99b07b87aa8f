"""Augmentation against a slow implementation in NumPy: one image at a time, uint32 arithmetic, np.pad."""

from __future__ import annotations

import numpy as np
import operator_backends
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fflfast import use_backend
from fflfast.ops import augment_reference, backends
from fflfast.ops.augment import IMPLEMENTATIONS, augment, normalization_table, normalize

MEAN, STD = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
TABLE = normalization_table(MEAN, STD)


def slow_hash(*words: int) -> int:
    """Hash in wrapping uint32, as a kernel would."""
    state = np.uint32(0)
    with np.errstate(over="ignore"):
        for word in words:
            for half in (word & 0xFFFFFFFF, word >> 32):
                x = (state ^ np.uint32(half)) + np.uint32(0x9E3779B9)
                x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
                x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
                state = x ^ (x >> np.uint32(15))
    return int(state)


def slow_augment(images, index, *, seed, epoch, view, pad, flip):
    out = []
    for image, place in zip(images.numpy(), index.tolist(), strict=True):
        key = slow_hash(seed, epoch, place, view)
        top, left = (slow_hash(key, stream) * (2 * pad + 1) // 2**32 for stream in (0, 1))
        height, width = image.shape[1:]
        image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        image = image[:, top : top + height, left : left + width]
        if flip and slow_hash(key, 2) >= 2**31:
            image = image[:, :, ::-1]
        image = np.broadcast_to(image, (3, height, width)).astype(np.float64)
        scaled = (image - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        out.append(scaled.astype(np.float32))
    return torch.from_numpy(np.stack(out))


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[name for name in IMPLEMENTATIONS if name in operator_backends.NAMES])
def forced(request):
    """Each backend that can run here in turn; the interpreter, which takes milliseconds for a program, few images."""
    if (reason := backends.missing(request.param)) is not None:
        (pytest.fail if operator_backends.REQUIRED else pytest.skip)(reason)
    with use_backend(request.param):
        yield 9 if request.param == "reference" else 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of products that wrap
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 7, 2**63 - 1])
@pytest.mark.parametrize(
    ("shape", "pad"),
    [((9, 3, 32, 32), 4), ((9, 1, 8, 8), 1), ((9, 3, 5, 12), 4), ((9, 3, 6, 6), 0), ((3, 1, 1, 1), 0)],
    ids=["cifar", "gray", "pad of H-1, not square", "no pad", "one pixel"],
)
@pytest.mark.parametrize("flip", [True, False], ids=["flip", "no flip"])
def test_equals_the_slow_implementation_bit_for_bit(forced, seed, shape, pad, flip):
    images = random_images(*shape)[:forced]
    index = torch.arange(len(images)) * 1_234_567_891 + 2**33
    options = {"seed": seed, "epoch": 3, "view": 1, "pad": pad, "flip": flip}
    got = augment(images, index, table=TABLE, **options)
    assert got.dtype == torch.float32
    assert torch.equal(got, slow_augment(images, index, **options))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_strided_input_is_read_right_and_left_alone(forced):
    images = random_images(6, 8, 8, 3).permute(0, 3, 1, 2)[:, :, :, ::2]
    before = images.clone()
    options = {"seed": 1, "epoch": 1, "view": 0, "pad": 2, "flip": True}
    index = torch.arange(12)[::2]
    assert torch.equal(augment(images, index, table=TABLE, **options), slow_augment(before, index, **options))
    assert torch.equal(images, before)


def test_the_composition_of_a_batch_changes_nothing():
    images, index = random_images(16, 3, 16, 16), torch.arange(100, 116)
    whole = augment(images, index, seed=5, epoch=2, table=TABLE)
    chosen = torch.tensor([11, 3, 3, 0])
    assert torch.equal(augment(images[chosen], index[chosen], seed=5, epoch=2, table=TABLE), whole[chosen])


@pytest.mark.parametrize(
    "changed",
    [{"seed": 6}, {"seed": 5 + 2**32}, {"epoch": 3}, {"view": 1}],
    ids=["seed", "high half of the seed", "epoch", "view"],
)
def test_each_word_changes_the_outcome(changed):
    images, index = random_images(1, 3, 16, 16).expand(64, -1, -1, -1), torch.arange(64)
    words = {"seed": 5, "epoch": 2, "view": 0}
    first = augment(images, index, table=TABLE, **words)
    second = augment(images, index, table=TABLE, **(words | changed))
    unlike = (first != second).flatten(1).any(1).sum().item()
    assert unlike > 55  # 64 · (1 − 1/162) are expected to differ
    assert len({image.numpy().tobytes() for image in first}) > 40


def decisions(index, *, epoch=0, view=0, pad=4):
    """Read (top, left, flipped) off images whose red is the row and whose green is the column."""
    row, column = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    image = torch.stack([row, column, column]).to(torch.uint8).expand(len(index), -1, -1, -1)
    plain = torch.arange(256.0)[:, None].expand(-1, 3)
    seen = augment(image, index, seed=11, epoch=epoch, view=view, pad=pad, table=plain).long()
    flipped = seen[:, 1, 6, 5] > seen[:, 1, 6, 6]
    left = torch.where(flipped, seen[:, 1, 6, 5], seen[:, 1, 6, 6]) - 6 + pad
    return seen[:, 0, 6, 6] - 6 + pad, left, flipped.long()


def chi_square(cell: torch.Tensor, cells: int) -> float:
    counts = torch.bincount(cell, minlength=cells).double()
    assert len(counts) == cells
    expected = counts.sum() / cells
    return float(((counts - expected) ** 2 / expected).sum())


def test_offsets_and_flips_are_uniform_and_independent():
    top, left, flipped = decisions(torch.arange(40_000))
    # 161 degrees of freedom: a uniform source stays between these with probability 1 − 2·10⁻⁴
    assert 102 < chi_square((top * 9 + left) * 2 + flipped, 162) < 238


@pytest.mark.parametrize("other", [{"epoch": 1}, {"view": 1}, {"shift": 1}], ids=["epoch", "view", "neighbour"])
def test_decisions_of_neighbours_are_independent(other):
    index = torch.arange(40_000)
    first = decisions(index)
    second = decisions(index + other.pop("shift", 0), **other)
    assert 40 < chi_square(first[0] * 9 + second[0], 81) < 136  # 80 degrees of freedom
    assert chi_square(first[2] * 2 + second[2], 4) < 21.1  # 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_counters_may_be_tensors(forced, dtype):
    images, index = random_images(4, 3, 8, 8), torch.arange(4)
    words = {"seed": 5, "epoch": 2, "view": 3}
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in words.items()}
    wanted = augment_reference.augment(images, index, *words.values(), 4, True, TABLE, False)
    for name in (*words, None):
        some = {**words, name: tensors[name]} if name else tensors
        assert torch.equal(augment(images, index, table=TABLE, **some), wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_tables_dtype_and_either_memory_order(forced, dtype, channels_last, channels):
    images, index, table = random_images(3, channels, 9, 7), torch.arange(3), TABLE.to(dtype)
    order = torch.channels_last if channels_last else torch.contiguous_format
    like = torch.empty(3, 3, 9, 7, memory_format=order)
    for got, wanted in (
        (
            augment(images, index, seed=1, epoch=2, pad=3, table=table, channels_last=channels_last),
            augment_reference.augment(images, index, 1, 2, 0, 3, True, TABLE, False),
        ),
        (normalize(images, table, channels_last=channels_last), augment_reference.normalize(images, TABLE, False)),
    ):
        assert got.dtype == dtype
        assert got.stride() == like.stride()
        assert torch.equal(got, wanted.to(dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_table_may_lie_in_memory_as_it_likes(forced):
    images, index = random_images(2, 3, 8, 8), torch.arange(2)
    wide = torch.zeros(512, 6)
    wide[::2, ::2] = TABLE
    for table in (TABLE.contiguous(), wide[::2, ::2]):
        assert torch.equal(
            augment(images, index, seed=1, epoch=2, table=table), augment(images, index, seed=1, epoch=2, table=TABLE)
        )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_the_registered_operator(channels_last):
    images, index = random_images(3, 3, 8, 8), torch.arange(3)
    words = [torch.tensor(value) for value in (5, 2, 3)]
    arguments = (images, index, *words, 2, True, TABLE.to(torch.bfloat16), channels_last)
    torch.library.opcheck(torch.ops.fflfast.augment, arguments)
    assert torch.equal(torch.ops.fflfast.augment(*arguments), augment_reference.augment(*arguments))


def test_exported_it_is_made_of_pytorchs_operators_alone():
    class Pipeline(torch.nn.Module):
        def forward(self, images, index):
            return augment(images, index, seed=1, epoch=2, pad=2, table=TABLE)

    images, index = random_images(3, 3, 8, 8), torch.arange(3)
    program = torch.export.export(Pipeline(), (images, index))
    assert not any("fflfast" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(images, index), Pipeline()(images, index))


def test_under_vmap_the_reference_runs():
    images, index = random_images(2, 3, 3, 8, 8), torch.arange(6).view(2, 3)
    options = {"seed": 1, "epoch": 2, "table": TABLE}
    got = torch.func.vmap(lambda x, i: augment(x, i, **options))(images, index)
    wanted = augment(images.flatten(0, 1), index.flatten(), **options)
    assert torch.equal(got.flatten(0, 1), wanted)


class NoWaiting(TorchDispatchMode):
    """Raise where a value would have to come back from a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "waits for the device"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    with NoWaiting():
        epoch = torch.zeros((), dtype=torch.int64)
        augment(random_images(4, 3, 8, 8), torch.arange(4), seed=1, epoch=epoch, table=TABLE)
        # The mode sees the registered operator as one; this is what is inside.
        augment_reference.augment(random_images(4, 3, 8, 8), torch.arange(4), 1, epoch, 0, 4, True, TABLE, True)


def test_compiles_without_a_graph_break():
    images, index = random_images(4, 3, 8, 8), torch.arange(4)
    compiled = torch.compile(augment, fullgraph=True, backend="eager")
    for epoch in (torch.tensor(0), torch.tensor(9), 1, 2, 2**62):
        options = {"seed": 1, "epoch": epoch, "pad": 2, "table": TABLE}
        assert torch.equal(compiled(images, index, **options), augment(images, index, **options))


def test_no_image(forced):
    assert augment(random_images(0, 1, 8, 8), torch.arange(0), seed=0, epoch=0, table=TABLE).shape == (0, 3, 8, 8)


def test_normalize_and_table():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    value = np.arange(256.0)[:, None]
    want = ((value - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    assert np.array_equal(TABLE.numpy(), want)
    assert np.array_equal(normalize(images, TABLE)[0].flatten(1).numpy(), want.T)
    assert torch.equal(normalize(images.expand(2, 3, -1, -1), TABLE)[1], normalize(images, TABLE)[0])
    assert normalize(images, TABLE.double()).dtype == torch.float64


X, INDEX = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2)


@pytest.mark.parametrize(
    ("images", "index", "options", "message"),
    [
        (X.float(), INDEX, {}, r"images: expected uint8 \(B, C, H, W\), got float32 \(2, 3, 8, 8\)"),
        (X[0], INDEX, {}, r"images: expected \(B, C, H, W\) with 1 or 3 channels"),
        (X[:, :2], INDEX, {}, "1 or 3 channels"),
        (X, INDEX[:1], {}, r"index: expected int64 \(2,\), one per image, got int64 \(1,\)"),
        (X, INDEX.int(), {}, r"index: expected int64 \(2,\), one per image, got int32"),
        (X, [0, 1], {}, "index: expected int64 .* got a list"),
        (X, INDEX.to("meta"), {}, "index is on meta but images on cpu"),
        (X, INDEX, {"pad": 8}, "pad: expected 0 ≤ pad < 8 for 8×8 images.* got 8"),
        (X, INDEX, {"pad": -1}, "pad: expected 0 ≤ pad"),
        (X, INDEX, {"pad": 1.0}, "pad: expected an int, got 1.0"),
        (X, INDEX, {"table": TABLE.T}, r"table: expected float \(256, 3\)"),
        (X, INDEX, {"table": TABLE.to("meta")}, "table is on meta but images on cpu"),
        (X, INDEX, {"table": TABLE.clone().requires_grad_()}, "table: expected no gradient to be asked for"),
        (
            X,
            INDEX,
            {"view": torch.zeros((), dtype=torch.int64, device="meta")},
            "view: expected ints or tensors on cpu",
        ),
        (X, INDEX, {"seed": -1}, "seed: expected 0 ≤ seed < 2"),
        (X, INDEX, {"seed": 2**63}, "seed: expected 0 ≤ seed < 2"),
        (X, INDEX, {"epoch": 1.5}, "epoch: expected an int or a 0-dim integer tensor, got 1.5"),
        (X, INDEX, {"epoch": True}, "epoch: expected an int"),
        (X, INDEX, {"epoch": torch.tensor([1])}, r"epoch: expected an int or a 0-dim integer tensor, got int64 \(1,\)"),
        (X, INDEX, {"view": torch.tensor(1.0)}, "view: expected an int or a 0-dim integer tensor"),
    ],
)
def test_errors(images, index, options, message):
    options = {"seed": 0, "epoch": 0, "table": TABLE, "pad": 2} | options
    with pytest.raises((TypeError, ValueError), match=message):
        augment(images, index, **options)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((1, 2), (1, 2, 3)), ((1, 2, 3), (1, 0, 1)), ((1, 2, 3), (1, -1, 1)), ((1, 2, float("nan")), (1, 1, 1))],
    ids=["two", "zero std", "negative std", "nan"],
)
def test_table_errors(mean, std):
    with pytest.raises(ValueError, match="mean, std: expected"):
        normalization_table(mean, std)
