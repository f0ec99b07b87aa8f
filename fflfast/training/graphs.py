"""Pictures of distillation graphs: who teaches whom, drawn from the `DistillGraph` that a method trains with."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch

from .. import methods, models
from ..graph import DistillGraph, Edge
from ..methods import Method
from .config import ConfigError, ResolvedConfig, naming
from .networks import build_cohort, default_trunk
from .plots import check_ending, save

__all__ = ["draw_graph", "plot_graph"]

_CLASSES = 10
_SMALLEST = {"classification": ("tiny", 32), "pose": ("hourglass2@1/32", 64)}
"""By task: a network that a picture needs and nobody trains, and pixels of its images."""

_STEP, _WIDTH, _HEIGHT = 1.7, 1.2, 0.5  # inches: from box to box, and of a box
_ROWS = (0.85, 2.4)  # heights of the row of sub-networks and of that above
_NETWORK, _LEARNER, _GIVEN, _MIXTURE = "#cfe2f5", "#d5ecd4", "#e4e4e4", "#ffffff"
_TEACHES, _MIXES, _INK = "#aa3377", "#8a8a8a", "#222222"
# Text stays text, and names within the file do not depend on the moment.
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "fflfast", "font.family": "DejaVu Sans", "font.size": 10.0}


def plot_graph(method: str, sub_networks: int | None = None, out: str | Path | None = None) -> Path:
    """Build a method on a cohort of small networks, draw its graph and return the file.

    Args:
        method: a short name, or an import path "package.module:Class".
        sub_networks: N of the cohort; None takes 2, or what comes nearest among the numbers that the method takes.
        out: the picture, of a kind that matplotlib writes (.svg, .png, .pdf …); None takes METHOD.svg here.

    Raises:
        ConfigError: an unknown method, a number of networks that it does not take, a file that cannot be written.
    """
    with naming("METHOD"):
        kind = methods.resolve(method)
    count = sub_networks
    if count is None:
        count = max(2, kind.min_sub_networks)
        count = count if kind.max_sub_networks is None else min(count, kind.max_sub_networks)
    if count < 1:
        raise ConfigError(f"--sub-networks: expected at least 1, got {count}")
    with naming(f"--sub-networks {count}"):
        built = _build(method, kind, count)
    name = method.rpartition(":")[2]
    file = Path(f"{name}.svg" if out is None else out)
    title = f"{name}, {count} network{'' if count == 1 else 's'}"
    draw_graph(built.graph, file, title, count, built.extra_term_names)
    return file


def _build(name: str, kind: type[Method], count: int) -> Method:
    """Return a method on small networks of its task, with everything that it may need."""
    arch, size = _SMALLEST[kind.task]
    with torch.random.fork_rng(devices=()):  # a picture leaves the caller's random state alone
        names = kind.architectures([arch] * count)
        trunk = default_trunk(names, kind, _CLASSES, size)
        config = ResolvedConfig(method=name, arch=names, trunk=trunk, image_size=size)
        cohort = build_cohort(config, kind, _CLASSES)
        teacher: dict[str, Any] = {"teacher": models.create(arch, _CLASSES)} if kind.needs_teacher else {}
        return kind(cohort, _CLASSES, None, **teacher)


def draw_graph(
    graph: DistillGraph, out: str | Path, title: str, sub_networks: int, further_terms: tuple[str, ...] = ()
) -> None:
    """Draw a graph: the sub-networks in a row, above them what else there is, an arrow for each teaching relation.

    Args:
        graph: what to draw.
        out: the file; its ending says of which kind.
        title: above the picture.
        sub_networks: how many of the first logits tensors are sub-networks' own.
        further_terms: names of the terms that a method adds to those of the graph, listed below.

    Raises:
        ConfigError: the file cannot be written, or its ending names no kind of picture.
    """
    import matplotlib
    from matplotlib.figure import Figure

    file = Path(out)
    with matplotlib.rc_context(_STYLE):
        taught = _taught(graph, sub_networks)
        rows = (range(taught), range(taught, len(graph.names)))
        width = max(_STEP * max(map(len, rows)), 3.7) + 0.4
        top = _ROWS[1 if rows[1] else 0] + 0.65
        figure = Figure(figsize=(width, top + 0.95))
        check_ending(figure, file)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0.0, width), ylim=(0.0, top + 0.95))
        axes.set_axis_off()
        _Picture(axes, graph, rows, width).draw()
        axes.text(0.15, top + 0.7, title, weight="bold", size=12, color=_INK)
        axes.text(0.15, top + 0.6, _legend(graph), size=7.5, color=_INK, va="top", linespacing=1.5)
        if further_terms:
            lines = textwrap.wrap(f"further terms: {', '.join(further_terms)}", int(16.5 * width), max_lines=2)
            axes.text(0.15, 0.08, "\n".join(lines), size=7.5, color=_INK, linespacing=1.5)
        # No date and no version: the same graph gives the same file.
        metadata = {"Date": None, "Creator": None} if file.suffix.lower() == ".svg" else None
        save(figure, file, metadata=metadata)


def _taught(graph: DistillGraph, sub_networks: int) -> int:
    """Return how many of the first tensors stand in the lower row: the sub-networks and what only learns, as they do.

    A pose network has several outputs, so that their number may be larger than that of the networks.
    """
    teachers, students = ({edge[place] for edge in graph.edges} for place in (0, 1))
    count = sub_networks
    while count < graph.num_logits and count in students - teachers:
        count += 1
    return count


class _Picture:
    """Boxes and arrows on the axes of a figure, in inches."""

    def __init__(self, axes: Any, graph: DistillGraph, rows: tuple[range, range], width: float) -> None:
        self.axes, self.graph, self.sub_networks = axes, graph, len(rows[0])
        self.places = {
            node: (width / 2 + _STEP * (k - (len(row) - 1) / 2), height)
            for row, height in zip(rows, _ROWS, strict=True)
            for k, node in enumerate(row)
        }

    def draw(self) -> None:
        self.boxes = {node: self._box(node) for node in self.places}
        for v, shares in enumerate(self.graph.mixtures):
            for member in (j for j, share in enumerate(shares) if share):
                self._line(member, self.graph.num_logits + v, 0.08, color=_MIXES, linestyle=":", arrowstyle="-")
        for edge in self.graph.edges:
            style = "-" if edge.detach else (0, (5, 2))
            bend = self._bend(edge)
            self._line(edge.teacher, edge.student, bend, color=_TEACHES, linestyle=style, arrowstyle="-|>")
            if edge.weight != 1.0:
                self._weight(edge, bend)

    def _box(self, node: int) -> Any:
        from matplotlib.patches import FancyBboxPatch

        x, y = self.places[node]
        mixture = node >= self.graph.num_logits
        ce = 0.0 if mixture else self.graph.ce_weights[node]
        learns = bool(ce) or any(edge.student == node for edge in self.graph.edges)
        colour = _MIXTURE if mixture else _LEARNER if learns else _GIVEN
        box = FancyBboxPatch(
            (x - _WIDTH / 2, y - _HEIGHT / 2), _WIDTH, _HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", zorder=2,
            facecolor=_NETWORK if node < self.sub_networks else colour, edgecolor=_INK, linewidth=0.9,
            linestyle="--" if mixture else "-",
        )  # fmt: skip
        self.axes.add_patch(box)
        lift = 0.08 if ce else 0.0
        self.axes.text(x, y + lift, self.graph.names[node], ha="center", va="center", color=_INK, zorder=3)
        if ce:
            label = "CE" if ce == 1.0 else f"{ce:.3g} CE"
            self.axes.text(x, y - 0.13, label, ha="center", va="center", size=7.5, color=_INK, zorder=3)
        return box

    def _line(self, start: int, end: int, bend: float, **style: Any) -> None:
        from matplotlib.patches import FancyArrowPatch

        line = FancyArrowPatch(
            self.places[start], self.places[end], patchA=self.boxes[start], patchB=self.boxes[end], shrinkA=0,
            shrinkB=1, connectionstyle=f"arc3,rad={bend}", mutation_scale=11, linewidth=1.2,
            zorder=1, **style,
        )  # fmt: skip
        self.axes.add_patch(line)

    def _weight(self, edge: Edge, bend: float) -> None:
        (x0, y0), (x1, y1) = self.places[edge.teacher], self.places[edge.student]
        # Between the rows at the height of its teacher, so that labels of arrows that cross there stay apart.
        along = 0.5 + 0.12 * (edge.teacher % 3) if bend == 0.0 else 0.5
        x, y = x0 + along * (x1 - x0), y0 + along * (y1 - y0) - bend * (x1 - x0) / 2
        self.axes.text(
            x, y, f"{edge.weight:.3g}", ha="center", va="center", size=8, color=_TEACHES, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip

    def _bend(self, edge: Edge) -> float:
        """Return by which share of its length an arrow bends: opposite arrows within a row keep apart."""
        (x0, y0), (x1, y1) = self.places[edge.teacher], self.places[edge.student]
        if y0 != y1:
            return 0.0
        return 0.45 if abs(x1 - x0) < 1.5 * _STEP else 0.3


def _legend(graph: DistillGraph) -> str:
    lines = []
    if any(edge.detach for edge in graph.edges):
        lines.append("arrow: T²·KL, teacher → student, teacher detached")
    if not all(edge.detach for edge in graph.edges):
        lines.append("dashed arrow: T²·KL, the gradient flows into the teacher too")
    if graph.mixtures:
        lines.append("dotted lines: what a mixture consists of")
    return "\n".join(lines)
