"""The SIMT emulation, on toy kernels whose answers are known: a test that it computes and a test that it notices."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import simt_build
import torch
from simt_build import EMULATOR

SEEDS = range(40)


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_int64),
        ("block", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


@pytest.fixture(scope="module", params=["registers", "ucontext"])
def toys(request):
    defines = ("-DFFLFAST_SIMT_UCONTEXT",) if request.param == "ucontext" else ()
    return simt_build.build(f"toys-{request.param}", EMULATOR / "toys.cu", defines=defines, torch_library=False)


@pytest.fixture(autouse=True)
def _reset(toys):
    toys.reset()


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(toys, name, x, out, *, grid=1, block=64, cluster=1, shared=4096, partial=None, counter=None, option=0):
    message = ctypes.create_string_buffer(200)
    launch = CLaunch(grid, block, cluster, shared, None)
    tensors = [pointer(t) for t in (x, out, partial, counter)]
    if toys.library.toy(name.encode(), launch, *tensors, option, message):
        raise RuntimeError(message.value.decode())
    return out


def integers(*shape, dtype=torch.float32):
    """Numbers whose sums are exact in any order."""
    return torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def block_sum(toys):
    x = integers(6, 128)
    return call(toys, "block_sum", x, torch.zeros_like(x), grid=6, block=128), x.sum(1, keepdim=True).expand(6, 128)


def shuffle_sum(toys):
    x = integers(10, 128)
    return call(toys, "shuffle_sum", x, torch.zeros_like(x), grid=5, block=128), x.sum(1, keepdim=True).expand(10, 128)


def warp_reverse(toys):
    x = integers(3, 2, 32, dtype=torch.float64)
    return call(toys, "warp_reverse", x, torch.zeros_like(x), grid=3), x.flip(2)


def cluster_sum(toys):
    x = integers(4, 4, 32)
    out = call(toys, "cluster_sum", x, torch.zeros_like(x), grid=16, block=32, cluster=4)
    return out, x.sum((1, 2), keepdim=True).expand(4, 4, 32)


def pipeline(toys):
    x = integers(5, 64, 4)
    return call(toys, "pipeline", x, torch.zeros_like(x), option=5), 2 * x


def last_block_sum(toys, counts_first=False):
    x, counter, partial = integers(9, 64), torch.zeros(1, dtype=torch.int32), torch.full((9, 2), float("nan"))
    out = [
        call(toys, "last_block_sum", x, torch.zeros(()), grid=9, block=64, partial=partial, counter=counter, option=how)
        for how in 2 * [int(counts_first)]
    ]
    return torch.stack(out), x.sum().expand(2)


KERNELS = {
    block_sum: (1, 2),
    shuffle_sum: (11, 12, 13, 14),
    warp_reverse: (21,),
    cluster_sum: (31, 32, 33, 34),
    pipeline: (41, 42, 43),
    last_block_sum: (51, 52, 53),
}
SITES = [(kernel, site) for kernel, sites in KERNELS.items() for site in sites]


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_in_every_order(toys, kernel):
    for seed in SEEDS:
        toys.seed(seed)
        result, truth = kernel(toys)
        assert torch.equal(result, truth), seed


@pytest.mark.parametrize(("kernel", "site"), SITES)
def test_notices_a_skipped_site(toys, kernel, site):
    toys.skip(site)
    noticed = 0
    for seed in SEEDS:
        toys.seed(seed)
        try:
            noticed += not torch.equal(*kernel(toys))
        except RuntimeError:
            noticed += 1
    assert (kernel.__name__, site) in toys.visited()
    assert noticed > 0


def test_skips_in_one_kernel_alone(toys):
    toys.skip(1, "shuffle_sum")
    assert torch.equal(*block_sum(toys))
    toys.skip(1, "block_sum")
    assert not torch.equal(*block_sum(toys))


def test_toys_have_no_other_sites(toys):
    assert toys.sites() == {s for _, s in SITES} | {61, 62}


def test_notices_a_count_before_the_value(toys):
    wrong = 0
    for seed in SEEDS:
        toys.seed(seed)
        result, truth = last_block_sum(toys, counts_first=True)
        wrong += not torch.equal(result, truth)
    assert wrong > 0


def test_one_resident_cluster_hides_that_but_is_right(toys):
    toys.resident(1)
    assert torch.equal(*last_block_sum(toys, counts_first=True))


def test_same_seed_same_run_other_seed_other_run(toys):
    def switches(seed):
        toys.reset()
        toys.seed(seed)
        toys.skip(2)
        return block_sum(toys)[0]

    assert torch.equal(switches(3), switches(3))
    assert not all(torch.equal(switches(3), switches(seed)) for seed in SEEDS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (0, "deadlock: 40 of 64 threads of a block wait at site 62"),
        (1, "wait at different sites, 6[12] and 6[12]"),
        (2, "wrote outside its 256 bytes of shared memory"),
        (3, "an access of 16 bytes is not aligned"),
        (4, "cluster_map expects"),
        (5, "bytes of stack"),
    ],
    ids=["deadlock", "sites", "shared", "alignment", "cluster", "stack"],
)
def test_misbehaviour_is_an_error(toys, how, message):
    out = torch.zeros(512)
    with pytest.raises(RuntimeError, match=message):
        call(toys, "misbehaving", None, out, shared=256, option=how)
    assert torch.equal(*block_sum(toys))  # the machine is whole again


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"grid": 0}, "blocks, got 0"),
        ({"grid": 2**31}, "blocks, got 2147483648"),
        ({"block": 48}, "whole warps, got 48"),
        ({"block": 2048}, "got 2048"),
        ({"grid": 6, "cluster": 4}, "divides the grid of 6, got 4"),
        ({"grid": 32, "cluster": 32}, "got 32"),
        ({"shared": 228 * 1024}, "shared memory a block, got 233472"),
    ],
    ids=str,
)
def test_refuses_what_a_device_refuses(toys, launch, message):
    x = integers(4096)
    with pytest.raises(RuntimeError, match=message):
        call(toys, "block_sum", x, torch.zeros_like(x), **launch)


def test_clusters_want_sm_90(toys):
    toys.device(capability=80, shared_per_block=163 * 1024)
    with pytest.raises(RuntimeError, match="1 before sm_90"):
        cluster_sum(toys)


def test_records_launches(toys):
    cluster_sum(toys)
    last_block_sum(toys)
    launches = toys.launches()
    assert [launch[:5] for launch in launches] == [
        ("cluster_sum", 16, 32, 4, 4096),
        *2 * [("last_block_sum", 9, 64, 1, 4096)],
    ]
    assert all(launch.switches >= launch.grid * launch.block for launch in launches)
    toys.reset()
    assert toys.launches() == []


def test_approximations_use_their_bound_and_no_more(toys):
    x = torch.rand(64 * 64, generator=torch.Generator().manual_seed(2)) * 20
    x[:4] = torch.tensor([0.0, 1.0, float("inf"), float("nan")])
    powers, logarithms = torch.empty_like(x), torch.empty_like(x)
    call(toys, "approximations", x, powers, grid=64, partial=logarithms)
    assert torch.equal(powers[[0, 2]], torch.tensor([1.0, float("inf")]))
    assert torch.equal(logarithms[:3], torch.tensor([float("-inf"), 0.0, float("inf")]))
    assert powers[3].isnan()
    assert logarithms[3].isnan()
    exact = x[4:].double()
    power_error = (powers[4:] / exact.exp2() - 1).abs().max()
    logarithm_error = ((logarithms[4:] - exact.log2()).abs() / exact.log2().abs().clamp(min=1)).max()
    for error in (power_error, logarithm_error):
        assert 0.9 * 2**-22 < error < 1.3 * 2**-22  # the bound, and float32's own rounding
    toys.error_share(0.0)
    call(toys, "approximations", x, powers, grid=64, partial=logarithms)
    torch.testing.assert_close(powers, x.double().exp2().float(), rtol=0, atol=0, equal_nan=True)


def test_sixteen_bits_to_float_exhaustively(toys):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    halves, bfloat16s = torch.empty(2**16), torch.empty(2**16)
    toys.library.widen(pointer(bits), pointer(halves), pointer(bfloat16s), ctypes.c_int64(2**16))
    for result, dtype in ((halves, torch.float16), (bfloat16s, torch.bfloat16)):
        truth = bits.view(dtype).float()
        assert torch.equal(result.isnan(), truth.isnan())
        assert torch.equal(result.view(torch.int32)[~truth.isnan()], truth.view(torch.int32)[~truth.isnan()])


def test_float_to_sixteen_bits_around_every_value_and_tie(toys):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    exact = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()]).view(torch.int32)
    # Each value of either type, the halfway points on either side of it, and the floats next to all of these.
    steps = torch.tensor([0, 1 << 12, 1 << 15, 1 << 11, 1 << 14])
    steps = torch.cat([steps, -steps])[:, None] + torch.tensor([-1, 0, 1])
    x = (exact[:, None].long() + steps.flatten()).to(torch.int32).flatten().view(torch.float32)
    subnormal_ties = (torch.arange(2**12, dtype=torch.float64) * 2.0**-25).float()  # halves' own unit is 2^-24
    generator = torch.Generator().manual_seed(3)
    anything = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat([x, subnormal_ties, -subnormal_ties, anything]).contiguous()
    halves, bfloat16s = torch.empty(len(x), dtype=torch.uint16), torch.empty(len(x), dtype=torch.uint16)
    toys.library.narrow(pointer(x), pointer(halves), pointer(bfloat16s), ctypes.c_int64(len(x)))
    for result, dtype in ((halves, torch.float16), (bfloat16s, torch.bfloat16)):
        truth = x.to(dtype)
        assert torch.equal(result.view(dtype).isnan(), x.isnan())
        assert torch.equal(result.view(torch.int16)[~x.isnan()], truth.view(torch.int16)[~x.isnan()])


def test_a_kernel_that_does_not_compile_says_why(tmp_path: Path):
    source = tmp_path / "wrong.cu"
    source.write_text('#include "simt.h"\nint x = "no number";\n')
    with pytest.raises(RuntimeError, match="invalid conversion"):
        simt_build.build("wrong", source, torch_library=False)
