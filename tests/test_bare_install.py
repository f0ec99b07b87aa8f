"""What an environment with torch and numpy alone can do: import, losses, fusion, own networks, whole methods."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ("torchvision", "timm", "sklearn", "safetensors", "jsonargparse", "rich", "matplotlib", "yaml", "triton")


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_and_loads_nothing_optional():
    # A name bound to None in sys.modules makes its import fail, whether or not it is installed.
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL if name != "triton")
    out = run_python(
        f"import sys\nimport torch\nbefore = set(sys.modules)\n{block}"
        "import fflfast\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before if sys.modules[m]} - {'fflfast'}))\n"
        "print([m for m in sys.modules if m.startswith(('fflfast.training', 'fflfast.models', 'fflfast.data'))])"
    )
    loaded, own = out.strip().splitlines()
    assert own == "[]"
    assert not set(OPTIONAL) & set(eval(loaded))


def test_a_cohort_trains_with_own_networks():
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL)
    out = run_python(
        f"import sys\nimport torch\n{block}"
        "import fflfast\n"
        "from types import SimpleNamespace\n"
        "from fflfast.cohort import Cohort, Learner\n"
        "net = [fflfast.models.create('tiny', 5) for _ in range(2)]\n"
        "cohort = Cohort(net)\n"
        "learner = Learner(cohort, fflfast.methods.FFL(cohort, 5))\n"
        "batch = SimpleNamespace(images=torch.randn(4, 3, 8, 8), target=torch.arange(4))\n"
        "learner(batch).loss.backward()\n"
        "print(sorted(learner.eval().predict(batch.images)))"
    )
    assert out.strip() == "['ensemble', 'fused', 'sub0', 'sub1']"
