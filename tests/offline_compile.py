"""Every kernel compiled for the GPUs that are not here, and what the compilers say of it.

    python tests/offline_compile.py --report [FILE]

`csrc/cuda/*.cu` by nvcc, the Triton kernels by `triton.compile`. A report tells registers, shared memory, stack, spills
and the widest access to global memory of each kernel and target. Results are kept under build/offline by content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "offline"
CUDA_TARGETS = ("80", "90a", "100")
PTX_TARGET = "90"
TRITON_TARGETS = (80, 90, 100)


class Resources(NamedTuple):
    """One kernel on one target. Bytes, except for registers (of a thread) and the widest accesses (in bits)."""

    source: str
    kernel: str
    target: str
    registers: int
    shared: int
    stack: int
    spills: int
    widest_load: int
    widest_store: int


class Missing(RuntimeError):
    """A tool that is not installed here."""


def nvcc() -> str:
    homes = [os.environ[v] + "/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found = next((f for h in homes if (f := shutil.which("nvcc", path=h))), None) or shutil.which("nvcc")
    if found is None:
        raise Missing("nvcc is not installed (not on PATH, nor in $CUDA_HOME)")
    return found


def cuobjdump() -> str:
    """From the CUDA toolkit, or the one inside Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            raise Missing("cuobjdump is not installed (it comes with the CUDA toolkit and with Triton)") from None
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def cuda_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_cuda(sources: Iterable[Path], *, jobs: int = 2) -> list[Resources]:
    """Compiles for all targets, two processes at a time; RuntimeError with nvcc's words where one does not compile."""
    tools = (nvcc(), cuobjdump())
    with ThreadPoolExecutor(jobs) as pool:
        return [r for results in pool.map(lambda source: _compile_cuda(source, *tools), sources) for r in results]


def _compile_cuda(source: Path, compiler: str, dumper: str) -> list[Resources]:
    import torch

    command = [compiler, "-fatbin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    includes = (Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include")))
    command += [
        *(f"-isystem={folder}" for folder in includes),
        "-DPy_LIMITED_API=0x030a0000",
        "-Xptxas=-v",
        "--Werror=all-warnings",
    ]
    command += [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
    command += [f"-gencode=arch=compute_{PTX_TARGET},code=compute_{PTX_TARGET}", str(source)]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    headers = sorted((ROOT / "csrc").rglob("*.*h"))
    contents = b"".join(f.read_bytes() for f in (source, *headers, Path(__file__))) + version
    key = f"{source.stem}-{hashlib.sha256(repr(command).encode() + contents).hexdigest()[:16]}"
    return _cached(key, lambda: _cuda_resources(source, command, dumper))


def _cuda_resources(source: Path, command: list[str], dumper: str) -> list[Resources]:
    with tempfile.TemporaryDirectory() as scratch:
        fatbin = f"{scratch}/{source.stem}.fatbin"
        result = subprocess.run([*command, "-o", fatbin], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"nvcc does not compile {source.name}:\n{result.stdout}{result.stderr}")
        properties = _ptxas_properties(result.stdout + result.stderr)
        ptx = _run(dumper, "--list-ptx", fatbin)
        if properties and f"sm_{PTX_TARGET}." not in ptx:
            raise RuntimeError(f"{source.name}: no PTX of compute_{PTX_TARGET} in the result, but {ptx!r}")
        widths = _widest_accesses(_run(dumper, "--dump-sass", fatbin))
    names = _demangle([name for name, _ in properties])
    return [
        Resources(source.name, names[name], target, *numbers, *widths[name, target])
        for (name, target), numbers in sorted(properties.items())
    ]


def _ptxas_properties(log: str) -> dict[tuple[str, str], tuple[int, int, int, int]]:
    """(kernel, target) -> registers, shared, stack, spills (stores + loads), from what `ptxas -v` prints."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name, target = re.match(r"'(\S+)' for 'sm_(\w+)'", part).groups()
        stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None or not stack:
            raise RuntimeError(f"ptxas said nothing about {name} on sm_{target} that is understood here:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = [sum(column) for column in zip(*(map(int, s) for s in stack), strict=True)]  # with called functions
        found[name, target] = (int(registers[1]), int(shared[1]) if shared else 0, numbers[0], numbers[1] + numbers[2])
    return found


def _widest_accesses(sass: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, target) -> bits of its widest load from and store to global memory."""
    sizes = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    widest: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    target = kernel = ""
    for line in sass.splitlines():
        if match := re.search(r"arch = sm_(\w+)|Function : (\S+)", line):
            target, kernel = match[1] or target, match[2] or kernel
        elif match := re.search(r"\b(LDG|LDGSTS|STG)\.(\S+)", line):
            bits = max([sizes[word] for word in match[2].split(".") if word in sizes], default=32)
            place = 1 if match[1] == "STG" else 0
            widest[kernel, target][place] = max(widest[kernel, target][place], bits)
    return defaultdict(lambda: (0, 0), {key: (loads, stores) for key, (loads, stores) in widest.items()})


def _demangle(names: list[str]) -> dict[str, str]:
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    plain = subprocess.run(
        ["c++filt", "--no-params"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    drop = r"^void |fflfast::(simt::)?|\(anonymous namespace\)::"
    return dict(zip(names, (re.sub(drop, "", name) for name in plain.stdout.splitlines()), strict=True))


def compile_triton(*, every_target: bool, jobs: int = 2) -> list[Resources]:
    """Every variant that fflfast/kernels/offline.py names, on every target or (a third of the time) on one in turn.

    In processes of their own: where TRITON_INTERPRET is set, as the tests set it, Triton compiles nothing.
    """
    try:
        import triton
    except ImportError:
        raise Missing("Triton is not installed") from None
    dumper = cuobjdump()
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}

    def share(index: int) -> list[Any]:
        command = [sys.executable, __file__, "--triton-share", str(index), str(jobs), str(int(every_target)), dumper]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode != 0:
            raise RuntimeError(f"Triton does not compile a kernel:\n{result.stdout}{result.stderr}")
        return json.loads(result.stdout)

    def compute() -> list[Resources]:
        with ThreadPoolExecutor(jobs) as pool:
            return [Resources(*row) for rows in pool.map(share, range(jobs)) for row in rows]

    sources = [*sorted((ROOT / "kernels").glob("*.py")), ROOT / "fflfast" / "graph.py", Path(__file__)]
    contents = b"".join(f.read_bytes() for f in sources) + f"{triton.__version__} {every_target}".encode()
    return sorted(_cached(f"triton-{hashlib.sha256(contents).hexdigest()[:16]}", compute))


def _triton_share(index: int, jobs: int, every_target: bool, dumper: str) -> list[Resources]:
    from fflfast.kernels import offline

    turns = enumerate(offline.cases())
    pairs = [(c, t) for i, c in turns for t in (TRITON_TARGETS if every_target else TRITON_TARGETS[i % 3 :][:1])]
    return [_triton_resources(case, target, dumper) for case, target in pairs[index::jobs]]


def _triton_resources(case: Any, target: int, dumper: str) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": case.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _run(dumper, "--dump-resource-usage", cubin.name)
        widths = _widest_accesses(_run(dumper, "--dump-sass", cubin.name))
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # Triton keeps no arrays of a thread, so that all of a stack is spilled registers.
    stack = numbers["STACK"] + numbers["LOCAL"]
    loads, stores = max(widths.values(), default=(0, 0))
    return Resources(
        "Triton", case.name, str(target), numbers["REG"], kernel.metadata.shared, stack, stack, loads, stores
    )


def _cached(key: str, compute: Callable[[], list[Resources]]) -> list[Resources]:
    file = CACHE / f"{key}.json"
    if not file.exists():
        results = compute()
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(results))
        for old in CACHE.glob(f"{key.rpartition('-')[0]}-{16 * '[0-9a-f]'}.json"):
            old.unlink(missing_ok=True)
        os.replace(scratch, file)
    return [Resources(*row) for row in json.loads(file.read_text())]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spilled(results: Iterable[Resources]) -> list[Resources]:
    """What spills registers, but for what Triton trades for an occupancy step.

    Triton 3.8 passes --regAllocOptLevel=2 to ptxas, which keeps up to 32 bytes of a thread on the stack where that
    lets one more warp run; which variants those are is in the report.
    """
    return [r for r in results if r.spills > (32 if r.source == "Triton" else 0)]


def table(results: Iterable[Resources]) -> str:
    """A Markdown table, one line a kernel; the targets' numbers side by side where they differ."""
    rows: dict[tuple[str, str], list[Resources]] = defaultdict(list)
    for result in results:
        rows[result.source, result.kernel].append(result)
    fields = ("registers", "shared", "stack", "spills", "widest_load", "widest_store")
    heads = ("source", "kernel", "targets", *(field.replace("_", " ") for field in fields))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (source, kernel), group in rows.items():
        numbers = [[str(getattr(result, field)) for result in group] for field in fields]
        cells = ["/".join(column) if len(set(column)) > 1 else column[0] for column in numbers]
        lines.append(f"| {source} | {kernel} | {'/'.join(r.target for r in group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", nargs="?", default="-", metavar="FILE", help="where the table goes (default: here)")
    parser.add_argument("--triton-share", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.triton_share:
        index, jobs, every_target, dumper = options.triton_share
        print(json.dumps(_triton_share(int(index), int(jobs), every_target == "1", dumper)))
        return 0
    results: list[Resources] = []
    for compile_all in (lambda: compile_cuda(cuda_sources()), lambda: compile_triton(every_target=True)):
        try:
            results += compile_all()
        except Missing as reason:
            print(f"left out: {reason}", file=sys.stderr)
    failed = spilled(results)
    text = table(results) + f"\n{len(results)} kernels and targets, {len(failed)} with spills\n"
    if options.report in (None, "-"):
        print(text)
    else:
        Path(options.report).write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
