"""The CPU kernels of the feature fusion by themselves: instruction sets, tiles and strips, memory, threads. What each
stage must compute is tested for every backend in test_fusion_stages.py."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import cpu_isas
import pytest
import torch
from test_fusion_stages import Problem, feature_maps, run_all

from fflfast.ops import fusion_backends, fusion_reference, native
from fflfast.ops.fusion_reference import Norm

if (reason := native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

isa = cpu_isas.isa
STAGES = fusion_backends.IMPLEMENTATIONS["cpu"]
cpu = SimpleNamespace(**STAGES.functions)
ONE = torch.ones(())


def run_float32(maps, out, **settings):
    run_all(STAGES, Problem(maps, out, torch.float32, **settings))


# ---- sizes, on every instruction set

# (batch, channels, height, width), columns of the pointwise product
SIZES = {
    "one_pixel": ((9, [5, 3], 1, 1), 4),
    "two_pixels": ((1, [4], 1, 2), 1),
    "eight_maps": ((3, [1, 2, 3, 5, 7, 11, 13, 17], 4, 3), 19),
    "whole_vectors": ((2, [16, 32], 7, 7), 64),
    "odd": ((2, [17, 33, 15], 5, 11), 67),
    "rows_of_one": ((4, [18], 9, 1), 3),
    "one_long_row": ((2, [5], 1, 64), 3),
    "images_in_a_chunk": ((37, [3, 4], 3, 5), 6),
    "one_image": ((1, [19, 2], 32, 32), 5),
    "strips": ((2, [3, 18], 64, 64), 4),
    "last_strip_of_one_row": ((1, [2], 33, 64), 2),
    "wide": ((1, [2], 3, 1100), 2),
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", SIZES)
def test_each_instruction_set(isa, size, layout):
    maps, out = SIZES[size]
    run_float32(feature_maps(*maps, layout), out)


# Groups of images: apart (many rows, small weight), or after one another.
GROUPS = {
    "apart": ((70, [3, 2], 8, 8), 5),
    "apart_and_uneven": ((101, [2, 4], 7, 7), 3),
    "in_turn": ((6, [515, 515], 25, 14), 260),
    "one_image_each": ((9, [3], 40, 30), 2),
}


@pytest.mark.parametrize("training", [(True, True), (False, False)], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_images(group, training):
    maps, out = GROUPS[group]
    run_float32(feature_maps(*maps), out, training=training)


# ---- memory

LAYOUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns_first": lambda x: x.mT.contiguous().mT,
    "cropped": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "rows_cropped": lambda x: torch.cat([x, x], 2)[:, :, x.shape[2] :],
    "part_of_the_channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 1:-1:2],
    "every_second_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one_channel_for_all": lambda x: x[:, :1].expand(x.shape),
    "one_image_for_all": lambda x: x[:1].expand(x.shape),
    "one_row_for_all": lambda x: x[:, :, :1].expand(x.shape),
    "one_value": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("channels", [1, 5, 16, 21])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa, layout, channels):
    plain = feature_maps(3, [channels, 2], 6, 5)
    maps = [LAYOUTS[layout](plain[0].float()), plain[1].float()]
    if maps[0].shape[1] == 0:
        pytest.skip("no channels are left")
    contiguous = [x.contiguous() for x in maps]
    for got, expected in zip(forward_and_backward(maps, 4), forward_and_backward(contiguous, 4), strict=True):
        assert torch.equal(got, expected)
    *grads, _ = forward_and_backward(maps, 4, gradients_alone=True)
    assert [g.stride() for g in grads] == [torch.empty_like(x).stride() for x in maps]


def forward_and_backward(maps, out, *, gradients_alone=False):
    """What all stages return, in the order in which a training step calls them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    channels, batch = sum(x.shape[1] for x in maps), maps[0].shape[0]
    pixels = maps[0].shape[2] * maps[0].shape[3]
    depthwise, pointwise = draw(channels, 1, 3, 3) * 0.4, draw(out, channels, 1, 1) * channels**-0.5
    count = torch.tensor(float(batch * pixels))
    moments1 = cpu.depthwise_statistics(maps, depthwise)[0]
    norm1 = Norm(moments1[0], moments1[1], count, draw(channels), draw(channels), 1e-5, True)
    y, moments2 = cpu.pointwise(maps, depthwise, norm1, pointwise, [], True, False)
    norm2 = Norm(moments2[0], moments2[1], count, draw(out), draw(out), 1e-5, True)
    pooled, active = cpu.pool(y, norm2)
    grad = draw(batch, out)
    sums2 = cpu.backward_pool(grad, active, pixels)
    arguments = (grad, maps, depthwise, norm1, pointwise, y, norm2, sums2, True, False)
    sums1, weight_gradient, *kept = cpu.backward_sums(*arguments)
    gradients = cpu.backward_inputs(maps, depthwise, norm1, sums1, kept, (1 << len(maps) + 1) - 1)
    if gradients_alone:
        return gradients
    frozen = [n._replace(m2=n.m2 / n.count, count=ONE, training=False) for n in (norm1, norm2)]
    inferred = cpu.inference(maps, depthwise, frozen[0], pointwise, frozen[1], False)
    return [
        moments1, y, moments2, pooled, active, sums2, sums1, weight_gradient, *kept, *gradients, inferred,
    ]  # fmt: skip


def test_nothing_outside_a_feature_map_is_read(isa):
    """Maps at odd addresses in memory full of NaN."""
    plain = [x.float() for x in feature_maps(2, [5, 19], 7, 5)]
    maps = []
    for k, x in enumerate(plain):
        order = (0, 2, 3, 1) if k else (0, 1, 2, 3)
        sizes = [x.shape[d] + 2 for d in order]
        memory = torch.full([math.prod(sizes) + 1], math.nan)[1:].view(sizes)
        window = memory[1:-1, 1:-1, 1:-1, 1:-1].permute([order.index(d) for d in range(4)])
        maps.append(window.copy_(x))
        assert not window.is_contiguous()
    for got, expected in zip(forward_and_backward(maps, 3), forward_and_backward(plain, 3), strict=True):
        assert torch.equal(got, expected)
    assert all(map(torch.equal, maps, plain))  # and nothing is written


def test_images_two_billion_elements_apart():
    try:
        memory = torch.empty(2**31 + 200)  # never touched but for two images
    except RuntimeError:
        pytest.skip("this machine does not lend 8 GB of address space")
    near = [x.float() for x in feature_maps(2, [4, 3], 5, 5)]
    far = memory.as_strided((2, 4, 5, 5), (2**31, 25, 5, 1))
    far.copy_(near[0])
    got, expected = (forward_and_backward([x, near[1]], 3) for x in (far, near[0]))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(isa, seed):
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    batch, height, width = rng.choice([1, 2, 5]), rng.choice([1, 2, 3, 7, 13]), rng.choice([2, 3, 4, 8, 9])
    channels = [rng.choice([1, 2, 3, 5, 8, 16, 17]) for _ in range(count)]
    maps = []
    for x in feature_maps(batch, channels, height, width):
        layout = LAYOUTS[rng.choice([n for n in LAYOUTS if n != "part_of_the_channels" and "for_all" not in n])]
        maps.append(layout(x))
    training = (rng.random() < 0.7, rng.random() < 0.7)
    problem = Problem(maps, rng.choice([1, 4, 17, 33]), torch.float32, training=training, affine=rng.random() < 0.8)
    run_all(STAGES, problem, needs=rng.getrandbits(count + 1))


# ---- numbers


@pytest.mark.parametrize("size", [(5, 8, 8), (2, 64, 64), (300, 1, 1)])
@pytest.mark.parametrize("distort", ["large_mean", "outlier", "dead"])
def test_statistics_of_awkward_data(isa, distort, size):
    """E[x²] − E[x]² fails on the first, sums shifted by the first value on the second."""
    batch, height, width = size
    x = feature_maps(batch, [19], height, width)[0]
    if distort == "large_mean":
        x = 1000 + 1e-3 * x
    elif distort == "outlier":
        x = 1e-3 * x
        x[0, :, 0, 0] = 1e3
    else:
        x = torch.full_like(x, 3.0)
    x = x.float().double()
    identity = torch.zeros(19, 1, 3, 3, dtype=torch.float64)
    identity[:, :, 1, 1] = 1  # without the border's own variance
    exact = fusion_reference.depthwise_statistics([x], identity)[0]
    got = cpu.depthwise_statistics([x.float()], identity.float())[0]
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-12)
    # The same values as y: a frozen norm with scale 1 and an identity matrix.
    norm = Norm(torch.zeros(19), torch.ones(19), ONE, None, None, 0.0, False)
    matrix = torch.eye(19).view(19, 19, 1, 1)
    y, moments = cpu.pointwise([x.float()], identity.float(), norm, matrix, [], True, False)
    exact = fusion_reference._moments(y.double().mT[:, :, :, None])
    torch.testing.assert_close(moments.double(), exact, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_where_it_does_in_pytorch(isa, value):
    maps = [x.float() for x in feature_maps(3, [4, 17], 5, 6)]
    maps[0][1, 2, 3, 3] = value
    depthwise, pointwise = torch.full((21, 1, 3, 3), 0.3), torch.linspace(0.5, 1, 21 * 6).view(6, 21, 1, 1)
    norm1 = Norm(torch.zeros(21), torch.ones(21), ONE, None, None, 1e-5, False)
    norm2 = Norm(torch.zeros(6), torch.ones(6), ONE, None, None, 1e-5, False)
    same = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    moments = [
        s([*maps], depthwise)[0] for s in (cpu.depthwise_statistics, fusion_reference.STAGES["depthwise_statistics"])
    ]
    torch.testing.assert_close(*moments, **same)
    assert moments[0][:, 2].isnan().any()
    arguments = (maps, depthwise, norm1, pointwise, norm2, False)
    torch.testing.assert_close(cpu.inference(*arguments), fusion_reference.inference(*arguments), **same)
    results = []
    for stages in (STAGES.functions, fusion_reference.STAGES):
        y = stages["pointwise"](maps, depthwise, norm1, pointwise, [], False, False)[0]
        pooled, active = stages["pool"](y, norm2)
        sums = stages["backward_sums"](
            torch.ones(3, 6), maps, depthwise, norm1, pointwise, y, norm2, torch.zeros(2, 6), True, False
        )
        results.append([y, pooled, active, *sums[:2]])
        results[-1] += stages["backward_inputs"](maps, depthwise, norm1, sums[0], sums[2:], 0b011)[:2]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **same)


# ---- threads


@pytest.mark.parametrize(
    ("shape", "out"),
    [((90, [3, 10], 7, 7), 17), ((2, [33, 5], 64, 64), 7), ((1, [3], 4, 4), 2), ((3, [700, 333], 9, 9), 300)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bits_do_not_depend_on_threads(shape, out, layout):
    maps = [x.float() for x in feature_maps(*shape, layout)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(forward_and_backward(maps, out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert [torch.equal(a, b) for a, b in zip(results[0], other, strict=True)] == [True] * len(other)


# ---- what is refused


def test_refuses():
    maps, weights = [torch.zeros(1, 2, 3, 3)], (torch.zeros(2, 1, 3, 3), torch.zeros(2, 2, 1, 1))
    assert STAGES.refuses(maps, *weights) is None
    assert "float32" in STAGES.refuses([m.bfloat16() for m in maps], *weights)
    assert "float32" in STAGES.refuses(maps, weights[0].double(), weights[1])
    assert "meta" in STAGES.refuses([m.to("meta") for m in maps], *weights)


def test_messages_of_the_operators():
    maps, depthwise = [torch.zeros(1, 2, 3, 3)], torch.zeros(2, 1, 3, 3)
    norm = Norm(torch.zeros(2), torch.ones(2), ONE, None, None, 1e-5, False)
    with pytest.raises(RuntimeError, match="of one batch and size"):
        cpu.depthwise_statistics([*maps, torch.zeros(1, 2, 3, 4)], depthwise)
    with pytest.raises(RuntimeError, match=r"depthwise weight \(2, 1, 3, 3\)"):
        cpu.depthwise_statistics(maps, torch.zeros(3, 1, 3, 3))
    with pytest.raises(RuntimeError, match="float32, got float64"):
        cpu.depthwise_statistics([m.double() for m in maps], depthwise)
    with pytest.raises(RuntimeError, match=r"\(C_out, 2, 1, 1\)"):
        cpu.pointwise(maps, depthwise, norm, torch.zeros(3, 4, 1, 1), [], False, False)
    with pytest.raises(RuntimeError, match=r"expected mean of shape \(2,\)"):
        cpu.pointwise(maps, depthwise, norm._replace(mean=torch.zeros(3)), torch.zeros(3, 2, 1, 1), [], False, False)
    with pytest.raises(RuntimeError, match="what fusion_backward_sums kept"):
        cpu.backward_inputs(maps, depthwise, norm, torch.zeros(2, 2), [], 1)
