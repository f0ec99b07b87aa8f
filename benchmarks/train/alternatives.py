"""Other ways to run k equal sub-networks together, forward and backward, beside one after the other.

    python -m benchmarks.train.alternatives                        # this machine's CPU, about two minutes
    python -m benchmarks.train.alternatives --device cuda --out FOLDER

The tails of k ResNet-32 on a shared trunk: from its output (128, 32, 16, 16) to the logits of 100 classes.

- serial: one after the other, as the plan of that name has it;
- grouped: one network k times as wide, of grouped convolutions;
- vmap: `torch.func.vmap` over stacked weights and buffers;
- threads: a thread for each forward; autograd has one thread a device for the backward, whatever is done here;
- streams, on a CUDA device: a stream for each forward, on which autograd runs its backward too.

All compute the same loss and gradients, which each run checks before it measures. Writes alternatives.csv and
alternatives.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fflfast import models

from .. import memory, report
from ..measure import gradients, measure_times
from ..options import arguments, keep_table, results, usable_device
from ..report import MADE, TIMES

__all__ = ["Data", "Tail", "main", "make", "tails"]

FIELDS = ("case", "networks", "amp", "batch", *TIMES, "times_serial", "error", "peak_mb", "launches", *MADE)
MODE = "forward+backward"
_AMP = {"off": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """The output of a trunk and the classes."""

    x: Tensor
    target: Tensor
    grad: None = None

    @property
    def arguments(self) -> tuple[Tensor, Tensor]:
        return self.x, self.target

    @property
    def leaves(self) -> Sequence[Tensor]:
        return (self.x,)


class Tail(nn.Module):
    """A CIFAR network behind its second stage: (B, 32, 16, 16) to logits (B, K)."""

    def __init__(self, arch: str, classes: int) -> None:
        super().__init__()
        network: Any = models.create(arch, classes)
        self.layer3, self.fc = network.layer3, network.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(x).mean((2, 3)))


def tails(count: int, arch: str, classes: int, device: torch.device) -> list[Tail]:
    """Return networks of different weights, in training mode and channels-last."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        made = [Tail(arch, classes) for _ in range(count)]
    return [tail.to(device, memory_format=torch.channels_last) for tail in made]


class _Variant(nn.Module):
    """The summed cross-entropy of k tails, as a module of (x, target)."""

    def __init__(self, networks: Sequence[Tail], dtype: torch.dtype | None) -> None:
        super().__init__()
        self.count, self.dtype = len(networks), dtype
        self._build(networks)

    def _build(self, networks: Sequence[Tail]) -> None:
        self.networks = nn.ModuleList(networks)

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        return [network(x) for network in self.networks]

    def _autocast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with self._autocast(x):
            logits = self._logits(x)
        return torch.stack([F.cross_entropy(z.float(), target) for z in logits]).sum()


class _Grouped(_Variant):
    def _build(self, networks: Sequence[Tail]) -> None:
        blocks = zip(*(network.layer3 for network in networks), strict=True)
        self.blocks = nn.ModuleList(_GroupedBlock(same, first=k == 0) for k, same in enumerate(blocks))
        self.weight = nn.Parameter(torch.stack([network.fc.weight.detach() for network in networks]))
        self.bias = nn.Parameter(torch.stack([network.fc.bias.detach() for network in networks])[:, None])

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        for block in self.blocks:
            x = block(x)
        pooled = x.mean((2, 3)).view(len(x), self.count, -1).transpose(0, 1)
        return torch.baddbmm(self.bias, pooled, self.weight.transpose(1, 2)).unbind()


class _GroupedBlock(nn.Module):
    """k basic blocks as one; the first reads the one input that all of them share, and so needs no groups."""

    def __init__(self, blocks: Sequence[Any], *, first: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _wide_conv([b.conv1 for b in blocks], first), _wide_norm([b.bn1 for b in blocks])
        self.conv2, self.bn2 = _wide_conv([b.conv2 for b in blocks], False), _wide_norm([b.bn2 for b in blocks])
        shortcuts = [b.downsample for b in blocks if b.downsample is not None]
        self.downsample = None
        if shortcuts:
            convs, norms = zip(*shortcuts, strict=True)
            self.downsample = nn.Sequential(_wide_conv(convs, first), _wide_norm(norms))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def _wide_conv(convs: Sequence[nn.Conv2d], shared_input: bool) -> nn.Conv2d:
    one, count = convs[0], len(convs)
    wide = nn.Conv2d(
        one.in_channels * (1 if shared_input else count), one.out_channels * count, one.kernel_size, one.stride,
        one.padding, groups=1 if shared_input else count, bias=False, device=one.weight.device,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    with torch.no_grad():
        wide.weight.copy_(torch.cat([conv.weight for conv in convs]))
    return wide


def _wide_norm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    wide = nn.BatchNorm2d(norms[0].num_features * len(norms), device=norms[0].weight.device)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([norm.weight for norm in norms]))
        wide.bias.copy_(torch.cat([norm.bias for norm in norms]))
    return wide


class _Vmapped(_Variant):
    def _build(self, networks: Sequence[Tail]) -> None:
        parameters, buffers = stack_module_state([*networks])
        self._names = list(parameters)
        self.stacked = nn.ParameterList(nn.Parameter(value.detach()) for value in parameters.values())
        self._buffers_of_all = buffers
        # In a tuple, as a module would be registered; without memory, as only its structure is used.
        self._skeleton = (copy.deepcopy(networks[0]).to("meta"),)

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return functional_call(self._skeleton[0], (parameters, buffers), (x,))

        parameters = dict(zip(self._names, self.stacked, strict=True))
        return vmap(call)(parameters, self._buffers_of_all).unbind()


class _Threaded(_Variant):
    def _build(self, networks: Sequence[Tail]) -> None:
        super()._build(networks)
        share = max(1, torch.get_num_threads() // len(networks))
        # The operators of each thread share the cores; more threads than cores would wait for each other.
        self._pool = ThreadPoolExecutor(len(networks), initializer=lambda: torch.set_num_threads(share))

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        def run(network: nn.Module) -> Tensor:
            with self._autocast(x):  # a setting of each thread
                return network(x)

        return list(self._pool.map(run, self.networks))


class _Streamed(_Variant):
    def _build(self, networks: Sequence[Tail]) -> None:
        super()._build(networks)
        self._streams = [torch.cuda.Stream(next(network.parameters()).device) for network in networks]

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        ambient, logits = torch.cuda.current_stream(x.device), []
        for stream, network in zip(self._streams, self.networks, strict=True):
            stream.wait_stream(ambient)
            with torch.cuda.stream(stream):
                logits.append(network(x))
        for stream in self._streams:
            ambient.wait_stream(stream)
        return logits


KINDS: dict[str, Callable[..., _Variant]] = {
    "serial": _Variant,
    "grouped": _Grouped,
    "vmap": _Vmapped,
    "threads": _Threaded,
    "streams": _Streamed,
}


def make(kind: str, networks: Sequence[Tail], amp: str = "off") -> nn.Module:
    """Return a way to run copies of the networks together: a module from (x, target) to their summed loss."""
    return KINDS[kind](copy.deepcopy(list(networks)), _AMP[amp])


def error_of(module: nn.Module, serial: nn.Module, data: Data) -> float:
    """Return how far loss and gradient of the shared input are from those of serial, relative to their size."""
    pairs = [(m(*data.arguments).detach(), gradients(m, data)[0]) for m in (module, serial)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*pairs, strict=True))


def measured(count: int, amp: str, device: torch.device, arch: str, batch: int, budget: float) -> list[dict[str, Any]]:
    """Return a row a way."""
    networks = tails(count, arch, 100, device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, networks[0].layer3[0].conv1.in_channels, 16, 16, generator=generator).relu()
    x = x.to(device, memory_format=torch.channels_last).requires_grad_()
    data = Data(x, torch.randint(100, (batch,), generator=generator).to(device))
    kinds = [kind for kind in KINDS if kind != "streams" or device.type == "cuda"]
    modules = {kind: make(kind, networks, amp) for kind in kinds}
    errors = {kind: error_of(module, modules["serial"], data) for kind, module in modules.items()}
    # Another order of summation, amplified by the norms of fresh networks, moves gradients by some 1e-3, in 16 bits by
    # some 1e-1; another computation moves them by their own size.
    allowed = 2e-2 if amp == "off" else 0.5
    if wrong := [kind for kind, error in errors.items() if not error < allowed]:
        raise RuntimeError(f"{wrong[0]} does not compute what serial does: off by {errors[wrong[0]]:.1e}")
    rows = []
    times = measure_times(modules, [data], MODE, budget=budget)
    for kind, module in modules.items():
        taken = times[kind]
        rows.append({
            "case": f"{count} × {arch}, {amp}", "networks": count, "amp": amp, "batch": batch, "variant": kind,
            "mode": MODE, "median_ms": 1e3 * taken.median, "least_ms": 1e3 * taken.least, "p20_ms": 1e3 * taken.p20,
            "p80_ms": 1e3 * taken.p80, "repetitions": taken.repetitions,
            "times_serial": times["serial"].median / taken.median, "error": errors[kind],
            "peak_mb": _peak_mb(kind, module, data), "launches": memory.launches(module, data),
        })  # fmt: skip
    return rows


def _peak_mb(kind: str, module: nn.Module, data: Data) -> float | str:
    if kind == "threads" and not data.x.is_cuda:
        return ""  # the profiler sees the memory of one thread alone
    return memory.peak_bytes(module, data) / 1e6


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table, a line a case and way."""
    head = ("networks", "way", "ms forward + backward", "speed, serial = 1", "peak memory", "launches")
    lines = [
        (
            row["case"],
            row["variant"],
            f"{float(row['median_ms']):.4g} ({float(row['p20_ms']):.4g} … {float(row['p80_ms']):.4g})",
            report.value(row, "times_serial", "{:.2f}"),
            report.value(row, "peak_mb", "{:,.0f} MB"),
            report.value(row, "launches", "{:,.0f}"),
        )
        for row in rows
    ]
    return f"{report.markdown(head, lines)}\n\nMedians (20th … 80th percentile). {report.made_with(rows)}"


def main() -> int:
    """Measure, keep the rows, print the table; returns the exit code."""
    parser = arguments("train.alternatives", __doc__)
    parser.add_argument("--arch", default="resnet32", help="a CIFAR ResNet (default: resnet32)")
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--budget", type=float, default=20, help="seconds for each case (default: 20)")
    options = parser.parse_args()
    device = usable_device("train.alternatives", options)
    if device is None:
        return 1
    made = report.provenance(device, "benchmarks.train.alternatives")
    file = results(options, device, "alternatives")
    rows: list[dict[str, Any]] = []
    for count in (2, 4):
        for amp in ("off", "bf16"):
            found = measured(count, amp, device, options.arch, options.batch, options.budget)
            rows += [{**row, **made} for row in found]
            report.write(file, rows, FIELDS)
    keep_table(file, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
