"""Building and installing the kernels: what is built where, and what the libraries need of the machine they run on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fflfast.ops import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "kernels", "fflfast", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a checkout")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def build_wheel(tree, out, **environment):
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(out)]
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "FFLFAST_BUILD")} | environment
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FFLFAST_BUILD": "none"}, ""),
        ({"PATH": "/nonexistent"}, "no C\\+\\+ compiler was found"),
        ({"FFLFAST_BUILD": "auto-cpu", "CXX": "/bin/false"}, "it is left out"),
    ],
    ids=["on request", "no compiler", "broken compiler"],
)
def test_without_kernels_the_wheel_is_python_alone(tree, tmp_path, environment, message):
    result = build_wheel(tree, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert re.search(message, result.stderr)
    (wheel,) = tmp_path.glob("*.whl")
    # A compiler that fails is met too late for the wheel's name.
    assert wheel.name.endswith("-py3-none-any.whl") or environment.get("CXX") == "/bin/false"
    names = zipfile.ZipFile(wheel).namelist()
    assert "fflfast/kernels/__init__.py" in names, "the Triton kernels belong to the package"
    assert not [n for n in names if n.endswith(".so")]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FFLFAST_BUILD": "cpu", "PATH": "/nonexistent"}, "FFLFAST_BUILD=cpu, but no C.. compiler was found"),
        ({"FFLFAST_BUILD": "gpu"}, "must be one of auto, auto-cpu, cpu, cuda, none, got 'gpu'"),
    ],
    ids=["cpu", "unknown"],
)
def test_what_is_asked_for_and_cannot_be_is_an_error(tree, tmp_path, environment, message):
    result = build_wheel(tree, tmp_path, **environment)
    assert result.returncode != 0
    assert re.search(message, result.stderr)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_libraries_use_stable_interfaces_alone(name):
    """No symbol of PyTorch's or Python's unstable interface, so that one build serves every version from the oldest."""
    library = native.library(name)
    if not library.exists() or shutil.which("nm") is None:
        pytest.skip(f"{library.name} was not built here, or there is no nm")
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]
    assert any(s.startswith(("torch_", "aoti_torch_")) for s in symbols)
    # Mangled names of namespaces at, c10 and torch are PyTorch's C++ interface.
    assert not [s for s in symbols if re.match(r"_ZN?K?(St)?\d*(2at|3c10|5torch)", s)]
    assert {s for s in symbols if s.startswith(("Py", "_Py"))} <= {"PyModule_Create2"}


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_library_that_was_built_loads_into_this_torch(name):
    library = native.library(name)
    if not library.exists():
        pytest.skip(f"{library.name} was not built here")
    if name == "cuda" and __import__("torch").version.cuda is None:
        pytest.skip("loaded only where torch has CUDA")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); import fflfast._{name}; "
        f"print(torch.ops.fflfast_{name}.distill_loss.default, torch.ops.fflfast_{name}.scale_gradients.default)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"fflfast_{name}.scale_gradients.default" in result.stdout


def test_reasons_for_a_missing_library_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native.load.cache_clear()
    try:
        assert "pip install --no-build-isolation" in native.load("cpu")
        (tmp_path / "_cpu.abi3.so").write_bytes(b"not a library")
        native.load.cache_clear()
        assert "does not load" in native.load("cpu")
    finally:
        native.load.cache_clear()
