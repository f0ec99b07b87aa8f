"""Builds the libraries of kernels from csrc/; everything else about the package stands in pyproject.toml.

    pip install --no-build-isolation .     with torch installed: the CPU library, and the CUDA library where nvcc is
    pip install .                          without torch or a compiler at hand: Python alone (Triton and reference)

Both libraries use PyTorch's stable ABI and Python's limited API: one build serves every torch from 2.10 and every
Python from 3.10 on, and the CUDA library builds against a CPU-only torch too. Environment:

    FFLFAST_BUILD       auto (default: what can be built, and a word about the rest), auto-cpu (the same without
                        CUDA), cpu, cuda (both), none
    FFLFAST_CUDA_ARCHS  targets, default "80;90a;100;90+PTX", less what this nvcc does not know
    CXX, CUDA_HOME, MAX_JOBS as usual
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
CHOICE = os.environ.get("FFLFAST_BUILD") or "auto"
CHOICES = ("auto", "auto-cpu", "cpu", "cuda", "none")
DEFAULT_ARCHS = "80;90a;100;90+PTX"
# Functions for one instruction set each; which of them runs is decided on the user's machine.
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}


def say(message: str) -> None:
    print(f"fflfast: {message}", file=sys.stderr, flush=True)


def compiler() -> str | None:
    """The C++ compiler's command; what CXX says or nothing, else the first that is there."""
    named = os.environ.get("CXX", "").strip()
    names = (named,) if named else ("c++", "g++", "clang++")
    return next((name for name in names if shutil.which(shlex.split(name)[0])), None)


def nvcc() -> str | None:
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    return next((found for h in homes if (found := shutil.which("nvcc", path=f"{h}/bin"))), shutil.which("nvcc"))


def jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not value.isdecimal() or int(value) < 1:
        raise SystemExit(f"fflfast: MAX_JOBS must be a whole number of at least 1, got {value!r}")
    return int(value)


def missing(name: str) -> str | None:
    """Why a library cannot be built here, or None."""
    if sys.platform == "win32":
        return "the kernels are not built on Windows yet"
    if importlib.util.find_spec("torch") is None:
        return (
            "torch is not importable while building (pip hides it unless you say --no-build-isolation, with "
            "setuptools installed)"
        )
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        return f"torch 2.10 or newer is needed to build with, this is {torch.__version__}"
    if compiler() is None:
        named = os.environ.get("CXX", "").strip()
        return f"no C++ compiler was found ({f'CXX={named}' if named else 'set CXX, or install g++ or clang++'})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h was not found (install Python's development headers, e.g. python3-dev)"
    if name == "cuda" and nvcc() is None:
        return "no CUDA compiler was found (put nvcc on PATH or set CUDA_HOME)"
    return None


def extensions() -> list[Extension]:
    if CHOICE not in CHOICES:
        raise SystemExit(f"fflfast: FFLFAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")
    wanted = {"auto": ("cpu", "cuda"), "auto-cpu": ("cpu",), "cpu": ("cpu",), "cuda": ("cpu", "cuda"), "none": ()}[
        CHOICE
    ]
    found = []
    for name in wanted:
        sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / name).glob("*.c*") if p.suffix != ".cuh")
        reason = missing(name)
        if reason is None:
            found.append(
                Extension(f"fflfast._{name}", sources, py_limited_api=True, optional=CHOICE.startswith("auto"))
            )
        elif CHOICE.startswith("auto"):
            say(f"the {name.upper()} library is left out: {reason}")
        else:
            raise SystemExit(f"fflfast: FFLFAST_BUILD={CHOICE}, but {reason}")
    return found


class BuildKernels(build_ext):
    """Compiles with ninja where it is installed, else in threads; nothing is compiled twice."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rsplit("_", 1)[1]
        library = BUILD / f"_{name}.abi3.so"
        try:
            run(name, [*compile_steps(ext.sources), link_step(name, ext.sources, library)])
        except (subprocess.CalledProcessError, OSError) as error:
            reason = f"building the {name.upper()} library failed ({error}; pip -v shows the compiler's messages)"
            if CHOICE.startswith("auto"):
                say(f"{reason}: it is left out; FFLFAST_BUILD=cpu or cuda makes that an error")
                return
            raise SystemExit(f"fflfast: {reason}; FFLFAST_BUILD=none installs without it") from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def compile_steps(sources: list[str]) -> list[tuple[Path, list[str], list[Path]]]:
    """(output, command, inputs) of each source."""
    import torch

    torch_include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    flags += [f"-I{ROOT / 'csrc'}"]
    for folder in (torch_include, torch_include / "torch/csrc/api/include", sysconfig.get_path("include")):
        flags += ["-isystem", str(folder)]
    steps = []
    for source in sources:
        # The flags belong to the object: another torch or another choice of targets is another file.
        if source.endswith(".cu"):
            command = [
                nvcc() or "nvcc",
                *flags,
                "-DUSE_CUDA",
                "-Xcompiler=-fPIC",
                "--expt-relaxed-constexpr",
                *targets(),
            ]
        else:
            isa = next((extra for suffix, extra in ISA_FLAGS.items() if Path(source).stem.endswith(suffix)), [])
            isa = isa if platform.machine().lower() in ("x86_64", "amd64") else []
            command = [*shlex.split(compiler() or "c++"), *flags, "-fPIC", "-fvisibility=hidden", "-Wall", *isa]
        output = object_of(source)
        steps.append((output, [*command, "-c", source, "-o", str(output)], [ROOT / source]))
    return steps


def object_of(source: str) -> Path:
    import torch

    return BUILD / f"torch-{torch.__version__}" / (source.replace("/", "-") + ".o")


def targets() -> list[str]:
    """nvcc's flags for the GPUs to compile for."""
    known = subprocess.run([nvcc() or "nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = os.environ.get("FFLFAST_CUDA_ARCHS") or DEFAULT_ARCHS
    flags = []
    for arch in filter(None, (a.strip() for a in archs.split(";"))):
        number = arch.removesuffix("+PTX")
        # The listing has no names with a letter behind: sm_90a goes with sm_90.
        if archs == DEFAULT_ARCHS and f"sm_{number.rstrip('a')}" not in known:
            say(f"this nvcc does not know sm_{number}: left out")
            continue
        code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def link_step(name: str, sources: list[str], library: Path) -> tuple[Path, list[str], list[Path]]:
    import torch

    objects = [object_of(source) for source in sources]
    torch_libraries = Path(torch.__file__).parent / "lib"
    # nvcc links its own static runtime library and knows where that lies.
    linker = [nvcc() or "nvcc", "-cudart=static"] if name == "cuda" else shlex.split(compiler() or "c++")
    command = [*linker, "-shared", *map(str, objects), "-o", str(library), f"-L{torch_libraries}"]
    if name == "cuda":
        # A CPU-only torch has no libtorch_cuda to link with: its name is all that the linker needs.
        stub = BUILD / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        empty = ["-shared", "-x", "c++", "/dev/null", "-o", str(stub), "-Wl,-soname,libtorch_cuda.so"]
        subprocess.run([*shlex.split(compiler() or "c++"), *empty], check=True)
        command += [f"-L{stub.parent}", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
    command += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    command += ["-ltorch_cpu"]
    return library, command, objects


def run(name: str, steps: list[tuple[Path, list[str], list[Path]]]) -> None:
    """Run the compilations in parallel, then the link."""
    for output, _, _ in steps:
        output.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja")
    how = "ninja" if ninja else "no ninja"
    say(f"building the {name.upper()} library ({len(steps) - 1} sources, {how}, {jobs()} jobs)")
    if ninja:
        script = BUILD / f"{name}.ninja"
        script.write_text(ninja_script(steps))
        subprocess.run([ninja, "-f", str(script), "-j", str(jobs())], cwd=ROOT, check=True)
        return
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(lambda step: subprocess.run(step[1], cwd=ROOT, check=True), steps[:-1]))
    subprocess.run(steps[-1][1], cwd=ROOT, check=True)


def ninja_script(steps: list[tuple[Path, list[str], list[Path]]]) -> str:
    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"builddir = {escape(BUILD)}",
        "rule compile",
        "  command = $line -MD -MF $out.d",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += ["rule link", "  command = $line", "  description = $out"]
    for k, (output, command, inputs) in enumerate(steps):
        rule = "link" if k == len(steps) - 1 else "compile"
        lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}")
        lines.append(f"  line = {shlex.join(command).replace('$', '$$')}")
    return "\n".join([*lines, ""])


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
