"""The augmentation's benchmark counts bytes as the kernel does, and tells a wrong variant from a right one."""

from __future__ import annotations

import sys

import pytest
import torch
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

from fflfast import kernels

CPU = torch.device("cpu")


def small(**options):
    return module("augment_cases").AugmentCase(**{"batch": 5, "size": 8, "pad": 2, **options})


def calls_of(case):
    return {name: make(case) for name, make in module("augment_variants").augment_variants_for(case, CPU, False)}


def test_minimal_bytes_are_those_of_docs_kernels():
    case = module("augment_cases").AugmentCase(256, 224, dtype=torch.bfloat16)
    assert case.minimal_bytes == 256 * 224 * 224 * 3 * (1 + 2)
    assert round(case.minimal_bytes / 1e6) == 116
    assert case.bytes_of_inputs == case.draw(CPU).images.nbytes
    assert small().minimal_bytes == 5 * 8 * 8 * 3 * (1 + 4)


def test_the_floor_is_a_copy_of_the_least_bytes(monkeypatch):
    monkeypatch.setattr(module("augment_cases"), "copy_rate", lambda shapes, dtype, device: 1e9)
    floor = small().floors(CPU)["forward"]
    assert floor == {"minimal_mb": pytest.approx(4800 / 1e6), "copy_ms": pytest.approx(4800 / 1e6)}


def test_cases_have_names_of_their_own_and_the_asked_sizes():
    cases = module("augment_cases")
    for device in ("cpu", "cuda"):
        names = [case.name for case in cases.augment_cases_for(torch.device(device))]
        assert len(set(names)) == len(names)
    sizes = {(case.batch, case.size, case.dtype, case.layout) for case in cases.GPU_CASES}
    for batch, size in ((128, 32), (1024, 32), (8192, 32), (256, 224)):
        assert (batch, size, torch.float32, "nchw") in sizes
        assert (batch, size, torch.bfloat16, "channels_last") in sizes


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize(("dtype", "channels_last"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_every_variant_makes_images_of_the_reference_and_a_wrong_one_shows(pad, dtype, channels_last):
    variants = module("augment_variants")
    case = small(pad=pad, dtype=dtype, channels_last=channels_last)
    data, calls = case.draw(CPU), calls_of(case)
    assert set(calls) == {"reference", "eager", "eager-images"}
    wrong = {
        "reference": lambda *a: calls["eager"](*a),  # right images, but not of these draws
        "eager": lambda *a: calls["eager"](*a).roll(1, 3),
        "eager-images": lambda *a: calls["eager-images"](*a).double(),
    }
    torch.manual_seed(3)
    for name, far in variants.differences(case, data, calls).items():
        assert far <= (1e-6 if dtype == torch.float32 and name != "reference" else 0), name
    for name, far in variants.differences(case, data, wrong).items():
        assert far > 0.1, name
    assert variants.differences(case, data, wrong)["eager-images"] == float("inf")


def test_another_memory_order_shows():
    variants, case = module("augment_variants"), small()
    call = calls_of(case)["eager"]
    wrong = {"eager": lambda *a: call(*a).contiguous(memory_format=torch.channels_last)}
    assert variants.differences(case, case.draw(CPU), wrong)["eager"] == float("inf")


@pytest.mark.parametrize("name", ["eager", "eager-images"])
def test_what_people_write_draws_every_shift_and_flip(name):
    variants, case = module("augment_variants"), small(batch=16, size=6, pad=1)
    data, call = case.draw(CPU), calls_of(case)[name]
    torch.manual_seed(1)
    seen = torch.cat([variants.nearest(case, data, call(*data.arguments))[1] for _ in range(30)])
    # 480 draws of 18: every one is seen but for a chance of 3·10⁻¹¹.
    assert torch.bincount(seen, minlength=18).min() > 5


def test_ours_is_measured_through_triton_too_where_it_runs():
    variants, case = module("augment_variants"), small(batch=2)
    if kernels.available() or not kernels.interpreted():
        pytest.skip("Triton's interpreter is not in use")
    assert variants.differences(case, case.draw(CPU), {"triton": variants._ours("triton", CPU)(case)})["triton"] == 0


def test_a_call_without_gradients_is_captured_by_its_result():
    measure, case = module("measure"), small()
    data, call = case.draw(CPU), calls_of(case)["reference"]
    (result,) = measure.gradients(call, data)
    assert torch.equal(result, call(*data.arguments))


def test_the_command_measures_a_case_and_prints_its_table_again(tmp_path, monkeypatch, capsys):
    augment, report = module("augment"), module("report")
    monkeypatch.setattr(augment, "augment_cases_for", lambda device: (small(), small(channels_last=True)))
    names = ("reference", "eager", "eager-images")
    arguments = [word for name in names for word in ("--variant", name)]
    monkeypatch.setattr(sys, "argv", ["augment", "--out", str(tmp_path), "--time", "0.001", *arguments])
    assert augment.main() == 0
    rows = report.read(tmp_path / "augment.csv")
    assert [(row["layout"], row["variant"]) for row in rows] == [
        (layout, name) for layout in ("nchw", "channels_last") for name in names
    ]
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["copy_share"]) == pytest.approx(float(row["copy_ms"]) / float(row["median_ms"]), rel=1e-4)
        assert float(row["minimal_mb"]) == pytest.approx(4800 / 1e6)
        assert float(row["difference"]) < 1e-6
        assert float(row["peak_mb"]) > 0
        assert row["command"]
        assert row["torch"]
    text = (tmp_path / "augment.md").read_text(encoding="utf-8")
    assert "| (5, 8², ±2), nchw, float32 |" in text
    assert "| none / " in text
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["augment", "--table", str(tmp_path / "augment.csv")])
    assert augment.main() == 0
    assert capsys.readouterr().out == text
    pytest.importorskip("matplotlib")
    assert (tmp_path / "augment.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_takes_the_best_of_ours_and_of_torch_compile():
    augment = module("augment")
    made = dict.fromkeys(augment.FIELDS, "") | {
        "case": "c", "batch": "2", "size": "8", "pad": "1", "layout": "nchw", "dtype": "float32", "mode": "forward",
        "copy_share": "0.5", "difference": "0", "peak_mb": "3", "launches": "1", "device": "a GPU",
    }  # fmt: skip
    rows = [
        {**made, "variant": name, "median_ms": ms, "difference": far}
        for name, ms, far in (
            ("triton", "0.5", "0"), ("reference", "2", "0"), ("eager", "3", "1e-7"), ("eager-images", "9", "1e-7"),
            ("compile", "1", "2e-7"), ("compile-reference", "4", "0"),
        )
    ]  # fmt: skip
    rows += [
        {**rows[0], "mode": "graph", "median_ms": "0.004"},
        {**rows[0], "mode": "host", "median_ms": "0.03"},
    ]
    table, latency = augment.tables(rows).split("\n\n")[::2]
    assert (
        "| (2, 8², ±1), nchw, float32 | 500 µs (triton), 2 ms (reference) | 3 ms | 9 ms | 1 ms | 6.0× | 2.0× | "
        "50 % / 50 % | none / 1.0e-07 / 2.0e-07 |" in table
    )
    # Nothing is subtracted where autograd's engine takes no part.
    assert "| triton | 1 | 4 µs | 30 µs |" in latency


def test_the_stages_of_make_gpu():
    stages = module("gpu").STAGES
    assert {"augment-bench", "timeline"} <= set(stages)
    assert callable(module("augment").main)
    assert callable(module("train.timeline").main)
