"""`fflfast doctor`: every backend that is here against float64, on this machine, forward and backward.

Needs nothing beyond torch and numpy. The rule is that of `fflfast.accuracy`; what goes in is listed per operator
(`fflfast.doctor_loss`, `fflfast.doctor_fusion`). A further operator adds its checks to `_checks`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from . import __version__
from .ops.backends import backends, use_backend

__all__ = ["Check", "doctor", "machine"]


class Check(Protocol):
    """One kind of input of one operator; see `fflfast.doctor_loss.LossCheck`."""

    @property
    def name(self) -> str: ...
    @property
    def operator(self) -> str: ...
    @property
    def quick(self) -> bool: ...
    @property
    def compiled(self) -> bool: ...
    @property
    def device_only(self) -> bool: ...
    def prepare(self, device: torch.device) -> Callable[[bool], dict[str, float]]: ...


@dataclass(frozen=True)
class _Cell:
    """What one backend made of one check: the share of the allowance, or why there is none."""

    share: float | None
    reason: str = ""
    missed: bool = False

    def __str__(self) -> str:
        if self.missed:
            return "MISS"
        return "–" if self.share is None else f"{self.share:.2f}"


_EMPTY = _Cell(None)
_REFUSED = " cannot take this call: "  # how `ops.backends.choose` ends a forced backend that does not take a case


def doctor(
    backend: str | None = None,
    device: str | None = None,
    *,
    quick: bool = False,
    write: Callable[[str], None] = print,
) -> int:
    """Run the checks, write a table of them, and return 0, or 1 if any backend missed.

    Args:
        backend: look at this backend alone; that it is not available is then a miss.
        device: look at this device alone; by default the CPU and the accelerator, if there is one.
        quick: leave out the largest inputs and torch.compile.
        write: takes each line of the report.

    Raises:
        ValueError: an unknown backend, or a device that is not there.
    """
    state = backends()
    if backend is not None and backend not in state:
        raise ValueError(f"doctor: expected one of {', '.join(state)} as backend, got {backend!r}")
    devices = _devices(device)
    for line in machine(devices):
        write(line)
    width = max(map(len, state))
    for name, reason in state.items():
        write(f"  backend {name:<{width}}  {reason}")
    if backend is not None and state[backend] != "available":
        write(f"MISS {backend} was asked for and is not available: {state[backend]}")
        return 1
    names = [name for name in state if state[name] == "available" and backend in (None, name)]
    misses: list[str] = []
    idle: list[set[str]] = []
    for where in devices:
        found, unused = _examine(where, names, quick, write)
        misses += found
        idle.append(unused)
    if backend is not None and all(backend in unused for unused in idle):
        misses.append(f"{backend} was asked for and takes no call on {', '.join(map(str, devices))}")
    for miss in misses:
        write(f"MISS {miss}")
    write(f"{len(misses)} missed" if misses else "all within the contract")
    return 1 if misses else 0


def machine(devices: Sequence[torch.device]) -> list[str]:
    """Versions and hardware, a line each."""
    versions = [f"fflfast {__version__}"]
    for package in ("torch", "numpy", "triton"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    lines = [", ".join([*versions, f"Python {platform.python_version()}", platform.platform(terse=True)])]
    for device in devices:
        if device.type == "cpu":
            capability = torch.backends.cpu.get_cpu_capability()
            lines.append(
                f"  {device}: {_cpu_model()}, {capability}, {torch.get_num_threads()} of {os.cpu_count()} threads"
            )
        elif device.type == "cuda":
            p = torch.cuda.get_device_properties(device)
            lines.append(f"  {device}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        else:
            lines.append(f"  {device}")
    return lines


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def _devices(device: str | None) -> list[torch.device]:
    if device is None:
        found = [torch.device("cpu")]
        if torch.accelerator.is_available():
            accelerator = torch.accelerator.current_accelerator()
            assert accelerator is not None  # is_available said so
            found.append(torch.device(accelerator.type, torch.accelerator.current_device_index()))
        return found
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).cpu()
    # A backend that is not compiled in, not there or out of memory: AssertionError, RuntimeError, NotImplementedError.
    except Exception as error:
        raise ValueError(f"doctor: expected a device that is here, got {device!r}: {_first_line(error)}") from error
    return [where]


def _checks(device: torch.device, quick: bool) -> list[Check]:
    # Here, because they build graphs and closures that nobody else needs.
    from .doctor_fusion import CHECKS as FUSION
    from .doctor_loss import CHECKS as LOSS

    everything: tuple[Check, ...] = (*LOSS, *FUSION)
    return [
        check for check in everything if (check.quick or not quick) and not (check.device_only and device.type == "cpu")
    ]


def _examine(
    device: torch.device, names: Sequence[str], quick: bool, write: Callable[[str], None]
) -> tuple[list[str], set[str]]:
    """Run and report the checks on one device: (a line a miss, the backends that take nothing there)."""
    no_compiler = "left out by --quick" if quick else _compiler_problem(device)
    columns = [(name, compiled) for name in names for compiled in (False, True)[: 1 if no_compiler else 2]]
    table: dict[str, list[_Cell]] = {}
    misses = []
    for check in _checks(device, quick):
        _progress(f"{device}: {check.name}")
        try:
            measure = check.prepare(device)
        except Exception as error:  # not ours: PyTorch itself has no such dtype there, or no memory
            table[check.name] = [_Cell(None, _first_line(error))] * len(columns)
            continue
        row = table[check.name] = []
        for name, compiled in columns:
            cell, wrong = _EMPTY, ""
            if check.compiled or not compiled:
                cell, wrong = _measure(name, measure, compiled)
            row.append(cell)
            if wrong:
                how = "compiled" if compiled else "eager"
                misses.append(f"{name} on {device}, {how}, {check.operator}, {check.name}: {wrong}")
        torch.compiler.reset()
    _progress("")

    idle = {
        name: reasons[0].reason
        for name in names
        if (reasons := [row[columns.index((name, False))] for row in table.values()])
        and all(cell.share is None and not cell.missed for cell in reasons)
    }
    shown = [i for i, (name, _) in enumerate(columns) if name not in idle]
    write(f"\n{device}: worst error as a share of what is allowed (at most 1; – not applicable)")
    head = ["check", *(f"{name} compiled" if compiled else name for name, compiled in (columns[i] for i in shown))]
    for line in _table(head, [[name, *(str(row[i]) for i in shown)] for name, row in table.items()]):
        write(line)
    for name, reason in idle.items():
        write(f"  {name} takes no call on {device}: {reason}")
    for i in shown:
        refused: dict[str, list[str]] = {}
        for name, row in table.items():
            if row[i].reason and not row[i].missed:
                refused.setdefault(row[i].reason, []).append(repr(name))
        for reason, checks in refused.items():
            write(f"  {columns[i][0]} leaves {', '.join(checks)} to the next backend: {reason}")
    if no_compiler:
        write(f"  torch.compile skipped: {no_compiler}")
    return misses, set(idle)


def _measure(name: str, measure: Callable[[bool], dict[str, float]], compiled: bool) -> tuple[_Cell, str]:
    """(cell, what is wrong or nothing)."""
    try:
        with use_backend(name):
            shares = measure(compiled)
    except Exception as error:  # whatever a backend raises on legal input is a finding, not the end of the run
        message = _first_line(error)
        if _REFUSED in message:
            return _Cell(None, message.partition(_REFUSED)[2]), ""
        return _Cell(None, message, missed=True), f"raised {type(error).__name__}: {message}"
    wrong = "; ".join(
        f"{quantity} (has to be exact and is not)"
        if share == float("inf")
        else f"{quantity} ({share:.3g} × the allowed error)"
        for quantity, share in shares.items()
        if not share <= 1
    )
    return _Cell(max(shares.values()), missed=bool(wrong)), wrong


def _compiler_problem(device: torch.device) -> str:
    """Why torch.compile cannot work here at all, or nothing."""
    _progress(f"{device}: torch.compile")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(64, device=device))
    except Exception as error:  # no compiler, no headers, no Triton, an unsupported Python: each has its own type
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    """The first line that says something, without a wrapper's name before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table: rich's on a terminal that has it, aligned columns otherwise."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(*head, box=None, header_style="bold")
        for row in rows:
            table.add_row(*(f"[bold red]{cell}[/]" if cell == "MISS" else cell for cell in row))
        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip().splitlines()
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return [f"  {line}" for line in lines]


def _progress(text: str) -> None:
    """One line on a terminal's stderr that the next overwrites."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
