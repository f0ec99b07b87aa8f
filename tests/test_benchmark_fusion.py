"""The fusion's benchmark counts bytes and products as the design does, and tells a wrong variant from a right one."""

from __future__ import annotations

import sys

import pytest
import torch
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


def small(**options):
    return module("fusion_cases").FusionCase(3, 2, 4, 5, **options)


@pytest.mark.parametrize(
    ("mode", "units"), [("forward", 3), ("backward", 4), ("forward+backward", 7), ("inference", 1)]
)
def test_minimal_bytes_of_two_maps_in_units_of_the_input(mode, units):
    case = module("fusion_cases").FusionCase(256, 2, 512, 7, torch.bfloat16)
    a = 256 * 1024 * 49 * 2
    assert case.bytes_of_inputs == a
    assert case.minimal_bytes(mode) == units * a
    three = module("fusion_cases").FusionCase(256, 3, 2048, 7)
    y = 256 * 49 * 2048 * 4
    assert three.minimal_bytes(mode) == {"forward": 8, "backward": 11, "forward+backward": 19, "inference": 3}[mode] * y


def test_flops():
    case = module("fusion_cases").FusionCase(128, 2, 64, 8)
    values, channels = 128 * 64, 128
    assert case.flops("forward") == 2 * values * channels * 64 + 18 * values * channels
    assert case.flops("forward+backward") == 3 * case.flops("forward")


def test_the_floor_is_the_larger_of_copy_and_product(monkeypatch):
    cases = module("fusion_cases")
    monkeypatch.setattr(cases, "copy_rate", lambda *a: 1e9)
    monkeypatch.setattr(cases, "matrix_rate", lambda *a: 1e9)
    floors = small().floors(CPU)
    assert set(floors) == {"forward+backward", "forward", "backward", "inference"}
    for mode, floor in floors.items():
        assert floor["copy_ms"] == pytest.approx(small().minimal_bytes(mode) / 1e6)
        assert floor["product_ms"] == pytest.approx(small().flops(mode) / 1e6)
        assert floor["floor_ms"] == max(floor["copy_ms"], floor["product_ms"])
        assert floor["bound"] == ("bytes" if floor["copy_ms"] > floor["product_ms"] else "product")


def test_rates_are_positive_and_of_this_machine():
    floor = module("floor")
    assert 1e6 < floor.copy_rate([(100, 100)], torch.float32, CPU) < 1e13
    assert 1e6 < floor.matrix_rate(64, 64, 64, torch.float32, CPU) < 1e15


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["training", "inference"])
def test_every_variant_computes_the_same_and_a_wrong_one_shows(kind, channels_last):
    variants = module("fusion_variants")
    case = small(channels_last=channels_last)
    data = case.draw(CPU)
    calls = {name: factory(case) for name, factory in variants.fusion_variants_for(case, CPU, False)}
    assert ("eager-channels_last" in calls) != channels_last
    calls["wrong"] = variants._eager(CPU, channels_last)(case)
    with torch.no_grad():
        calls["wrong"].pointwise_norm.weight.mul_(1.01)
        calls["wrong"].depthwise_norm.momentum = 0.2
    for call in calls.values():
        call.train(kind == "training")
    for name, errors in variants.fusion_errors(case, data, calls, kind).items():
        assert len(errors) == (3 if kind == "training" else 1)
        assert {error > 1e-3 for error in errors.values()} == {name == "wrong"}, (name, errors)


def test_memory_saved_for_backward():
    variants, memory = module("fusion_variants"), module("memory")
    case = small()
    data = case.draw(CPU)
    saved = {name: memory.saved_bytes(f(case), data) for name, f in variants.fusion_variants_for(case, CPU, False)}
    a, y = case.bytes_of_inputs, case.minimal_bytes("forward") // 2 - case.bytes_of_inputs
    # cat, depthwise, norm (in place of which relu's result is kept), and the same of y; ours: the maps and y.
    assert saved["eager"] > 3 * a + 2 * y
    if "cpu" in saved:
        assert a + y < saved["cpu"] < 2 * a + y


def rows_of(report, **changes):
    made = dict.fromkeys(report.FIELDS, "") | {
        "case": "c", "batch": "2", "maps": "2", "channels": "4", "size": "8", "layout": "channels_last",
        "dtype": "bfloat16", "mode": "forward+backward", "bound": "bytes", "floor_share": "0.8", "saved_mb": "2",
        "peak_mb": "5", "output_error": "1e-3", "gradient_error": "2e-3", "launches": "8", "device": "a GPU",
    }  # fmt: skip
    rows = [
        {**made, "variant": "cuda", "median_ms": "1", **changes},
        {**made, "variant": "eager", "median_ms": "5", "saved_mb": "6", "launches": "30"},
        {**made, "variant": "compile", "median_ms": "1.5"},
    ]
    return rows + [{**row, "mode": "inference", "median_ms": str(float(row["median_ms"]) * 2)} for row in rows]


def test_targets_of_a_gpu_are_met_or_missed():
    report = module("fusion_report")
    found = {what: (asked, got, outcome) for _, what, asked, got, outcome in report.targets(rows_of(report))}
    assert found == {
        "forward+backward, share of the floor (bytes)": ("≥ 0.7", "0.8", "met"),
        "forward+backward, × eager channels_last": ("≥ 4", "5", "met"),
        "forward+backward, × torch.compile": ("≥ 2", "1.5", "missed, 0.75 of it"),
        "launches of a step": ("≤ 8", "8", "met"),
        "inference, × eager": ("≥ 6", "5", "missed, 0.83 of it"),
        "saved for backward ÷ eager's": ("≤ 0.5", "0.333", "met"),
    }
    bound = [{**row, "bound": "product"} for row in rows_of(report, launches="9")]
    found = {what: (asked, got, outcome) for _, what, asked, got, outcome in report.targets(bound)}
    assert found["forward+backward, × eager channels_last"] == ("≥ 1.5", "5", "met")
    assert found["launches of a step"] == ("≤ 8", "9", "missed, 0.89 of it")
    assert not any("compile" in what for what in found)


def test_ours_in_nchw_is_held_against_eager_in_channels_last():
    report = module("fusion_report")
    rows = rows_of(report)
    rows += [{**row, "case": "d", "layout": "nchw", "median_ms": "1.25"} for row in rows if row["variant"] == "cuda"]
    rows.append({**rows[1], "case": "d", "layout": "nchw", "median_ms": "50"})
    found = [got for name, what, _, got, _ in report.targets(rows) if "nchw" in name and "channels_last" in what]
    assert found == ["4"]


def test_the_command_measures_a_case(tmp_path, monkeypatch, capsys):
    fusion = module("fusion")
    monkeypatch.setattr(fusion, "fusion_cases_for", lambda device: (small(), small(channels_last=True)))
    arguments = ["fusion", "--out", str(tmp_path), "--time", "0.001"]
    for name in (*module("calls").available_backends(CPU), "eager"):
        arguments += ["--variant", name]
    monkeypatch.setattr(sys, "argv", arguments)
    assert fusion.main() == 0
    rows = module("report").read(tmp_path / "fusion.csv")
    assert len(rows) == 2 * 2 * len(fusion.MODES)
    for row in rows:
        assert float(row["output_error"]) < 1e-4
        assert float(row["floor_share"]) > 0
        assert (row["saved_mb"] == "") == (row["mode"] == "inference")
        assert row["command"]
        assert row["torch"]
    text = (tmp_path / "fusion.md").read_text(encoding="utf-8")
    assert "(3, 2, 4, 5), nchw, float32" in text
    assert "× eager | ≥ 1 |" in text
    assert capsys.readouterr().out.count("% of the floor") == len(rows)
