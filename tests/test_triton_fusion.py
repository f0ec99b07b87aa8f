"""The Triton kernels of fuse_features beyond what every backend's tests ask: tiles, policies, counters, launches.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import operator_backends
import pytest
import torch
from test_fusion_stages import Problem, draw, feature_maps, run_all

from fflfast import kernels
from fflfast.ops import fusion_reference

if (reason := kernels.available()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fflfast.kernels import device, fuse_features, fusion_plan
from fflfast.kernels import fusion_launch as launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The interpreter computes with NumPy, which warns of what IEEE arithmetic defines.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def stages():
    return operator_backends.fusion("triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in every direction of a problem that the interpreter can run."""
    few = {kind: (launch.Product(16, 16, 16, 1, 2),) for kind in launch.TILES}
    for name in ("TILES", "FORMING", "BACKWARD", "INFERENCE"):
        monkeypatch.setattr(launch, name, few)
    for name, value in {"BLOCKS": (16,), "MOST_COLUMNS": 16, "SWEEP_WARPS": 1, "MOST_PARTS": 3, "SUM_ROWS": 2}.items():
        monkeypatch.setattr(launch, name, value)
    for name, value in {
        "POOL_PIXELS": 8,
        "POOL_CHANNELS": 16,
        "IMAGES": 2,
        "IMAGE_CHANNELS": 16,
        "PREPARE": 16,
    }.items():
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(launch, "BY_WIDTH", launch.Sweep(16, 4, 16, 1))


def keep(monkeypatch, yes):
    monkeypatch.setattr(launch, "KEEP_FROM", dict.fromkeys(launch.KEEP_FROM, 0 if yes else 10**9))


# ---- several tiles, both ways to the product


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "formed"])
@pytest.mark.parametrize(
    ("dtype", "layout"), [(FP32, "nchw"), (FP32, "sliced"), (BF16, "channels_last"), (FP16, "mixed"), (BF16, "nchw")]
)
def test_several_tiles_in_every_direction(stages, small_tiles, monkeypatch, dtype, layout, kept):
    keep(monkeypatch, kept)
    problem = Problem(feature_maps(2, [17, 3], 5, 4, layout), 18, dtype)
    run_all(stages, problem)
    result = stages.functions["depthwise_statistics"](*problem.cast(problem.maps, problem.depthwise))
    assert len(result) == (1 if not kept else 3 if dtype.itemsize == 2 else 2)


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (5, 7)])
def test_inference_in_several_tiles(stages, small_tiles, size):
    problem = Problem(feature_maps(3, [17, 3], *size), 18, FP32, training=(False, False))
    arguments = (problem.maps, problem.depthwise, problem.norm1, problem.pointwise, problem.norm2, False)
    problem.check(stages, "inference", *arguments)


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_inference_shares_images_and_outputs(stages, small_tiles, monkeypatch, programs):
    monkeypatch.setattr(launch, "MULTIPROCESSORS", programs)
    problem = Problem(feature_maps(5, [4, 3], 3, 3), 35, FP32, training=(False, False))
    arguments = (problem.maps, problem.depthwise, problem.norm1, problem.pointwise, problem.norm2, False)
    problem.check(stages, "inference", *arguments)


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_of_the_weight_gradient(stages, small_tiles, monkeypatch, splits):
    monkeypatch.setattr(launch, "weight_gradient", lambda *case: (launch.TILES["16"][0], splits))
    run_all(stages, Problem(feature_maps(2, [17, 3], 5, 4), 18, BF16))


def test_kept_values_are_rounded_about_their_mean(stages, monkeypatch):
    keep(monkeypatch, True)
    problem = Problem(feature_maps(4, [6, 5], 6, 6, shift=60.0), 7, BF16)
    problem.depthwise[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0  # no border to stand out
    _, kept, centre = stages.functions["depthwise_statistics"](*problem.cast(problem.maps, problem.depthwise))
    h = fusion_reference._depthwise(problem.maps, problem.depthwise).permute(0, 2, 3, 1).flatten(0, 2)
    error = (kept.double() + centre.double() - h).abs().amax(0)
    allowed = 2.0**-8 * (h - centre.double()).abs().amax(0) + 1e-6 * h.abs().max()
    assert (error <= allowed).all()
    assert ((h.bfloat16().double() - h).abs().amax(0) > 2 * allowed).any()  # what rounding h itself would cost


def test_tf32_is_asked_for(stages, monkeypatch):
    seen = set()
    plan = fuse_features.plan

    def spy(*case):
        seen.add(plan(*case).precision)
        return plan(*case)

    monkeypatch.setattr(fuse_features, "plan", spy)
    run_all(stages, Problem(feature_maps(2, [4, 3], 4, 3), 5, FP32), tf32=True)
    assert "tf32" in seen
    seen.clear()
    run_all(stages, Problem(feature_maps(2, [4, 3], 4, 3), 5, FP32), tf32=False)
    assert seen == {"ieee"}


# ---- the same bits however a call is made


def everything(stages, problem):
    """The results of all stages, one after the other, each on what the one before gave."""
    f, p = stages.functions, problem
    maps, depthwise, norm1, matrix, norm2, grad = p.cast(
        p.maps, p.depthwise, p.norm1, p.pointwise, p.norm2, p.grad
    )  # fmt: skip
    moments, *kept = f["depthwise_statistics"](maps, depthwise)
    y, moments2 = f["pointwise"](maps, depthwise, norm1, matrix, kept, True, False)
    pooled, active = f["pool"](y, norm2)
    sums2 = f["backward_pool"](grad, active, p.pixels)
    sums1, dw, *kept2 = f["backward_sums"](grad, maps, depthwise, norm1, matrix, y, norm2, sums2, True, False)
    gradients = f["backward_inputs"](maps, depthwise, norm1, sums1, kept2, (2 << len(maps)) - 1)
    return [moments, *kept, y, moments2, pooled, active, sums2, sums1, dw, *kept2, *gradients]


def assert_bits(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g.float().nan_to_num(nan=7e7), e.float().nan_to_num(nan=7e7))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bits_repeat_and_counters_are_zero_again(stages, small_tiles, dtype):
    problem = Problem(feature_maps(2, [17, 3], 5, 4), 18, dtype)
    first = everything(stages, problem)
    assert device._counters
    assert all(not counters.any() for counters in device._counters.values())
    assert_bits(everything(stages, problem), first)


def test_counters_grow(monkeypatch):
    monkeypatch.setattr(device, "_counters", {})
    one = device.tickets(torch.zeros(1), 3)
    assert device.tickets(torch.zeros(1), device.COUNTERS) is one
    more = device.tickets(torch.zeros(1), device.COUNTERS + 1)
    assert more.numel() > device.COUNTERS
    assert not more.any()


def test_offsets_of_64_bits_and_counts_by_pointer_change_nothing(stages, monkeypatch):
    for layout in ("nchw", "channels_last", "mixed"):
        problem = Problem(feature_maps(2, [8, 3], 5, 4, layout), 6, BF16)
        expected = everything(stages, problem)
        with monkeypatch.context() as patch:
            plan = fuse_features.plan
            patch.setattr(fuse_features, "plan", lambda *case, plan=plan: plan(*case)._replace(wide=True))
            patch.setattr(fuse_features, "_count", lambda count, like: (count.to(like.device), 1))
            assert_bits(everything(stages, problem), expected)


def test_what_is_not_finite_goes_where_torch_lets_it_go(stages):
    problem = Problem(feature_maps(3, [3, 2], 5, 4), 4, FP32)
    problem.maps[0][1, 2, 3, 1] = float("nan")
    problem.maps[1][2, 0, 0, 0] = float("inf")
    y, moments = fusion_reference.pointwise(
        *problem.cast(problem.maps, problem.depthwise, problem.norm1, problem.pointwise, [], True, False)
    )
    got_y, got = stages.functions["pointwise"](
        *problem.cast(problem.maps, problem.depthwise, problem.norm1, problem.pointwise, [], True, False)
    )
    assert y.isnan().any()
    assert torch.equal(got_y.isnan(), y.isnan())
    assert torch.equal(got.isnan(), moments.isnan())
    pooled = fusion_reference.pool(*problem.cast(y.double(), problem.norm2))[0]
    got = stages.functions["pool"](*problem.cast(y.double(), problem.norm2))[0]
    assert torch.equal(got.isnan(), pooled.isnan())
    assert torch.equal(got.isinf(), pooled.isinf())
    assert pooled.isfinite().all(1).tolist()[:2] == [True, False]


# ---- policy


def test_strides_tell_how_wide_to_load():
    x = torch.zeros(2, 64, 7, 7, dtype=BF16)
    last = x.contiguous(memory_format=torch.channels_last)
    assert fusion_plan.strides([x])[:2] == (fusion_plan.WIDTH, 1)
    assert fusion_plan.strides([last])[:2] == (fusion_plan.CHANNELS, 4)
    assert fusion_plan.strides([last, x])[0] == fusion_plan.ANY
    assert fusion_plan.strides([last, last[:, :34]])[:2] == (fusion_plan.CHANNELS, 2)
    assert fusion_plan.strides([last[:, ::2]])[:2] == (fusion_plan.ANY, 1)
    assert fusion_plan.strides([x[:, :, :, ::2]])[:2] == (fusion_plan.ANY, 1)
    assert fusion_plan.strides([x[:, :, :1, :1]])[0] == fusion_plan.WIDTH  # of one column, whose stride is not used
    assert fusion_plan.strides([torch.zeros(3, 5, 1, 1)])[:2] == (fusion_plan.CHANNELS, 1)


def test_offsets_beyond_32_bits_are_known():
    base = torch.zeros(1, dtype=BF16).expand(2**31 // 64, 64, 1, 1)
    assert fusion_plan.plan([base], 64, 0, 1, False).wide
    assert not fusion_plan.plan([base[:1000]], 64, 0, 1, False).wide
    far = torch.zeros(1).as_strided((1,), (1,)).expand(1).view(1, 1, 1, 1).expand(2, 1, 1, 1)
    assert not fusion_plan.plan([far], 1, 0, 1, False).wide


@pytest.mark.parametrize("kind", launch.TILES)
def test_policy_covers_every_case(kind):
    def power(*numbers):
        return all(n > 0 and n & (n - 1) == 0 for n in numbers)

    for channels in ((1,), (3, 700), (64, 64), (100, 36, 8), (2048,) * 3):
        total = sum(channels)
        for unit in (1, 2, 4):
            for each in (launch.STATISTICS_PIXELS, launch.GRADIENT_PIXELS):
                tile = launch.sweep(channels, unit, each)
                assert power(*tile)
                assert tile.pixels % tile.lanes == 0
            for product in launch.BACKWARD[kind]:
                rows, columns, lanes = launch.epilogue(product, launch.block_of(channels, product.columns), unit)
                assert power(rows, columns, lanes)
                assert rows % lanes == 0
                assert product.rows % rows == 0
        for num_pixels in (1, 16, 49, 8192, 50176, 2**24):
            programs, pixels = launch.parts(7, num_pixels, 128)
            assert (programs - 1) * pixels < num_pixels <= programs * pixels  # none is empty, none is left out
            for table in (launch.TILES, launch.FORMING, launch.BACKWARD, launch.INFERENCE):
                tile = launch.product(num_pixels, total, table[kind])
                assert power(*tile[:4])
                assert min(tile[:3]) >= 16
            tile, splits = launch.weight_gradient(total, total, num_pixels, kind)
            assert 1 <= splits <= launch.MOST_SPLITS
    blocks = fusion_plan.first_blocks((5, 16, 17), 16)
    assert blocks == (0, 1, 2, 4)


def test_refuses_what_it_does_not_take():
    assert kernels.refuses_fusion([torch.zeros(1, 3, 4, 4)]) is None
    assert "meta" in kernels.refuses_fusion([torch.zeros(1, 3, 4, 4, device="meta")])
    assert "32 bits" in kernels.refuses_fusion([torch.zeros(1).expand(2**20, 1, 64, 64)])


# ---- what a launch would compile, without a device and without the interpreter

LAUNCHES = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from fflfast.kernels import fusion_offline

backend = make_backend(GPUTarget("cuda", 90, 32))
seen = set()
names = []
grids = []

def run(self, *args, grid, warmup, **kwargs):
    names.append(self.fn.__name__)
    grids.append((self.fn.__name__, grid))
    kwargs["debug"] = False
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    seen.add((self.fn.__name__, str(specialization), str(options)))

caught = fusion_offline._caught
class Spy:
    def __init__(self, name): self.inner = caught(name)
    def __enter__(self):
        found = self.inner.__enter__()
        JITFunction.run = run
        return found
    def __exit__(self, *error): return self.inner.__exit__(*error)
fusion_offline._caught = Spy

counts = []
for batch in (128, 127, 120, 128):
    fusion_offline._step("", (batch, (64, 64), 8), torch.bfloat16, weights=torch.bfloat16)
    counts.append(len(seen))
step = list(names)
fusion_offline._step("", (256, (512, 512), 7), torch.bfloat16, weights=torch.bfloat16, train=False)
frozen = names[len(step):]
grids.clear()
for train in (True, False):
    fusion_offline._step("", (70_000, (2, 3), 1), torch.bfloat16, train=train)
print(json.dumps([counts, step[: len(step) // 4], frozen, grids]))
"""


@pytest.fixture(scope="module")
def launched():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = str(Path(__file__).resolve().parent.parent)
    result = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment, cwd=root)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_large_batch_fits_the_grid(launched):
    """A GPU takes 2³¹ − 1 blocks along the first dimension, and 65,535 along the others."""
    grids = launched[3]
    assert {name for name, _ in grids} >= {"pool_kernel", "backward_pool_kernel", "inference_kernel"}
    assert ["pool_kernel", [70_000, 1]] in grids
    assert all(size <= 65_535 for _, grid in grids for size in grid[1:])


def test_launches_of_a_step_and_new_batches_do_not_recompile(launched):
    counts, step, frozen, _ = launched
    assert step == [
        "depthwise_statistics_kernel", "pointwise_kernel", "pool_kernel",
        "backward_pool_kernel", "backward_product_kernel", "weight_gradient_kernel", "backward_inputs_kernel",
        "update_running_kernel",
    ]  # fmt: skip
    assert frozen[0] == "inference_kernel"
    assert frozen.count("inference_kernel") == 1
    assert counts[0] == 8
    assert counts[-1] == counts[0]


def test_a_stage_reads_feature_maps_from_where_they_are(stages):
    """Nothing is copied: the kernels see the pointers and strides of views into one large tensor."""
    large = draw(2, 12, 9, 9, seed=3).float()
    before = large.clone()
    maps = [large[:, :5, 2:7, 3:8], large[:, 5:, ::2, ::2], large[:1, 3:4, :5, :5].expand(2, 3, 5, 5)]
    weight = draw(15, 1, 3, 3, seed=4).float()
    got = stages.functions["depthwise_statistics"](maps, weight)[0]
    torch.testing.assert_close(got, fusion_reference.depthwise_statistics(maps, weight)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(large, before)
