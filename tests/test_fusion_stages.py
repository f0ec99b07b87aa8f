"""Each stage of the fusion operator on every backend, alone, against the reference's in float64."""

from __future__ import annotations

import operator_backends
import pytest
import torch

from fflfast.ops import fusion_reference
from fflfast.ops.fusion_reference import Norm

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float64: 2.0**-52}


@pytest.fixture(params=operator_backends.NAMES)
def stages(request):
    return operator_backends.fusion(request.param)


def draw(*shape, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale + shift
    return values.to(torch.get_default_device())


def feature_maps(batch, channels, height, width, layout="nchw", shift=0.0, scale=1.0):
    """Feature maps in float64 with the strides asked for."""
    maps = []
    for k, c in enumerate(channels):
        x = draw(batch, c, height, width, seed=k, scale=scale, shift=shift)
        here = layout if layout != "mixed" else ("nchw", "channels_last")[k % 2]
        if here == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        elif here == "sliced":  # every second row and channel of something larger
            large = torch.zeros(batch, 2 * c, 2 * height, width + 3, dtype=x.dtype)
            large[:, ::2, ::2, 1 : width + 1] = x
            x = large[:, ::2, ::2, 1 : width + 1]
        elif here == "expanded":
            x = x[:, :, :1, :].expand(batch, c, height, width)
        maps.append(x)
    return maps


def norm_of(moments, count, seed, *, training=True, affine=True):
    channels = moments.shape[1]
    weight = draw(channels, seed=seed) if affine else None
    bias = draw(channels, seed=seed + 1) + 0.3 if affine else None
    if training:
        values = torch.tensor(float(count), dtype=torch.float64, device="cpu")
        return Norm(moments[0], moments[1], values, weight, bias, 1e-5, True)
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return Norm(moments[0], moments[1] / count, one, weight, bias, 1e-5, False)


def in_dtype(value, dtype, wide):
    """Feature maps, weights, y and gradients in `dtype`, norms and sums in `wide`, strides kept."""
    if isinstance(value, Norm):
        return Norm(*(v.to(wide) if isinstance(v, torch.Tensor) else v for v in value))
    if isinstance(value, list):
        return [in_dtype(v, dtype, wide) for v in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        small = torch.empty_like(value, dtype=dtype) if 0 not in value.stride() else None
        if small is not None and small.stride() == value.stride():
            return small.copy_(value)
        # empty_like closes gaps: take the strides over by hand.
        size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        base = torch.zeros(size, dtype=dtype).as_strided(value.shape, value.stride())
        if 0 in value.stride():
            index = tuple(slice(0, 1) if s == 0 else slice(None) for s in value.stride())
            base[index] = value[index].to(dtype)
        else:
            base.copy_(value)
        return base
    return value


class Problem:
    """The float64 stages of one case in a row, and the same calls in another dtype on a backend."""

    def __init__(self, maps, out, dtype, *, training=(True, True), affine=True, float_weights=True):
        self.dtype, self.wide = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        # What the backend sees is rounded to its dtype; float64 then computes with the same values.
        self.maps = [in_dtype(in_dtype(x, dtype, None), torch.float64, None) for x in maps]
        channels = sum(x.shape[1] for x in maps)
        self.batch, self.pixels = maps[0].shape[0], maps[0].shape[2] * maps[0].shape[3]
        self.weight_dtype = torch.float32 if float_weights and dtype != torch.float64 else dtype
        self.depthwise = draw(channels, 1, 3, 3, seed=100, scale=0.4).to(dtype).double()
        self.pointwise = draw(out, channels, 1, 1, seed=101, scale=channels**-0.5).to(dtype).double()
        count = self.batch * self.pixels
        moments = fusion_reference.depthwise_statistics(self.maps, self.depthwise)[0]
        # Norms and y, the stages' inputs, are held exactly by float32 and the compute dtype.
        self.norm1 = self.held(norm_of(moments, count, 102, training=training[0], affine=affine))
        y = fusion_reference.pointwise(self.maps, self.depthwise, self.norm1, self.pointwise, [], False, False)[0]
        self.y = y.to(dtype).double()
        moments = fusion_reference._moments(self.y.mT[:, :, :, None])
        self.norm2 = self.held(norm_of(moments, count, 105, training=training[1], affine=affine))
        self.grad = draw(self.batch, out, seed=108).to(dtype).double()
        self.active = fusion_reference.pool(self.y, self.norm2)[1].to(self.wide).double()
        self.sums2 = fusion_reference.backward_pool(self.grad, self.active, self.pixels).to(self.wide).double()

    def held(self, norm):
        """What a norm is in float64 once the dtype of the sums has held it."""
        return in_dtype(in_dtype(norm, None, self.wide), None, torch.float64)

    def cast(self, *values):
        """The arguments as a backend gets them; weights and sums keep float32."""
        cast = [in_dtype(v, self.dtype, self.wide) for v in values]
        for i, v in enumerate(values):
            if v is self.depthwise or v is self.pointwise:
                cast[i] = v.to(self.weight_dtype)
            elif v is self.active or v is self.sums2:
                cast[i] = v.to(self.wide)
        return cast

    def check(self, stages, name, *arguments):
        """Run one stage three ways; returns (float64 results, the backend's)."""
        exact = as_list(fusion_reference.STAGES[name](*arguments))
        given = self.cast(*arguments)
        plain = as_list(fusion_reference.STAGES[name](*given))
        got = as_list(stages.functions[name](*given))
        for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=False)):
            if name == "backward_sums" and i >= 2:
                break  # what a backend keeps is its own affair
            close(g, p, e, f"{name}[{i}]")
        return exact, got


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def close(got, plain, exact, what):
    """At most 4 × the error of PyTorch's own operators in the same dtype, plus a floor."""
    assert got.shape == exact.shape, (what, got.shape, exact.shape)
    assert got.dtype == plain.dtype, (what, got.dtype, plain.dtype)
    if not exact.numel():
        return
    floor = 1e-6 + (EPS[got.dtype] if got.dtype.itemsize == 2 else 0)
    allowed = 4 * (plain.double() - exact).abs().max() + floor * exact.abs().max()
    error = (got.double() - exact).abs().max()
    assert error <= allowed, (what, float(error), float(allowed), float(exact.abs().max()))


def run_all(stages, problem, *, needs=None, tf32=False):
    p = problem
    count_bits = (1 << len(p.maps) + 1) - 1
    needs = count_bits if needs is None else needs
    kept = []
    if p.norm1.training:
        _, got = p.check(stages, "depthwise_statistics", p.maps, p.depthwise)
        kept = got[1:]
    given = [p.maps, p.depthwise, p.norm1, p.pointwise, [], p.norm2.training, tf32]
    exact = fusion_reference.pointwise(*given)
    plain = fusion_reference.pointwise(*p.cast(*given))
    for transient in ([kept] if kept else []) + [[]]:
        call = p.cast(*given)
        call[4] = transient
        y, moments = stages.functions["pointwise"](*call)
        assert y.is_contiguous()
        close(y, plain[0], exact[0], "pointwise[0]")
        if p.norm2.training:  # of y as this backend stored it
            truth = fusion_reference._moments(y.double().mT[:, :, :, None])
            own = fusion_reference._moments(y.to(p.wide).mT[:, :, :, None])
            close(moments[0], own[0], truth[0], "pointwise mean")
            close(moments[1], own[1], truth[1], "pointwise M2")
        else:
            assert moments.numel() == 0
    p.check(stages, "pool", p.y, p.norm2)
    p.check(stages, "backward_pool", p.grad, p.active, p.pixels)
    arguments = (p.grad, p.maps, p.depthwise, p.norm1, p.pointwise, p.y, p.norm2, p.sums2, True, tf32)
    exact, got = p.check(stages, "backward_sums", *arguments)
    sums1 = exact[0].to(p.wide).double()
    truth = fusion_reference.backward_inputs(p.maps, p.depthwise, p.norm1, sums1, exact[2:], needs)
    cast = p.cast(p.maps, p.depthwise, p.norm1, sums1)
    cast[3] = sums1.to(p.wide)
    plain_kept = fusion_reference.backward_sums(*p.cast(*arguments))[2:]
    plain = fusion_reference.backward_inputs(*cast, plain_kept, needs)
    result = stages.functions["backward_inputs"](*cast, got[2:], needs)
    for i, (g, q, e) in enumerate(zip(result, plain, truth, strict=True)):
        close(g, q, e, f"backward_inputs[{i}]")
        if needs >> i & 1 and i < len(p.maps):
            assert g.stride() == torch.empty_like(cast[0][i]).stride()
    # The same bits every time, and nothing left behind by the first call.
    again = stages.functions["backward_sums"](*p.cast(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(again[:2], got[:2], strict=True))
    if not (p.norm1.training or p.norm2.training):
        p.check(stages, "inference", p.maps, p.depthwise, p.norm1, p.pointwise, p.norm2, tf32)


SHAPES = {
    "two_8x8": ((2, [4, 3], 8, 8), 5),
    "one_map": ((3, [7], 5, 6), 3),
    "pixel": ((5, [2, 3], 1, 1), 4),
    "row": ((2, [3, 2], 1, 9), 2),
    "column": ((2, [3, 2], 7, 1), 2),
    "eight_maps": ((2, [1, 2, 3, 1, 2, 1, 1, 2], 3, 3), 4),
    "one_sample": ((1, [5, 4], 4, 4), 3),
    "many_channels": ((1, [40, 33], 3, 2), 37),
    "7x7": ((3, [16, 8], 7, 7), 12),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(stages, shape):
    maps, out = SHAPES[shape]
    run_all(stages, Problem(feature_maps(*maps), out, torch.float32))


@pytest.mark.parametrize("layout", ["channels_last", "mixed", "sliced", "expanded"])
def test_layouts(stages, layout):
    run_all(stages, Problem(feature_maps(2, [4, 6], 5, 4, layout), 5, torch.float32))


def takes(stages, dtype):
    reason = stages.refuses(
        [torch.zeros(1, 1, 2, 2, dtype=dtype)],
        torch.zeros(1, 1, 3, 3, dtype=dtype),
        torch.zeros(1, 1, 1, 1, dtype=dtype),
    )
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("float_weights", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(stages, dtype, layout, float_weights):
    takes(stages, dtype)
    problem = Problem(feature_maps(2, [8, 3], 4, 5, layout), 6, dtype, float_weights=float_weights)
    run_all(stages, problem)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [(False, False), (True, False), (False, True)], ids=str)
def test_frozen_norms_and_no_affine(stages, training, affine):
    run_all(stages, Problem(feature_maps(2, [4, 3], 4, 3), 5, torch.float32, training=training, affine=affine))


@pytest.mark.parametrize("needs", [0b000, 0b001, 0b010, 0b100, 0b110])
def test_needs(stages, needs):
    run_all(stages, Problem(feature_maps(2, [4, 3], 4, 3), 5, torch.float32), needs=needs)


@pytest.mark.parametrize(
    "distort", [{"shift": 1e3, "scale": 1e-3}, {"scale": 1e-5}, {"scale": 1e4}, {"scale": 0.0, "shift": 2.0}], ids=str
)
def test_statistics_of_awkward_data(stages, distort):
    problem = Problem(feature_maps(3, [3, 4], 6, 5, **distort), 4, torch.float32)
    problem.check(stages, "depthwise_statistics", problem.maps, problem.depthwise)


def test_counts_of_more_processes_are_read_on_the_device(stages):
    problem = Problem(feature_maps(2, [4, 3], 4, 3), 5, torch.float32)
    doubled = problem.norm2._replace(count=problem.norm2.count.to(torch.get_default_device()) * 2)
    problem.check(stages, "pool", problem.y, doubled)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("counted", [True, False])
def test_update_running(stages, momentum, counted):
    norms = [torch.nn.BatchNorm2d(c, momentum=momentum) for c in (5, 300)]
    factor = (-1.0 if counted else 0.0) if momentum is None else momentum
    if not counted:
        for norm in norms:
            norm.num_batches_tracked = None
    running = [t.clone() for norm in norms for t in (norm.running_mean, norm.running_var)]
    batches = [torch.zeros((), dtype=torch.int64) if counted else torch.zeros(0, dtype=torch.int64) for _ in norms]
    for step in range(3):
        values = [draw(4, norm.num_features, 3, 2, seed=step, shift=2.0).float() for norm in norms]
        for norm, v in zip(norms, values, strict=True):
            norm(v)
        moments = [fusion_reference._moments(v.double()).float() for v in values]
        counts = [torch.tensor(24.0, device=d) for d in ("cpu", torch.get_default_device())]
        stages.functions["update_running"](moments, counts, running, batches, [factor] * 2)
    for got, expected in zip(running, [t for n in norms for t in (n.running_mean, n.running_var)], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)
    assert [int(b) for b in batches if b.numel()] == ([3, 3] if counted else [])
