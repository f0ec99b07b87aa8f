"""What tests/conftest.py sees to where tests run on a GPU: where tensors are made, and what a run tells when."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
WHERE = """
import torch

AT_IMPORT = torch.empty(0).device.type


def test_where():
    assert (AT_IMPORT, torch.empty(0).device.type) == ("{0}", "{0}")


def test_a_generator_beside_it():
    torch.randint(9, (3,), generator=torch.Generator("{0}" if "{0}" == "cpu" else None))
"""


def run(folder, device, *options, **files):
    """Run these files under the conftest as if they lay beside it; returns exit code and output."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    paths = [str(folder / f"{name}.py") for name in files]
    environment = {**os.environ, "FFLFAST_TEST_DEVICE": device, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    environment.pop("FFLFAST_TEST_BACKENDS", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "conftest", "-c", os.devnull]
    done = subprocess.run(
        [*command, "--rootdir", folder, *options, *paths], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout + done.stderr


def test_only_the_operators_tests_make_their_tensors_on_the_device(tmp_path):
    where = {name: WHERE.format(at) for name, at in (("test_gpu_a", "cpu"), ("test_b", "meta"), ("test_gpu_c", "cpu"))}
    where["test_b"] = where["test_b"].partition("def test_a_generator")[0]
    code, output = run(tmp_path, "meta", **where)
    assert code == 0, output
    assert "5 passed" in output


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two"])
def test_a_missing_package_and_a_failure_cost_no_other_test(tmp_path, options):
    files = {
        "test_gpu_a": "import no_such_package\n",
        "test_b": "def test_wrong():\n    assert 1 == 2\n\n\ndef test_right():\n    print('later')\n    assert 0\n",
        "test_c": "def test_good():\n    pass\n",
    }
    if options:
        pytest.importorskip("xdist")
    code, output = run(tmp_path, "meta", *options, **files)
    assert code == 1
    assert "2 failed, 1 passed, 1 error" in output
    assert "No module named 'no_such_package'" in output
    told = output.partition("= FAILURES =")[0]  # before pytest's own account, which a killed run does not write
    assert "test_b.py::test_wrong, call:" in told
    assert "assert 1 == 2" in told
    if not options:  # nor is that so without being asked for
        code, output = run(tmp_path, "cpu", **files)
        assert "Interrupted: 1 error during collection" in output
