"""CUDA kernels built for the host: their .cu files as plain C++ together with the SIMT emulation of `tests/simt`."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests" / "simt"
CACHE = ROOT / "build" / "simt"
INCLUDES = (ROOT / "csrc" / "cuda", ROOT / "csrc", EMULATOR, Path(torch.__file__).parent / "include")
FLAGS = (
    *("-x", "c++", "-std=c++17", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"),
    *("-fno-gnu-unique", "-DFFLFAST_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)


class Launch(NamedTuple):
    """What one launch asked for, and how often the emulator changed from one of its threads to another."""

    kernel: str
    grid: int
    block: int
    cluster: int
    shared: int
    switches: int


class Emulation:
    """One emulated library: its own functions, and the controls of the emulator inside it."""

    def __init__(self, path: Path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self._seed = self.library.fflfast_simt_seed
        self._seed.argtypes = [ctypes.c_uint64]
        self._skip = self.library.fflfast_simt_skip
        self._skip.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64]
        self._device = self.library.fflfast_simt_device
        self._device.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        self._error_share = self.library.fflfast_simt_error_share
        self._error_share.argtypes = [ctypes.c_double]
        self._symbols = self._read_symbols()
        self._names = {address: name for address, name, _ in self._symbols}

    def reset(self) -> None:
        """Undoes every setting, forgets every record."""
        self.library.fflfast_simt_reset()

    def seed(self, seed: int) -> None:
        self._seed(seed)

    def skip(self, site: int | None, kernel: str | None = None) -> None:
        """Turns a barrier or wait into nothing, a shuffle into the thread's own value; in one kernel or in all."""
        chosen = [address for address, name in self._names.items() if name == kernel]
        self._skip(-1 if site is None else site, (ctypes.c_void_p * len(chosen))(*chosen), len(chosen))

    def resident(self, clusters: int) -> None:
        """How many clusters run side by side."""
        self.library.fflfast_simt_resident(clusters)

    def error_share(self, share: float) -> None:
        """How much of the documented error bound exp2_approx and log2_approx use up, 0 to 1."""
        self._error_share(share)

    def device(self, *, sm_count: int = 132, capability: int = 90, shared_per_block: int = 227 * 1024) -> None:
        self._device(sm_count, capability, shared_per_block)

    def capturing(self, value: bool) -> None:
        self.library.fflfast_simt_capturing(int(value))

    def sites(self) -> set[int]:
        """Every site that was compiled into this library."""
        return set(self._numbers(self.library.fflfast_simt_known_sites))

    def visited(self) -> set[tuple[str, int]]:
        """The kernels (without template arguments) and their sites that a thread has come to since the last reset."""
        kernels = {launch[0] for launch in self._raw_launches()}
        sites = self.library.fflfast_simt_visited_sites
        return {(self._names[k], site) for k in kernels for site in self._numbers(sites, ctypes.c_void_p(k))}

    def launches(self) -> list[Launch]:
        return [Launch(self._names[kernel], *rest) for kernel, *rest in self._raw_launches()]

    def clear(self, variable: str) -> None:
        """Zeroes a variable of the library, wherever it stands: what a launch that was given up has left there."""
        places = [(address, size) for address, name, size in self._symbols if name == variable]
        assert places, f"{self.path.name} has no {variable}"
        for address, size in places:
            ctypes.memset(address, 0, size)

    def _raw_launches(self) -> list[tuple[int, ...]]:
        numbers = self._numbers(self.library.fflfast_simt_launches)
        width = len(Launch._fields)
        return [tuple(numbers[i : i + width]) for i in range(0, len(numbers), width)]

    def _numbers(self, function: Callable[..., int], *arguments: object) -> list[int]:
        function.restype = ctypes.c_int64
        count = function(*arguments, None, ctypes.c_int64(0))
        numbers = (ctypes.c_int64 * count)()
        function(*arguments, numbers, ctypes.c_int64(count))
        return list(numbers)

    def _read_symbols(self) -> list[tuple[int, str, int]]:
        """(address, name without namespaces, template arguments and parameters, bytes) of the library's symbols."""
        listing = subprocess.run(["nm", "-CS", str(self.path)], capture_output=True, text=True, check=True).stdout
        symbols = re.findall(r"^([0-9a-f]+) ([0-9a-f]+) [tTbBdD] (.*)$", listing, re.MULTILINE)
        anchor = next(int(address, 16) for address, _, name in symbols if name == "fflfast_simt_reset")
        base = (ctypes.cast(self.library.fflfast_simt_reset, ctypes.c_void_p).value or 0) - anchor
        return [(base + int(address, 16), _plain_name(name), int(size, 16)) for address, size, name in symbols]


def _plain_name(demangled: str) -> str:
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].split("::")[-1]


def build(name: str, *sources: Path, defines: tuple[str, ...] = (), torch_library: bool = True) -> Emulation:
    """Compiles and loads `sources`; skips the test that asks where there is no C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the SIMT emulation wants a C++ compiler (g++, or $CXX)")
    CACHE.mkdir(parents=True, exist_ok=True)
    units = [*sources, *sorted(EMULATOR.glob("*.cpp"))]
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    link = ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", *(torch_libraries if torch_library else [])]
    with (CACHE / f"{name}.lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds, and the others wait for it
        objects = list(pool.map(lambda unit: _compile(compiler, unit, defines), units))
        library = _cached(f"{name}.so", [compiler, *map(str, objects), *link], b"")
    if torch_library:
        torch.ops.load_library(str(library))
    return Emulation(library)


@functools.lru_cache(maxsize=1)
def load_distill_loss() -> Emulation:
    """The CUDA library's operators of the loss on CPU tensors, torch.ops.fflfast_emulated."""
    return build("distill_loss", *sorted((ROOT / "csrc" / "cuda").glob("distill_*.cu")))


@functools.lru_cache(maxsize=1)
def load_fuse_features() -> Emulation:
    """Those of the fusion: a library of its own, which adds to the same namespace."""
    return build("fuse_features", *sorted((ROOT / "csrc" / "cuda").glob("fus*.cu")))


@contextlib.contextmanager
def fresh(library: Emulation, counters: str) -> Iterator[None]:
    """Fresh settings and counters; and memory that nobody has written holds no right result of the run before: by glibc
    what a library asks for, by torch's deterministic mode what its Python functions allocate."""
    library.reset()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    perturb = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
    m_perturb = -6  # malloc.h
    perturb(m_perturb, 1)
    try:
        yield
    finally:
        perturb(m_perturb, 0)
        torch.use_deterministic_algorithms(before)
        library.reset()
        library.clear(counters)


def unnoticed(
    library: Emulation,
    kernel: str,
    counters: str,
    visits: Mapping[str, set[int]],
    is_right: Callable[[str, int], bool],
    seeds: Callable[[int], Iterable[int]],
) -> set[int]:
    """The sites of a kernel that can be skipped without any case giving a wrong result in any of the orders tried.

    visits: case -> the sites it comes to; is_right(case, seed) runs a case and compares its bits.
    """

    def is_wrong(name: str, seed: int) -> bool:
        try:
            return not is_right(name, seed)
        except RuntimeError as error:
            if "SIMT emulation" not in str(error):
                raise
            return True
        finally:
            library.clear(counters)

    def notices(name: str, site: int) -> bool:
        library.reset()
        library.skip(site, kernel)
        return any(is_wrong(name, seed) for seed in seeds(site))

    sites = set().union(*visits.values())
    assert sites, f"no case comes to a site of {kernel}"
    return {site for site in sites if not any(site in visits[name] and notices(name, site) for name in visits)}


def _compile(compiler: str, unit: Path, defines: tuple[str, ...]) -> Path:
    # The emulator's inner loop is worth -O2, while the many kernels must compile quickly.
    flags = [*FLAGS, "-O2" if unit.suffix == ".cpp" else "-O1", *defines, *(f"-I{p}" for p in INCLUDES[:-1])]
    contents = torch.__version__.encode() + b"".join(file.read_bytes() for file in _with_headers(unit))
    name = "-".join([unit.stem, *(define.strip("-") for define in defines)])
    return _cached(f"{name}.o", [compiler, *flags, "-isystem", str(INCLUDES[-1]), "-c", str(unit)], contents)


def _with_headers(unit: Path) -> list[Path]:
    """A source and the headers of this project that it includes, through others too."""
    found, pending = set(), [unit.resolve()]
    while pending:
        file = pending.pop()
        if file in found:
            continue
        found.add(file)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            places = (folder / name for folder in (file.parent, *INCLUDES[:-1]))
            pending += [place.resolve() for place in places if place.is_file()][:1]
    return sorted(found)


def _cached(name: str, command: list[str], contents: bytes) -> Path:
    """What `command` writes for files of these contents; older outputs of the same name go."""
    stem, suffix = name.rsplit(".", 1)
    output = CACHE / f"{stem}-{hashlib.sha256(repr(command).encode() + contents).hexdigest()[:16]}.{suffix}"
    if not output.exists():
        scratch = output.with_suffix(f".{os.getpid()}")
        result = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        for old in CACHE.glob(f"{stem}-{16 * '[0-9a-f]'}.{suffix}"):
            old.unlink(missing_ok=True)
        os.replace(scratch, output)
    return output
