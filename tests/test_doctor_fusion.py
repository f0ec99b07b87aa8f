"""`fflfast doctor` holds the fusion against float64, and a backend that is wrong anywhere is reported."""

from __future__ import annotations

import re

import pytest
import torch

from fflfast import cli, doctor, doctor_fusion
from fflfast.accuracy import tensor_share
from fflfast.nn import FeatureFusion
from fflfast.ops import fuse_features, fusion_backends, fusion_reference
from fflfast.ops.backends import Implementation

STAGES = fusion_reference.STAGES
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fusion_alone(monkeypatch):
    checks = doctor._checks

    def fusion(device, quick):
        return [check for check in checks(device, quick) if check.operator == "fuse_features"]

    monkeypatch.setattr(doctor, "_checks", fusion)


def replace(monkeypatch, refuses=lambda *case: None, **functions):
    """Let the reference run stage by stage, some of them our own."""
    broken = Implementation({**STAGES, **functions}, refuses)
    monkeypatch.setattr(fusion_backends, "IMPLEMENTATIONS", {"reference": broken})


def run():
    """(exit code, lines) of a quick look at the reference on the CPU."""
    lines = []
    return doctor.doctor("reference", "cpu", quick=True, write=lines.append), lines


def test_the_stages_and_the_composition_are_within_the_contract(monkeypatch):
    assert run()[0] == 0
    replace(monkeypatch)
    code, lines = run()
    assert code == 0, [line for line in lines if line.startswith("MISS")]
    shown = [line for line in lines if re.search(r"  \d\.\d\d$", line)]
    assert len(shown) == sum(check.quick for check in doctor_fusion.CHECKS)


def test_the_native_library_is_within_the_contract():
    if doctor.backends()["cpu"] != "available":
        pytest.skip(doctor.backends()["cpu"])
    lines = []
    assert doctor.doctor("cpu", "cpu", quick=True, write=lines.append) == 0, lines


def _moments_from_squares(features, weight):
    h = fusion_reference._depthwise(features, weight)
    mean = h.mean((0, 2, 3))
    m2 = (h.square().mean((0, 2, 3)) - mean.square()) * (h.numel() / h.shape[1])
    return [torch.stack([mean, m2])]


def _wrong_for_odd_heights(features, *rest):
    moments = STAGES["depthwise_statistics"](features, *rest)
    return [moments[0] * (1 + 1e-4 * (features[0].shape[2] % 2)), *moments[1:]]


def _scaled(stage, index, factor=1.0001):
    def run(*args):
        out = [*STAGES[stage](*args)]
        out[index] = out[index] * factor
        return out

    return run


def _no_eps(features, dw, norm1, pw, norm2, tf32):
    return STAGES["inference"](features, dw, norm1._replace(eps=0.0), pw, norm2, tf32)


def _biased_variance(moments, counts, running, batches, momentum):
    STAGES["update_running"](moments, [count + 1 for count in counts], running, batches, momentum)


def _forgets_the_counter(moments, counts, running, batches, momentum):
    STAGES["update_running"](moments, counts, running, [b.clone() for b in batches], momentum)


def _spoils_a_feature_map(features, *rest):
    out = STAGES["pointwise"](features, *rest)
    features[0].detach().view(-1)[0] += 1e-3
    return out


def _raises(*args):
    raise RuntimeError("no kernel image\nis available")


class _Unsteady:
    calls = 0

    def __call__(self, *args):
        type(self).calls += 1
        return STAGES["backward_pool"](*args) * (1 + 2.0**-23 * (self.calls % 3))


def _nan_spreads(features, *rest):
    return STAGES["inference"](features, *rest) + 0 * features[0].sum()


FAULTS = {
    "squares": ({"depthwise_statistics": _moments_from_squares}, "mean 1000, deviation 0.01: "),
    "odd-sizes": ({"depthwise_statistics": _wrong_for_odd_heights}, "maps as slices of others: "),
    "product": ({"pointwise": _scaled("pointwise", 1)}, "two maps, float32: "),
    "pooled": ({"pool": _scaled("pool", 0)}, r"one pixel: pooled \("),
    "counts": ({"pool": _scaled("pool", 1)}, "gradient of depthwise.weight"),
    "weight": ({"backward_sums": _scaled("backward_sums", 1)}, r"two maps, float32: gradient of pointwise\.weight \("),
    "map": (
        {"backward_inputs": _scaled("backward_inputs", 1)},
        r"gradients of the maps alone: gradient of feature map 1",
    ),
    "no-eps": ({"inference": _no_eps}, r"inference: pooled \(\S+ × the allowed error\)"),
    "biased": ({"update_running": _biased_variance}, r"two maps, float32: depthwise_norm\.running_var"),
    "counter": ({"update_running": _forgets_the_counter}, r"cumulative average: depthwise_norm\.num_batches_tracked"),
    "in-place": ({"pointwise": _spoils_a_feature_map}, r"input left alone \(has to be exact and is not\)"),
    "unsteady": ({"backward_pool": _Unsteady()}, r"same bits when repeated \(has to be exact and is not\)"),
    "raises": ({"pool": _raises}, "raised RuntimeError: no kernel image$"),
    "nan": ({"inference": _nan_spreads}, r"a sample with NaN, inference: pooled \(has to be exact and is not\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_backend_is_reported(monkeypatch, fault):
    functions, words = FAULTS[fault]
    replace(monkeypatch, **functions)
    code, lines = run()
    misses = [line for line in lines if line.startswith("MISS reference on cpu, eager, fuse_features, ")]
    assert code == 1
    assert any(re.search(words, line) for line in misses), misses
    assert lines[-1] == f"{len(misses)} missed"


def test_the_command_exits_1(monkeypatch, capsys):
    replace(monkeypatch, pool=_scaled("pool", 0))
    assert cli.main(["doctor", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    assert "MISS reference on cpu, eager, fuse_features" in capsys.readouterr().out


def test_a_refused_case_is_no_miss_and_reasons_are_said_once(monkeypatch):
    replace(monkeypatch, lambda maps, *rest: "has no float16" if maps[0].dtype.itemsize == 2 else None)
    code, lines = run()
    assert code == 0
    (said,) = [line for line in lines if "has no float16" in line]
    assert said.startswith("  reference leaves 'two maps, bfloat16', 'two maps, float16', ")


@pytest.mark.parametrize("broken", [False, True])
def test_compiled_runs_count(monkeypatch, broken):
    if doctor._compiler_problem(CPU):
        pytest.skip("torch.compile has no compiler here")
    monkeypatch.setattr(doctor, "_checks", lambda device, quick: doctor_fusion.CHECKS[:1])
    monkeypatch.setattr(fuse_features, "has_kernels", lambda kind: True)
    replace(monkeypatch, **({"backward_inputs": _scaled("backward_inputs", 0)} if broken else {}))
    lines = []
    assert doctor.doctor("reference", "cpu", write=lines.append) == broken
    assert any("reference compiled" in line for line in lines)
    assert any(line.startswith("MISS reference on cpu, compiled, ") for line in lines) == broken


def test_the_plain_composition_is_that_of_torch_modules():
    module = FeatureFusion([3, 4], 5, 2).double()
    features = [torch.randn(2, c, 4, 4, dtype=torch.float64) for c in (3, 4)]
    modules = torch.nn.Sequential(
        module.depthwise, module.depthwise_norm, torch.nn.ReLU(), module.pointwise, module.pointwise_norm,
        torch.nn.ReLU(),
    )  # fmt: skip
    expected = modules(torch.cat(features, 1)).mean((2, 3))
    torch.testing.assert_close(doctor_fusion.plain_pooled(module, features), expected)


def test_the_rule():
    exact = torch.tensor([1.0, -2.0, float("nan")], dtype=torch.float64)
    plain = exact + torch.tensor([0.0, 1e-6, 0.0])
    assert tensor_share(exact + 4e-6, [plain], exact, 0.0) == pytest.approx(1)
    assert tensor_share(exact + 4e-6, [exact, plain], exact, 0.0) == pytest.approx(1)
    assert tensor_share(exact + 4e-6, [exact], exact, 1e-6) == pytest.approx(2)
    assert tensor_share(exact.nan_to_num(0.0), [plain], exact, 1.0) == torch.inf
    assert tensor_share(exact[:2], [plain], exact, 1.0) == torch.inf
