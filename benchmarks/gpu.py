"""Everything that needs a GPU, in one command: build, doctor, tests, memory and race checks, benchmarks.

    python benchmarks/gpu.py [--out FOLDER] [--stages build,doctor,…] [--minutes 30] [--wheels FOLDER] [--bundle]

The stages: build; doctor and doctor-triton; of the loss tests, memcheck, racecheck, bench; of the fusion the same as
fusion-tests, fusion-memcheck, fusion-racecheck, fusion-bench; device, what it reaches at best; augment-bench;
step-share, what loss and fusion take of a whole training step; of the execution plans and the trainer execution-tests
(with those of the augmentation), method-tests, train, alternatives and timeline; large-tests, beyond 2³¹ numbers. With
a machine for ten minutes at a time, run them in some calls: --minutes 9.5 and some of the stages each.

Needs torch and numpy, pytest for the tests (which pytest-xdist spreads over the cores: most of their time is Triton's
compiler), what the extra [train] installs for whole steps, and nvcc where the CUDA library is not built yet; no
network, and fflfast need not be installed: packages that the machine lacks are installed from the wheels in --wheels.
Each stage has a time limit, and one that fails does not stop the next. The folder of the results
(default: $OUT, else benchmarks/results/DEVICE) gets gpu.log with all output, gpu.md with the outcome of each stage,
doctor.txt, and the files of `benchmarks.loss`, `benchmarks.fusion` (fusion.md ends with each target, met or missed, and
by how much), `benchmarks.device`, `benchmarks.augment`, `benchmarks.step_share`, `benchmarks.train`,
`benchmarks.train.alternatives` and `benchmarks.train.timeline`; with --bundle it gets them as one results.tar.gz,
written anew after each stage. Exit code 0 when every stage passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LOSS_TESTS = (
    "test_distill_loss.py", "test_distill_loss_rows.py", "test_distill_loss_composition.py",
    "test_distill_loss_fuzz.py", "test_drop_in.py",
)  # fmt: skip
FUSION_TESTS = (
    "test_fusion_stages.py",
    "test_fusion_operator.py",
    "test_fusion_composition.py",
    "test_fuse_features.py",
)
METHOD_TESTS = ("test_gpu_methods.py", "test_gpu_pose.py")
LARGE_TESTS = ("test_gpu_large.py",)
# Whatever else needs a GPU: plans against serial, races, host synchronisation, prefetching, several processes.
EXECUTION_TESTS = tuple(
    sorted({path.name for path in (ROOT / "tests").glob("test_gpu_*.py")}.difference(METHOD_TESTS, LARGE_TESTS))
)
PYTHON = [sys.executable, "-u"]
# Seconds that a stage at its limit has for saying what it knows.
GRACE = 10.0


@dataclass
class Outcome:
    """What became of one stage."""

    stage: str
    result: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.result.startswith(("passed", "skipped", "built"))


class Run:
    """The stages of one run, their common log and their deadline."""

    def __init__(self, out: Path, minutes: float, log: IO[str]) -> None:
        self.out, self.log = out, log
        self.deadline = time.monotonic() + 60 * minutes
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def command(self, command: list[str], limit: float, copy: Path | None = None, **environment: str) -> str:
        """Run a command with its output in the log: ``passed``, ``failed (exit code N)`` or ``stopped after N s``."""
        limit = max(1.0, min(limit, self.deadline - time.monotonic()))
        self.say("$ " + " ".join(command))
        start = self.log.tell()
        # Straight into the log, which so holds everything even where this process is killed.
        process = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **environment},
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGINT)  # pytest then prints what failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the group: pytest, nvcc and checkers have children
                process.wait()
        self.log.seek(start)
        output = self.log.read()
        print("\n".join(output.splitlines()[-40:]), flush=True)
        if copy is not None:
            copy.write_text(output, encoding="utf-8")
        if code is None:
            return f"stopped after {limit:.0f} s"
        return "passed" if code == 0 else f"failed (exit code {code})"

    def add_packages(self, wheels: Path) -> None:
        """Install wheels, without their dependencies and without a network, where this run's commands find them."""
        target = tempfile.mkdtemp(prefix="fflfast-packages-")
        pip = [*PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
        self.say(f"packages: {self.command([*pip, *map(str, sorted(wheels.resolve().glob('*.whl')))], 120)}")
        self.environment["PYTHONPATH"] += os.pathsep + target


Stage = Callable[[Run], str]


def _python(code: str) -> list[str]:
    return [*PYTHON, "-c", code]


_CUDA_STATE = "import sys, fflfast; s = fflfast.backends()['cuda']; print('cuda:', s); sys.exit(s != 'available')"
# The machine code that setup.py is asked for, so that a build here takes no longer than it must.
_ARCH = (
    "import torch; m = torch.cuda.get_device_capability()[0]; print({8: '80', 9: '90a', 10: '100'}.get(m, '90+PTX'))"
)


def build(run: Run) -> str:
    """Use a CUDA library that is there and loads, else build both libraries in place."""
    if run.command(_python(_CUDA_STATE), 60) == "passed":
        return "skipped: the library that is there loads"
    arch = subprocess.run(_python(_ARCH), capture_output=True, text=True, check=False).stdout.strip()
    arch = os.environ.get("FFLFAST_CUDA_ARCHS") or arch
    built = run.command(
        [*PYTHON, "setup.py", "build_ext", "--inplace"], 240, FFLFAST_BUILD="cuda", FFLFAST_CUDA_ARCHS=arch
    )
    if built != "passed":
        return built
    loads = run.command(_python(_CUDA_STATE), 60)
    return f"built for {arch}" if loads == "passed" else f"built for {arch}, but it does not load"


def _doctor(backend: str, limit: float, file: str) -> Stage:
    def doctor(run: Run) -> str:
        command = [*PYTHON, "-m", "fflfast", "doctor", "--device", "cuda", "--backend", backend]
        return run.command(command, limit, run.out / file)

    return doctor


def _tests(names: Sequence[str], limit: float, *, spread: bool = False) -> Stage:
    def tests(run: Run) -> str:
        if run.command(_python("import pytest"), 60) != "passed":
            return "skipped: pytest is not installed"
        files = [f"tests/{name}" for name in names if (ROOT / "tests" / name).exists()]
        required = os.environ.get("FFLFAST_TEST_BACKENDS", "reference cuda triton")
        workers = str(min(12, os.cpu_count() or 1))
        many = ["--numprocesses", workers] if spread and run.command(_python("import xdist"), 60) == "passed" else []
        return run.command(
            [*PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", *many, *files], limit,
            FFLFAST_TEST_DEVICE="cuda", FFLFAST_TEST_BACKENDS=required,
        )  # fmt: skip

    return tests


def _checked(tool: str, operator: str, limit: float) -> Stage:
    def check(run: Run) -> str:
        checker = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if checker is None:
            return "skipped: compute-sanitizer is not installed"
        command = [checker, "--tool", tool, "--kernel-regex", "kns=fflfast", "--error-exitcode", "9"]
        quick = ["--quick"] if tool == "racecheck" else []
        # PyTorch's caching allocator would hide an access past a tensor's end inside its own block.
        return run.command(
            [*command, *PYTHON, "-m", "benchmarks.sanitize", "--operator", operator, *quick], limit,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip

    return check


def _benchmark(name: str, limit: float) -> Stage:
    def bench(run: Run) -> str:
        return run.command([*PYTHON, "-m", f"benchmarks.{name}", "--device", "cuda", "--out", str(run.out)], limit)

    return bench


_TRAINING = "import jsonargparse, rich, safetensors, torchvision, yaml"


def _trained(name: str, limit: float) -> Stage:
    """A benchmark that needs what the extra [train] installs."""

    def bench(run: Run) -> str:
        if run.command(_python(_TRAINING), 60) != "passed":
            return "skipped: training needs pip install 'fflfast[train]'"
        return _benchmark(name, limit)(run)

    return bench


STAGES: dict[str, Stage] = {
    "build": build,
    "doctor": _doctor("cuda", 120, "doctor.txt"),
    "tests": _tests(LOSS_TESTS, 200, spread=True),
    "fusion-tests": _tests(FUSION_TESTS, 300, spread=True),
    "memcheck": _checked("memcheck", "distill_loss", 75),
    "racecheck": _checked("racecheck", "distill_loss", 75),
    "fusion-memcheck": _checked("memcheck", "fuse_features", 150),
    "fusion-racecheck": _checked("racecheck", "fuse_features", 150),
    "device": _benchmark("device", 60),
    "bench": _benchmark("loss", 280),
    "fusion-bench": _benchmark("fusion", 500),
    "augment-bench": _benchmark("augment", 280),
    "step-share": _trained("step_share", 120),
    "execution-tests": _tests(EXECUTION_TESTS, 300),
    "method-tests": _tests(METHOD_TESTS, 300, spread=True),
    "large-tests": _tests(LARGE_TESTS, 150),
    "train": _trained("train", 560),
    "alternatives": _benchmark("train.alternatives", 150),
    "timeline": _trained("train.timeline", 300),
    "doctor-triton": _doctor("triton", 300, "doctor-triton.txt"),
}


def _device() -> str | None:
    """The GPU's name, or None; asked in a process of its own, so that this one holds no GPU memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run(_python(code), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, with commas between (default: all)")
    parser.add_argument("--minutes", type=float, default=30, help="for all stages together (default: 30)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install, into a folder for this run alone")
    parser.add_argument("--bundle", action="store_true", help="leave one results.tar.gz instead of files")
    options = parser.parse_args()
    chosen = [name for name in options.stages.split(",") if name]
    if unknown := [name for name in chosen if name not in STAGES]:
        parser.error(f"expected stages among {', '.join(STAGES)}, got {', '.join(unknown)}")
    name = _device()
    if name is None:
        print(
            "make gpu: no CUDA device (torch.cuda.is_available() is False); run it on a machine with a GPU",
            file=sys.stderr,
        )
        return 1
    folder = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    kept = (options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / folder)).resolve()
    kept.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix="fflfast-gpu-")) if options.bundle else kept
    outcomes: list[Outcome] = []
    with (out / "gpu.log").open("w+", encoding="utf-8", errors="replace") as log:
        run = Run(out, options.minutes, log)
        run.say(name)
        if options.wheels is not None:
            run.add_packages(options.wheels)
        for stage in chosen:
            start = time.monotonic()
            run.say(f"\n==== {stage}")
            try:
                result = "left out: no time was left" if start >= run.deadline else STAGES[stage](run)
            except Exception as error:  # whatever one stage does, the others get their turn
                result = f"failed ({type(error).__name__}: {error})"
            outcomes.append(Outcome(stage, result, time.monotonic() - start))
            run.say(f"==== {stage}: {result} ({outcomes[-1].seconds:.0f} s)")
            _write_summary(out / "gpu.md", name, outcomes)
            if options.bundle:
                _bundle(out, kept / "results.tar.gz")
        run.say("\n" + (out / "gpu.md").read_text(encoding="utf-8"))
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _bundle(folder: Path, archive: Path) -> None:
    """Pack what is there by now; the archive before stays whole until the new one is."""
    fresh = archive.with_suffix(".new")
    with tarfile.open(fresh, "w:gz") as packed:
        packed.add(folder, arcname="results")
    fresh.replace(archive)


def _write_summary(path: Path, device: str, outcomes: list[Outcome]) -> None:
    lines = [
        f"{device}, {time.strftime('%Y-%m-%d')}: `python benchmarks/gpu.py`",
        "",
        "| stage | result | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {o.stage} | {o.result} | {o.seconds:.0f} |" for o in outcomes]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
