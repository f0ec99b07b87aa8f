"""`fflfast doctor` finds what is broken, says so, and needs nothing but torch and numpy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import truth

from fflfast import DistillGraph, accuracy, cli, distill_loss, doctor, doctor_loss
from fflfast.accuracy import LossSettings, gradient_scale, gradient_share, plain_distill_loss, value_share
from fflfast.ops import distill_loss as operator
from fflfast.ops.backends import Implementation

CPU = torch.device("cpu")
REFERENCE = operator.IMPLEMENTATIONS["reference"]


def replace_reference(monkeypatch, refuses=lambda *case: None, **functions):
    """Put functions of our own in place of the reference's."""
    broken = Implementation({**REFERENCE.functions, **functions}, refuses)
    monkeypatch.setitem(operator.IMPLEMENTATIONS, "reference", broken)


def run():
    """(exit code, lines) of a quick look at the reference on the CPU."""
    lines = []
    return doctor.doctor("reference", "cpu", quick=True, write=lines.append), lines


def test_quick_run_is_green(capsys):
    assert cli.main(["doctor", "--quick", "--backend", "reference", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "all within the contract" in out
    assert "MISS" not in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert "backend reference" in out
    assert "torch.compile skipped: left out by --quick" in out
    assert len([line for line in out.splitlines() if line.startswith(("  random, ", "  trainable teachers"))]) == 6


def test_the_help_names_it(capsys):
    assert cli.main([]) == 0
    assert "fflfast doctor --quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--backend", "--device", "--quick"))


def _scaled_backward(*args):
    return [g * 1.0001 for g in REFERENCE.functions["backward"](*args)]


def _forgets_ignored_rows(*args):
    loss, *rest = REFERENCE.functions["forward"](*args)
    return torch.where(args[0][0].isnan().any(), torch.nan, loss), *rest


def _writes_into_its_input(*args):
    out = REFERENCE.functions["forward"](*args)
    args[0][0].add_(1e-3)
    return out


def _raises(*args):
    raise RuntimeError("no kernel image\nis available")


def _ignores_grad_output(grad, *args):
    return REFERENCE.functions["backward"](torch.ones_like(grad), *args)


def _reads_one_grad_output(grad, *args):
    grad = grad.flatten()[:1].expand(grad.shape) if grad.dim() else grad
    return REFERENCE.functions["backward"](grad, *args)


class _Unsteady:
    calls = 0

    def __call__(self, *args):
        type(self).calls += 1
        return [g * (1 + 2.0**-23 * (self.calls % 3)) for g in REFERENCE.functions["backward"](*args)]


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"backward": _scaled_backward}, r"random, float32: gradient of sub0 \(\S+ × the allowed error\)"),
        ({"forward": _forgets_ignored_rows}, r"ignored rows hold NaN: loss \(has to be exact and is not\)"),
        ({"forward": _writes_into_its_input}, r"input left alone \(has to be exact and is not\)"),
        ({"backward": _ignores_grad_output}, r"random, float32: second gradient of sub0"),
        ({"backward": _reads_one_grad_output}, r"reduction none: second gradient of sub0"),
        ({"backward": _Unsteady()}, r"same bits when repeated \(has to be exact and is not\)"),
        ({"forward": _raises}, r"raised RuntimeError: no kernel image$"),
    ],
    ids=["scaled", "nan", "in-place", "no-grad-output", "one-grad-output", "unsteady", "raises"],
)
def test_a_broken_backend_is_reported(monkeypatch, functions, words):
    replace_reference(monkeypatch, **functions)
    code, lines = run()
    misses = [line for line in lines if line.startswith("MISS reference on cpu, eager, distill_loss, ")]
    assert code == 1
    assert any(re.search(words, line) for line in misses), misses
    assert lines[-1] == f"{len(misses)} missed"


def test_the_command_exits_1(monkeypatch, capsys):
    replace_reference(monkeypatch, backward=_scaled_backward)
    assert cli.main(["doctor", "--quick", "--backend", "reference", "--device", "cpu"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_a_refused_case_is_no_miss(monkeypatch):
    replace_reference(monkeypatch, lambda z, *case: "has no float16" if z[0].dtype == torch.float16 else None)
    code, lines = run()
    assert code == 0
    assert "  reference leaves 'random, float16' to the next backend: has no float16" in lines


def test_a_backend_that_takes_nothing_is_a_miss_when_asked_for(monkeypatch):
    replace_reference(monkeypatch, lambda *case: "not on this device")
    monkeypatch.setattr(doctor, "_checks", lambda device, quick: doctor_loss.CHECKS[:3])
    code, lines = run()
    assert code == 1
    assert "  reference takes no call on cpu: not on this device" in lines
    assert any(line.startswith("MISS reference was asked for") for line in lines)


def test_an_unavailable_backend(monkeypatch):
    monkeypatch.setattr(doctor, "backends", lambda: {"cuda": "no such device", "reference": "available"})
    lines = []
    assert doctor.doctor("cuda", "cpu", quick=True, write=lines.append) == 1
    assert lines[-1] == "MISS cuda was asked for and is not available: no such device"
    monkeypatch.setattr(doctor, "_checks", lambda device, quick: doctor_loss.CHECKS[:1])
    assert doctor.doctor(None, "cpu", quick=True, write=lines.append) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "cdua"], "got 'cdua'"),
        (["--device", "warp"], "got 'warp'"),
        (["--fast"], "unrecognized arguments: --fast; see fflfast doctor --help"),
    ],
)
def test_wrong_flags(capsys, arguments, words):
    assert cli.main(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_without_a_compiler_the_compiled_runs_are_skipped(monkeypatch):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("\nNo working C++ compiler found\nin the path")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(doctor, "_checks", lambda device, quick: doctor_loss.CHECKS[:1])
    lines = []
    assert doctor.doctor("reference", "cpu", write=lines.append) == 0
    assert "  torch.compile skipped: No working C++ compiler found" in lines


@pytest.mark.parametrize("broken", [False, True])
def test_compiled_runs_count(monkeypatch, broken):
    if doctor._compiler_problem(CPU):
        pytest.skip("torch.compile has no compiler here")
    monkeypatch.setattr(doctor, "_checks", lambda device, quick: doctor_loss.CHECKS[:1])
    if broken:
        replace_reference(monkeypatch, backward=_scaled_backward)
    lines = []
    assert doctor.doctor("reference", "cpu", write=lines.append) == broken
    assert any("reference compiled" in line for line in lines)
    assert any(line.startswith("MISS reference on cpu, compiled, ") for line in lines) == broken


def test_needs_torch_and_numpy_alone():
    optional = ("torchvision", "timm", "sklearn", "safetensors", "jsonargparse", "rich", "matplotlib", "yaml")
    code = "".join(f"sys.modules[{name!r}] = None\n" for name in optional)
    code += "from fflfast.cli import main\nsys.exit(main(['doctor', '--quick', '--backend', 'reference']))"
    code = f"import sys\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all within the contract" in done.stdout


def test_importing_fflfast_imports_no_doctor():
    code = "import sys, fflfast\nprint([m for m in sys.modules if 'doctor' in m or 'accuracy' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_rich_table_holds_what_the_plain_one_does(monkeypatch):
    pytest.importorskip("rich")
    head, rows = ["check", "cpu"], [["a", "0.10"], ["b", "MISS"]]
    plain = doctor._table(head, rows)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    rich = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in doctor._table(head, rows)]
    assert [line.split() for line in rich] == [line.split() for line in plain]


# ---- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", truth.GRAPHS)
def test_the_plain_formula_is_that_of_the_tests(name, reduction):
    graph = truth.GRAPHS[name]
    z = truth.random_logits(graph.num_logits, (6, 11), torch.float64)
    y = truth.target_for(graph, (6, 11))
    if y is not None:
        y[2] = -100
    settings = LossSettings(3.0, 0.5, 0.7, 0.1, -100, 1e-3, reduction)
    theirs = truth.run(truth.plain_loss, z, y, graph, **settings._asdict())
    mine = truth.run(lambda *case: plain_distill_loss(*case, settings), z, y, graph)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("factor", [1 + 2e-6, 1 - 2e-6, float("nan"), float("inf")])
def test_the_rule_on_values(factor):
    exact = torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64)
    plain = exact.float()
    assert value_share(plain, plain, exact) <= 1
    assert value_share(plain * torch.tensor([1.0, 1.0, factor]), plain, exact) > 1
    assert value_share(plain[:2], plain, exact) > 1


def test_the_rule_sees_a_lost_tail():
    graph, settings = DistillGraph.kd(), LossSettings(2.0)
    z, y = truth.random_logits(2, (4, 50), scale=8.0), torch.arange(4)
    exact = truth.run(lambda *case: plain_distill_loss(*case, settings), [t.double() for t in z], y, graph)
    plain = truth.run(lambda *case: plain_distill_loss(*case, settings), z, y, graph)
    ours = truth.run(distill_loss, z, y, graph, temperature=2.0)
    scale = gradient_scale(z, y, graph, settings)
    assert gradient_share(ours[2][0], plain[2][0], exact[2][0], scale[0]) <= 1
    lost = ours[2][0].clone()
    tail = exact[2][0].abs().argmin()
    lost.view(-1)[tail] = 0  # an error far below 1e-6 of the largest element
    assert gradient_share(lost, plain[2][0], exact[2][0], scale[0]) > 1


def test_masked_elements_compare_exactly():
    exact, plain = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    scale = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert gradient_share(torch.tensor([0.0, 0.0, 1e-20]), plain, exact, scale) > 1
    assert accuracy.gradient_share(plain, plain, exact, scale) == 0
