"""The benchmarks measure what they say, and `make gpu` keeps its promises where there is no GPU."""

from __future__ import annotations

import importlib
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def small():
    cases = module("cases")
    case = cases.Case(6, 50)
    return case, case.draw(torch.device("cpu"))


def test_minimal_bytes():
    cases = module("cases")
    assert cases.CPU_CASES[2].minimal_bytes("forward+backward") == 6 * 512 * 32_000 * 4
    assert cases.CPU_CASES[2].minimal_bytes("forward") == 3 * 512 * 32_000 * 4
    assert [(c.rows, c.num_classes, c.eager_factor, c.compile_factor) for c in cases.CPU_CASES] == [
        (128, 100, 6, 4), (256, 1000, 12, 5), (512, 32_000, 25, 4), (64, 131_072, 25, 4)
    ]  # fmt: skip


def test_every_variant_computes_the_same_loss_and_a_wrong_one_shows():
    variants, measure = module("variants"), module("measure")
    case, data = small()
    results = {}
    for name, factory in variants.variants_for(torch.device("cpu"), compiled=False):
        loss = factory(case)
        with module("calls").context(loss):
            results[name] = measure.once(loss, data)
    assert "eager" in results
    assert len(results) >= 2
    results["wrong"] = (results["eager"][0] * 1.01, [2 * g for g in results["eager"][1]])
    for name, errors in case.errors(data, results).items():
        assert {error > 1e-3 for error in errors.values()} == {name == "wrong"}, name


@pytest.mark.parametrize("mode", ["forward+backward", "forward", "backward"])
def test_times_and_fresh_gradients(mode):
    measure, variants = module("measure"), module("variants")
    _, data = small()
    calls = []

    def counted(logits, target):
        calls.append(all(z.grad is None for z in logits) or mode == "forward")
        return variants.plain_ffl(logits, target)

    times = measure.measure_times({"a": counted, "b": variants.plain_ffl}, [data], mode, budget=0.01)
    assert set(times) == {"a", "b"}
    t = times["a"]
    assert 0 < t.least <= t.p20 <= t.median <= t.p80
    assert t.repetitions >= 5
    assert len(calls) > t.repetitions
    assert all(z.grad is None for z in data.logits)


def test_peak_memory_counts_what_lives_at_once():
    memory = module("memory")
    _, data = small()
    data = data._replace(logits=[torch.zeros(1000, 1000, requires_grad=True)])  # 4 MB

    def loss(logits, target):
        return (logits[0] * 2).exp().sum()  # two intermediates, of which exp keeps its result

    assert 8e6 <= memory.peak_bytes(loss, data) < 13e6


def test_the_table(tmp_path):
    report = module("report")
    made = dict.fromkeys(report.FIELDS, "")
    made |= {"case": "c", "rows": 2, "classes": 3, "dtype": "float32", "mode": "forward+backward", "copy_share": 0.5,
             "peak_mb": 4, "gradient_error": 1e-7, "device": "a CPU, 2 of 2 threads", "command": "x",
             "eager_goal": 6, "compile_goal": 0}  # fmt: skip
    rows = [{**made, "variant": v, "median_ms": t} for v, t in (("cpu", 0.5), ("eager", 6.0), ("compile", 2.0))]
    report.write(tmp_path / "sub" / "loss.csv", rows)
    text = report.table(report.read(tmp_path / "sub" / "loss.csv"))
    assert "| (2, 3), float32 | 500 µs (cpu) | 6 ms | 2 ms | 12.0× (goal 6×) | 4.0× | 50 % |" in text
    assert "a CPU, 2 of 2 threads" in text
    assert "not measured yet" in report.table(report.read(tmp_path / "sub" / "loss.csv")[1:])
    pytest.importorskip("matplotlib")
    module("loss")._plot(report.read(tmp_path / "sub" / "loss.csv"), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_launches():
    report = module("report")
    row = dict.fromkeys(report.FIELDS, "") | {"case": "c", "rows": "2", "classes": "3", "dtype": "float32"}
    rows = [
        {**row, "variant": "cuda", "mode": "graph", "median_ms": "0.008", "launches": "2"},
        {**row, "variant": "cuda", "mode": "host", "median_ms": "0.06", "launches": "2"},
        {**row, "variant": "engine", "mode": "host", "median_ms": "0.04"},
    ]
    assert "| (2, 3), float32 | cuda | 2 | 8 µs | 20 µs |" in report.latency_table(rows, report.loss_label)
    assert report.latency_table(rows[:1], report.loss_label) == ""


def test_the_command_measures_a_case(tmp_path, monkeypatch, capsys):
    cases, loss = module("cases"), module("loss")
    monkeypatch.setattr(loss, "cases_for", lambda device: (cases.Case(6, 50),))
    monkeypatch.setattr(sys, "argv", ["loss", "--out", str(tmp_path), "--time", "0.001", "--variant", "eager"])
    assert loss.main() == 0
    rows = module("report").read(tmp_path / "loss.csv")
    assert [(row["variant"], row["mode"]) for row in rows] == [("eager", mode) for mode in loss.MODES]
    assert all(float(row["gradient_error"]) < 1e-4 and row["command"] and row["torch"] for row in rows)
    assert "(6, 50), float32" in capsys.readouterr().out
    assert (tmp_path / "loss.md").exists()


def test_gpu_without_a_gpu(monkeypatch, tmp_path, capsys):
    gpu = module("gpu")
    monkeypatch.setattr(gpu, "_device", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gpu_stages_do_not_stop_each_other(monkeypatch, tmp_path):
    gpu = module("gpu")

    def python(code, limit=30):
        return lambda run: run.command([sys.executable, "-c", code], limit)

    def raises(run):
        raise OSError("no such checker")

    stages = {
        "good": python("print('fine')"),
        "bad": python("import sys; print('wrong'); sys.exit(3)"),
        "slow": python("import time; print('started', flush=True); time.sleep(60)", 2),
        "broken": raises,
        "last": lambda run: "skipped: not needed",
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "_device", lambda: "Some GPU (1)")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stages", ",".join(stages)])
    assert gpu.main() == 1
    summary = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for line in (
        "| good | passed |",
        "| bad | failed (exit code 3) |",
        "| slow | stopped after 2 s |",
        "| broken | failed (OSError: no such checker) |",
        "| last | skipped: not needed |",
    ):
        assert line in summary
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert all(word in log for word in ("fine", "wrong", "started", "==== slow: stopped after 2 s"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stages", "good,last", "--minutes", "1"])
    assert gpu.main() == 0


def test_gpu_leaves_one_archive_and_uses_the_wheels_it_was_given(monkeypatch, tmp_path):
    gpu = module("gpu")
    with zipfile.ZipFile(tmp_path / "peer_of_ours-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_ours.py", "WORD = 'imported from the wheel'")
        wheel.writestr(
            "peer_of_ours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            "peer_of_ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: peer-of-ours\nVersion: 1.0\n"
        )
        wheel.writestr("peer_of_ours-1.0.dist-info/RECORD", "")
    # A stage at its limit is asked to end before it is ended, and what it says then is kept.
    slow = (
        "import peer_of_ours, time\nprint(peer_of_ours.WORD, flush=True)\n"
        "try: time.sleep(60)\nfinally: print('in the end')"
    )
    monkeypatch.setattr(gpu, "STAGES", {"slow": lambda run: run.command([sys.executable, "-c", slow], 10)})
    monkeypatch.setattr(gpu, "_device", lambda: "Some GPU (1)")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), "--wheels", str(tmp_path), "--bundle"])
    assert gpu.main() == 1
    assert [path.name for path in out.iterdir()] == ["results.tar.gz"]
    with tarfile.open(out / "results.tar.gz") as packed:
        read = {name: packed.extractfile(f"results/{name}").read().decode() for name in ("gpu.log", "gpu.md")}
    assert "imported from the wheel" in read["gpu.log"]
    assert "in the end" in read["gpu.log"]
    assert "| slow | stopped after 10 s |" in read["gpu.md"]


def test_every_gpu_test_file_has_a_stage():
    gpu = module("gpu")
    files = {path.name for path in (ROOT / "tests").glob("test_gpu_*.py")}
    assert {*gpu.EXECUTION_TESTS, *gpu.METHOD_TESTS, *gpu.LARGE_TESTS} == files
    assert all((ROOT / "tests" / name).exists() for name in (*gpu.LOSS_TESTS, *gpu.FUSION_TESTS))


def test_sanitize_runs_every_kernel(monkeypatch, capsys):
    sanitize = module("sanitize")
    monkeypatch.setattr(sanitize, "CLASSES", ((7, 5), (9, 4), (11, 2)))
    monkeypatch.setattr(sanitize, "SIZES", ((2, (3, 2), 4, 4, 5), (3, (4,), 1, 1, 2)))
    monkeypatch.setattr(sys, "argv", ["sanitize", "--backend", "reference", "--device", "cpu"])
    assert sanitize.main() == 0
    losses = 3 * len(sanitize.CLASSES) * len(sanitize.DTYPES) * len(sanitize.GRAPHS)
    fusions = len(sanitize.SIZES) * len(sanitize.LAYOUTS) * len(sanitize.PRECISIONS) * len(sanitize.MODES)
    out = capsys.readouterr().out
    assert f"distill_loss: {losses} calls of reference on cpu, 0 with" in out
    assert f"fuse_features: {fusions} calls of reference on cpu, 0 with" in out


def test_sanitize_tells_a_result_that_is_not_finite(monkeypatch, capsys):
    sanitize = module("sanitize")
    monkeypatch.setitem(sanitize.OPERATORS, "fuse_features", lambda device, quick: [("bad", [torch.tensor(torch.nan)])])
    monkeypatch.setattr(
        sys, "argv", ["sanitize", "--backend", "reference", "--device", "cpu", "--operator", "fuse_features"]
    )
    assert sanitize.main() == 1
    assert (
        capsys.readouterr().out
        == "fuse_features: 1 calls of reference on cpu, 1 with a result that is not finite\n  bad\n"
    )


def test_every_stage_of_make_gpu_names_what_is_there():
    gpu = module("gpu")
    for name in (*gpu.LOSS_TESTS, *gpu.FUSION_TESTS, *gpu.EXECUTION_TESTS):
        assert (ROOT / "tests" / name).exists(), name
    assert "test_gpu_execution.py" in gpu.EXECUTION_TESTS
    for name in ("loss", "fusion", "step_share", "train.__main__", "train.alternatives"):
        assert callable(module(name).main)


def test_device_writes_what_was_measured(monkeypatch, tmp_path, capsys):
    device = module("device")
    asked = []

    def product(rows, inner, columns, dtype, where):
        asked.append((dtype, where.type))
        return 3e12 if dtype == torch.float32 else 7e12

    monkeypatch.setattr(device, "copy_rate", lambda shapes, dtype, where: 16e9)
    monkeypatch.setattr(device, "matrix_rate", product)
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path)])
    assert device.main() == 0
    assert asked == [(torch.float32, "cpu"), (torch.bfloat16, "cpu")]
    text = (tmp_path / "device.md").read_text(encoding="utf-8")
    for line in ("| copy | 16 GB/s |", "| product float32 | 3 TFLOP/s |", "| product bfloat16 | 7 TFLOP/s |"):
        assert line in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["device", "--device", "cuda", "--out", str(tmp_path / "gpu")])
    assert device.main() == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()
