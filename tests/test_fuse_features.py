"""fuse_features and nn.FeatureFusion against the composition of torch modules on the concatenated feature maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fflfast
from fflfast.functional import NormParams, fuse_features
from fflfast.nn import FeatureFusion


class Composition(nn.Module):
    """The fusion module as one would write it: concatenate, then one torch module after the other."""

    def __init__(self, in_channels, out_channels, num_classes):
        super().__init__()
        total = sum(in_channels)
        self.depthwise = nn.Conv2d(total, total, 3, padding=1, groups=total, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(total)
        self.pointwise = nn.Conv2d(total, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)
        self.classifier = nn.Linear(out_channels, num_classes)

    def forward(self, features):
        size = [min(x.shape[d] for x in features) for d in (2, 3)]
        x = torch.cat([F.adaptive_avg_pool2d(f, size) for f in features], 1)
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        x = F.relu(self.pointwise_norm(self.pointwise(x)))
        return self.classifier(x.mean((2, 3)))


CASES = {
    "two_equal": [(4, 5, 8, 8), (4, 5, 8, 8)],
    "unequal_channels": [(3, 2, 7, 7), (3, 9, 7, 7), (3, 1, 7, 7)],
    "unequal_sizes": [(2, 4, 8, 6), (2, 3, 5, 9)],
    "one_pixel": [(6, 4, 1, 1), (6, 4, 1, 1)],
    "batch_of_one": [(1, 4, 3, 3), (1, 4, 3, 3)],
    "wide": [(2, 3, 1, 33), (2, 3, 1, 33)],
}


def pair(shapes, dtype=torch.float64, out_channels=6):
    torch.manual_seed(0)
    channels = [s[1] for s in shapes]
    ours, plain = FeatureFusion(channels, out_channels, 7).to(dtype), Composition(channels, out_channels, 7).to(dtype)
    with torch.no_grad():
        for norm in (ours.depthwise_norm, ours.pointwise_norm):
            for t in (norm.weight, norm.bias, norm.running_mean):
                t.add_(torch.randn_like(t) * 0.5)
            norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
    plain.load_state_dict(ours.state_dict(), strict=True)
    features = [torch.randn(s, dtype=dtype) for s in shapes]
    return ours, plain, features


def step(module, features):
    leaves = [f.detach().clone(memory_format=torch.preserve_format).requires_grad_() for f in features]
    out = module(leaves)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves), *(p.grad for p in module.parameters())]


def assert_same(a, b, rtol=1e-9, atol=1e-11):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen_depthwise", "frozen_pointwise"])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_running_statistics(case, mode, layout):
    ours, plain, features = pair(CASES[case])
    features = [f.contiguous(memory_format=layout) for f in features]
    for module in (ours, plain):
        module.train(mode != "eval")
        module.depthwise_norm.train(mode not in ("eval", "frozen_depthwise"))
        module.pointwise_norm.train(mode not in ("eval", "frozen_pointwise"))
    for _ in range(3):
        assert_same(step(ours, features), step(plain, features))
        assert_same(ours.buffers(), plain.buffers())
        ours.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0])
def test_momentum(momentum):
    ours, plain, features = pair(CASES["two_equal"])
    for module in (ours, plain):
        module.depthwise_norm.momentum = module.pointwise_norm.momentum = momentum
    for scale in (1.0, 2.0, 0.5):
        scaled = [f * scale for f in features]
        ours(scaled)
        plain(scaled)
        assert_same(ours.buffers(), plain.buffers())


def test_norms_without_running_statistics_use_the_batch_always():
    ours, plain, features = pair(CASES["two_equal"])
    for module in (ours, plain):
        for name, old in (("depthwise_norm", module.depthwise_norm), ("pointwise_norm", module.pointwise_norm)):
            fresh = nn.BatchNorm2d(old.num_features, track_running_stats=False).double()
            setattr(module, name, fresh)
        module.eval()
    assert_same(step(ours, features), step(plain, features))


@pytest.mark.parametrize(
    "distort",
    [lambda f: f + 1e3, lambda f: f * 1e-4, lambda f: f * 0 + 2.0, lambda f: f * 1e4],
    ids=["large_mean", "tiny", "dead_channels", "huge"],
)
def test_float32_error_is_that_of_the_composition(distort):
    _, exact, features = pair(CASES["two_equal"])
    features = [distort(f) for f in features]
    ours, plain, _ = pair(CASES["two_equal"], torch.float32)
    for module in (ours, plain):
        module.load_state_dict(exact.state_dict())
    truth = step(exact, features)
    got = step(ours, [f.float() for f in features])
    baseline = step(plain, [f.float() for f in features])
    for g, b, t in zip(got, baseline, truth, strict=True):
        size = t.abs().max()
        assert (g - t).abs().max() <= 4 * (b - t).abs().max() + 1e-6 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["features", "autocast"])
def test_low_precision_keeps_norms_in_float32(dtype, how):
    ours, plain, features = pair(CASES["two_equal"], torch.float32)
    expected = plain(features)
    if how == "autocast":
        with torch.autocast(torch.get_default_device().type, dtype):
            got = ours(features)
    else:
        got = ours([f.to(dtype) for f in features])
    assert got.dtype == dtype
    assert {t.dtype for t in ours.state_dict().values()} == {torch.float32, torch.int64}
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(ours.depthwise_norm.running_var, plain.depthwise_norm.running_var, rtol=2e-2, atol=1e-3)
    got.float().sum().backward()
    assert ours.depthwise.weight.grad.dtype == torch.float32


def test_functional_returns_biased_statistics_and_changes_nothing():
    ours, _, features = pair(CASES["unequal_channels"])
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    x = F.conv2d(torch.cat(features, 1), ours.depthwise.weight, padding=1, groups=12)
    norms = [
        NormParams(n.weight, n.bias, n.running_mean, n.running_var, n.eps, True)
        for n in (ours.depthwise_norm, ours.pointwise_norm)
    ]
    pooled, statistics = fuse_features(features, ours.depthwise.weight, norms[0], ours.pointwise.weight, norms[1])
    assert pooled.shape == (3, 6)
    torch.testing.assert_close(statistics.depthwise_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(statistics.depthwise_var, x.var((0, 2, 3), correction=0))
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    frozen = [n._replace(training=False) for n in norms]
    statistics = fuse_features(features, ours.depthwise.weight, frozen[0], ours.pointwise.weight, frozen[1]).statistics
    assert statistics == (None, None, None, None)


def test_meta_tensors_and_float64_under_autocast():
    module = FeatureFusion([3, 2], 4, 5).to("meta")
    features = [torch.empty(2, c, 4, 4, device="meta") for c in (3, 2)]
    assert module(features).shape == module.eval()(features).shape == (2, 5)
    ours, _, wide = pair(CASES["two_equal"])
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert ours(wide).dtype == torch.float64


def test_untracked_running_statistics_stay_as_they_are():
    ours, plain, features = pair(CASES["two_equal"])
    for module in (ours, plain):
        module.depthwise_norm.track_running_stats = False
    assert_same(step(ours, features), step(plain, features))
    assert_same(ours.buffers(), plain.buffers())
    assert ours.depthwise_norm.num_batches_tracked == 0


def test_gradcheck():
    ours, _, features = pair([(2, 2, 3, 3), (2, 1, 3, 3)], out_channels=2)
    norms = [NormParams(n.weight, n.bias, None, None, n.eps, True) for n in (ours.depthwise_norm, ours.pointwise_norm)]
    inputs = [*[f.requires_grad_() for f in features], ours.depthwise.weight, ours.pointwise.weight]

    def pooled(a, b, depthwise, pointwise):
        return fuse_features([a, b], depthwise, norms[0], pointwise, norms[1]).pooled

    assert torch.autograd.gradcheck(pooled, inputs)


def test_compiles_without_a_graph_break():
    ours, plain, features = pair(CASES["unequal_channels"])
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same([compiled(features)], [plain(features)])
    assert_same(ours.buffers(), plain.buffers())
    ours.eval()
    assert_same([compiled(features)], [plain.eval()(features)])


def test_initial_weights_have_the_published_spread():
    module = FeatureFusion([64, 64], 64, 100)
    assert sum(p.numel() for p in module.parameters()) == 16_228
    assert sum(p.numel() for p in FeatureFusion([64] * 3, 64, 100).parameters()) == 21_028
    assert sum(p.numel() for p in FeatureFusion([512, 512], 512, 1000).parameters()) == 1_049_576
    assert module.depthwise.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
    assert module.pointwise.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ([], TypeError, "non-empty"),
        (torch.randn(2, 3, 4, 4), TypeError, "sequence"),
        ([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4)], TypeError, r"features\[1\]"),
        ([torch.randn(2, 3, 4, 4), None], TypeError, "NoneType"),
        ([torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)], ValueError, "one batch size"),
        ([torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)], ValueError, "3 [+] 4 channels"),
        ([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 0, 4)], ValueError, "H and W"),
        ([torch.randn(1, 3, 1, 1), torch.randn(1, 3, 1, 1)], ValueError, "more than 1 value per channel"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)] * 2, TypeError, "floating-point"),
    ],
    ids=["empty", "a_tensor", "three_dimensions", "none", "batches", "channels", "no_rows", "one_value", "integers"],
)
def test_errors(features, error, message):
    m = FeatureFusion([3, 3], 4, 5)
    norms = [
        NormParams(n.weight, n.bias, n.running_mean, n.running_var, n.eps, True)
        for n in (m.depthwise_norm, m.pointwise_norm)
    ]
    with pytest.raises(error, match=message):
        fuse_features(features, m.depthwise.weight, norms[0], m.pointwise.weight, norms[1])


def test_module_refuses_other_channels_and_a_single_value():
    with pytest.raises(ValueError, match=r"\(3, 3\) channels, got \(3, 4\)"):
        FeatureFusion([3, 3], 4, 5)([torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)])
    with pytest.raises(ValueError, match="positive"):
        FeatureFusion([3, 0], 4, 5)
    with pytest.raises(ValueError, match="sequence of positive ints"):
        FeatureFusion(5, 4, 3)
    with pytest.raises(ValueError, match="must be on meta"):
        FeatureFusion([3], 4, 5)([torch.empty(2, 3, 4, 4, device="meta")])
    with pytest.raises(ValueError, match="more than 1 value"):
        FeatureFusion([3, 3], 4, 5)([torch.randn(1, 3, 1, 1)] * 2)
    fflfast.nn.FeatureFusion([3, 3], 4, 5).eval()([torch.randn(1, 3, 1, 1)] * 2)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("depthwise_norm", nn.InstanceNorm2d(6)),
        ("pointwise_norm", nn.GroupNorm(1, 4)),
        ("depthwise_norm", nn.Identity()),
        ("pointwise", nn.Conv2d(6, 4, 1)),
        ("pointwise", nn.Conv2d(6, 4, 1, bias=False, groups=2)),
        ("depthwise", nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False)),
        ("depthwise", nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False, padding_mode="reflect")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_modules_that_compute_something_else_are_refused(name, other):
    module = FeatureFusion([3, 3], 4, 5)
    setattr(module, name, other)
    with pytest.raises(TypeError, match=f"expected {name} to be"):
        module([torch.randn(2, 3, 4, 4)] * 2)


def test_another_classifier_and_its_hooks_run():
    module, seen = FeatureFusion([3, 3], 4, 5), []
    module.classifier.register_forward_hook(lambda *args: seen.append("linear"))
    features = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    module(features)
    assert seen == ["linear"]
    module.classifier = nn.Linear(4, 5, bias=False)
    assert module([f.bfloat16() for f in features]).dtype == torch.bfloat16
    module.classifier = nn.Identity()
    assert module(features).shape == (2, 4)


def test_arguments_that_no_operator_takes():
    m = FeatureFusion([3, 3], 4, 5)
    features = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    one, two = (NormParams(n.weight, n.bias, None, None, n.eps, True) for n in (m.depthwise_norm, m.pointwise_norm))
    weights = m.depthwise.weight, m.pointwise.weight
    with pytest.raises(TypeError, match="NormParams"):
        fuse_features(features, weights[0], None, weights[1], two)
    with pytest.raises(ValueError, match="eps must be 0 or more"):
        fuse_features(features, weights[0], one._replace(eps=-1.0), weights[1], two)
    with pytest.raises(TypeError, match="floating-point tensor or None"):
        fuse_features(features, weights[0], one._replace(weight=torch.ones(6, dtype=torch.int64)), weights[1], two)
    with pytest.raises(ValueError, match="C_out"):
        fuse_features(features, weights[0], one, weights[1][:0], two)
    with pytest.raises(TypeError, match="pointwise_weight must be a dense"):
        fuse_features(features, weights[0], one, None, two)
    with pytest.raises(TypeError, match="non-empty sequence"):
        m(iter(features))
    with pytest.raises(TypeError, match=r"features\[1\] must be a dense"):
        m([features[0], features[1][0]])
    m.depthwise_norm.momentum = -0.1
    with pytest.raises(ValueError, match="momentum of 0 or more"):
        m(features)
