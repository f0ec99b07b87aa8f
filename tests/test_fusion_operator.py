"""fuse_features as an operator, on every backend and both autograd routes: gradients, composition, promises."""

from __future__ import annotations

import gc

import pytest
import torch
from fusion_pairs import assert_near, float_pair, functional_case, once_where_slow, steps
from test_fuse_features import Composition, pair, step
from torch import nn

import fflfast
from fflfast.functional import NormParams, fuse_features
from fflfast.nn import FeatureFusion

EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
small = pytest.mark.parametrize("case", ["two_equal", "unequal_channels", "one_pixel", "batch_of_one"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "frozen_depthwise", "frozen_pointwise", "eval"])
@small
def test_a_step_is_as_exact_as_the_composition(fusion_backend, route, case, mode, layout):
    once_where_slow(fusion_backend, route == "eager" or (case == "one_pixel" and layout == torch.contiguous_format))
    once_where_slow(fusion_backend, (layout == torch.channels_last) == (case in ("two_equal", "batch_of_one")))
    ours, plain, exact, features = float_pair(case)
    features = [f.contiguous(memory_format=layout) for f in features]
    for module in (ours, plain, exact):
        module.train(mode != "eval")
        for name in ("depthwise_norm", "pointwise_norm"):
            getattr(module, name).train(module.training and name.split("_")[0] not in mode)
    assert_near(*steps(ours, plain, exact, features))
    assert_near(ours.buffers(), plain.buffers(), exact.buffers())


@pytest.mark.parametrize("how", ["features", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_the_composition(fusion_backend, route, dtype, how):
    once_where_slow(fusion_backend, route == "eager")
    ours, plain, exact, features = float_pair("unequal_channels", dtype)

    def run(module, cast):
        with torch.autocast(torch.get_default_device().type, dtype):
            return step(module, [f.to(cast) for f in features])

    got = run(ours, torch.float32) if how == "autocast" else step(ours, [f.to(dtype) for f in features])
    baseline, truth = run(plain, torch.float32), step(exact, features)
    assert [g.dtype for g in got[1:4]] == [torch.float32 if how == "autocast" else dtype] * 3
    assert {g.dtype for g in got[4:]} == {torch.float32}
    # The classifier's square amplifies what rounding its logits leaves.
    assert_near(got, baseline, truth, 8 * EPS[dtype])
    assert_near(ours.buffers(), plain.buffers(), exact.buffers(), EPS[dtype])


def test_float64_gradients_of_the_stages(route, monkeypatch):
    import operator_backends

    operator_backends.use_fusion("stages", monkeypatch)
    ours, _, features = pair([(2, 2, 3, 3), (2, 1, 3, 3)], out_channels=2)
    norms = [
        NormParams(n.weight, n.bias, n.running_mean, n.running_var, n.eps, training)
        for n, training in ((ours.depthwise_norm, True), (ours.pointwise_norm, False))
    ]
    leaves = [
        *[f.requires_grad_() for f in features],
        *(p for n, p in ours.named_parameters() if "classifier" not in n),
    ]

    def pooled(a, b, depthwise, weight1, bias1, pointwise, weight2, bias2):
        one, two = norms[0]._replace(weight=weight1, bias=bias1), norms[1]._replace(weight=weight2, bias=bias2)
        return fuse_features([a, b], depthwise, one, pointwise, two).pooled

    assert torch.autograd.gradcheck(pooled, leaves)


def test_any_grad_output_and_a_second_backward(fusion_backend, route):
    once_where_slow(fusion_backend, route == "eager")
    leaves, rest = functional_case()
    pooled = fuse_features(leaves, *rest).pooled
    wanted = [*leaves, rest[0], rest[2]]
    first = torch.autograd.grad(pooled.sum(), wanted, retain_graph=True)  # an expanded gradient of stride 0
    kept = [g.clone() for g in first]
    weights = torch.randn(*pooled.shape[::-1]).T  # transposed
    second = torch.autograd.grad(pooled, wanted, weights, retain_graph=True)
    third = torch.autograd.grad(pooled, wanted, weights.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_bits_every_time_and_inputs_as_they_were(fusion_backend, route):
    once_where_slow(fusion_backend, route == "eager")
    leaves, rest = functional_case()
    before = [t.detach().clone() for t in (*leaves, rest[0], rest[2])]
    runs = []
    for _ in range(2):
        output = fuse_features(leaves, *rest)
        runs.append([output.pooled, *output.statistics, *torch.autograd.grad(output.pooled.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, rest[0], rest[2]), strict=True))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)], ids=str)
def test_gradients_only_where_they_are_wanted(fusion_backend, route, frozen):
    once_where_slow(fusion_backend, route == "eager")
    ours, plain, exact, features = float_pair("two_equal")
    for module in (ours, plain, exact):
        for p in (*module.depthwise.parameters(), *module.pointwise_norm.parameters()):
            p.requires_grad_(False)

    def run(module, dtype):
        maps = [f.to(dtype).requires_grad_(i not in frozen) for i, f in enumerate(features)]
        module(maps).square().sum().backward()
        return [t.grad for t in (*maps, *module.parameters())]

    got, baseline, truth = run(ours, torch.float32), run(plain, torch.float32), run(exact, torch.float64)
    assert [g is None for g in got] == [t is None for t in truth]
    assert_near(*([g for g in gs if g is not None] for gs in (got, baseline, truth)))


def test_a_second_derivative_says_that_it_does_not_exist(fusion_backend, route):
    leaves, rest = functional_case()
    pooled = fuse_features(leaves, *rest).pooled
    (gradient,) = torch.autograd.grad(pooled.square().sum(), leaves[:1], create_graph=True)
    if fusion_backend == "reference" and route == "eager":
        gradient.sum().backward()  # PyTorch's own operators have one
        return
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_an_empty_batch(fusion_backend, route):
    leaves, rest = functional_case()
    frozen = (rest[0], rest[1]._replace(training=False), rest[2], rest[3]._replace(training=False))
    empty = [x.detach()[:0].requires_grad_() for x in leaves]
    pooled = fuse_features(empty, *frozen).pooled
    assert pooled.shape == (0, 6)
    pooled.sum().backward()
    assert [x.grad.shape for x in empty] == [x.shape for x in empty]
    assert not rest[0].grad.any()


def test_without_gradients(fusion_backend, route):
    once_where_slow(fusion_backend, route == "eager")
    ours, plain, exact, features = float_pair("two_equal")
    with torch.no_grad():
        for mode in (True, False):
            got, baseline, truth = (
                [m.train(mode)([f.to(d) for f in features])]
                for m, d in ((ours, torch.float32), (plain, torch.float32), (exact, torch.float64))
            )
            assert not got[0].requires_grad
            assert_near(got, baseline, truth)
    with torch.inference_mode():
        assert_near([ours([f.float() for f in features])], baseline, truth)


def test_memory_saved_for_backward_is_less_than_half(fusion_backend):
    if fusion_backend == "reference":
        pytest.skip("the composition saves what autograd saves")
    torch.manual_seed(0)
    features = [torch.randn(4, 16, 8, 8, requires_grad=True) for _ in range(2)]

    def saved(module):
        sizes = {}

        def note(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = module(features)
        total = sum(sizes.values()) - sum(p.untyped_storage().nbytes() for p in module.parameters())
        del out
        gc.collect()
        return total

    ours, plain = FeatureFusion([16, 16], 16, 3), Composition([16, 16], 16, 3)
    assert saved(ours) <= saved(plain) / 2


def test_a_buffer_that_a_kernel_updates_counts_as_changed(fusion_backend):
    """So that autograd refuses what it saved of it before, instead of using the new value."""
    module = FeatureFusion([3, 2], 4, 5)
    frozen = module.depthwise_norm.running_var
    w = torch.ones(5, requires_grad=True)
    product = w * frozen  # saves the buffer
    module([torch.randn(2, c, 4, 4) for c in (3, 2)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_cumulative_average_and_missing_counter(fusion_backend, route):
    once_where_slow(fusion_backend, route == "eager")
    for counter in (True, False):
        ours, plain, exact, features = float_pair("two_equal")
        for module in (ours, plain, exact):
            for norm in (module.depthwise_norm, module.pointwise_norm):
                norm.momentum = None
                if not counter:
                    norm.num_batches_tracked = None
        for _ in range(3):
            ours([f.float() for f in features]), plain([f.float() for f in features]), exact(features)
        assert_near(ours.buffers(), plain.buffers(), exact.buffers())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_does_in_the_composition(fusion_backend, bad, mode):
    ours, plain, _, features = float_pair("two_equal")
    once_where_slow(fusion_backend, bad != bad)
    narrow = [f.float() for f in features]
    narrow[0][1, 2, 3, 3] = bad
    for module in (ours, plain):
        module.train(mode == "train")
    got, expected = step(ours, narrow), step(plain, narrow)
    assert [g.isnan().any().item() for g in got] == [e.isnan().any().item() for e in expected]
    assert all(torch.equal(g.isnan(), e.isnan()) for g, e in zip(got[3:], expected[3:], strict=True))


def test_more_than_eight_feature_maps_go_to_the_reference():
    module = FeatureFusion([2] * 9, 4, 5)
    features = [torch.randn(2, 2, 4, 4) for _ in range(9)]
    plain = Composition([2] * 9, 4, 5)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(features), plain(features))
    native = torch.get_default_device().type  # the backend of that name
    with fflfast.use_backend(native), pytest.raises(ValueError, match="1 to 8 feature maps"):
        module(features)


def test_only_the_second_norm_is_trained(fusion_backend, route):
    """The backward stops after its sums."""
    ours, plain, exact, features = float_pair("two_equal")
    for module in (ours, plain, exact):
        module.requires_grad_(False)
        module.pointwise_norm.requires_grad_(True)

    def run(module, dtype):
        module([f.to(dtype) for f in features]).square().sum().backward()
        return [p.grad for p in module.pointwise_norm.parameters()]

    assert_near(run(ours, torch.float32), run(plain, torch.float32), run(exact, torch.float64))


def test_norms_without_running_statistics_or_affine(fusion_backend, route):
    once_where_slow(fusion_backend, route == "eager")
    ours, plain, exact, features = float_pair("two_equal")
    for module in (ours, plain, exact):
        for name in ("depthwise_norm", "pointwise_norm"):
            old = getattr(module, name)
            dtype = old.weight.dtype
            setattr(module, name, nn.BatchNorm2d(old.num_features, affine=False, track_running_stats=False).to(dtype))
        module.eval()
    assert_near(*steps(ours, plain, exact, features))
