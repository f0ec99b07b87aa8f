"""The picture of `benchmarks.train.timeline`: a panel a plan, a row a stream, a bar a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .trace import OTHER, REST, UNKNOWN, Kernel, lanes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MOST_ROWS", "Panel", "draw", "rows_of"]

MOST_ROWS = 8
"""Streams that get a row each; of more, the kernels are packed."""
_BAR = 0.86  # of a row's height
_GREY = {REST: "0.7", OTHER: "0.7", UNKNOWN: "0.88"}


@dataclass(frozen=True)
class Panel:
    """One plan's step.

    Attributes:
        plan: its name.
        kernels: what ran.
        labels: of each kernel, what its colour says.
        coloured_by: what the labels are.
        title: the line above.
    """

    plan: str
    kernels: Sequence[Kernel]
    labels: Sequence[str]
    coloured_by: str
    title: str = ""


def rows_of(kernels: Sequence[Kernel]) -> dict[str, list[int]]:
    """Return the rows from the top, by name, with the places of their kernels; at least one row.

    A row is a stream, in the order of their first kernels; of more than `MOST_ROWS` streams it is the lowest lane in
    which a kernel overlaps none before it.
    """
    rows: dict[str, list[int]] = {}
    for place in sorted(range(len(kernels)), key=lambda place: kernels[place].interval):
        rows.setdefault(f"stream {kernels[place].stream}", []).append(place)
    if len(rows) > MOST_ROWS:
        at = lanes(kernels)
        rows = {f"{lane + 1} at once": [] for lane in range(max(at) + 1)}
        for place, lane in enumerate(at):
            rows[f"{lane + 1} at once"].append(place)
    return rows or {"no kernel": []}


def draw(file: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the picture; every panel begins at 0 and has the same scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [rows_of(panel.kernels) for panel in panels]
    colours = {kind: _colours(panels, kind) for kind in {panel.coloured_by for panel in panels}}
    heights = [1.2 + 0.45 * len(names) for names in rows]
    figure = Figure(figsize=(15, 0.8 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
    for axes, panel, names in zip(grid[:, 0], panels, rows, strict=True):
        for row, places in enumerate(names.values()):
            _bars(axes, row, panel, places, colours[panel.coloured_by])
        axes.set_yticks(range(len(names)), list(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(panel.title or panel.plan, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        shown = {label: colour for label, colour in colours[panel.coloured_by].items() if label in panel.labels}
        if shown:
            handles = [Patch(color=colour, label=label) for label, colour in shown.items()]
            axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), title=panel.coloured_by)
    grid[-1, 0].set_xlabel("ms")
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)


def _colours(panels: Sequence[Panel], coloured_by: str) -> dict[str, str]:
    """By label; what nobody knows more of is grey."""
    labels = {label for panel in panels if panel.coloured_by == coloured_by for label in panel.labels}
    known = {label: f"C{k % 10}" for k, label in enumerate(sorted(labels - {*_GREY}))}
    return known | {label: grey for label, grey in _GREY.items() if label in labels}


def _bars(axes: Axes, row: int, panel: Panel, places: Sequence[int], colours: dict[str, str]) -> None:
    """Draw a row, its bars lower where several of them run at once."""
    begin = min(kernel.start for kernel in panel.kernels) if places else 0
    at = lanes([panel.kernels[place] for place in places])
    height = _BAR / (max(at, default=0) + 1)
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for place, lane in zip(places, at, strict=True):
        start, end = panel.kernels[place].interval
        groups.setdefault((panel.labels[place], lane), []).append(((start - begin) / 1e6, (end - start) / 1e6))
    for (label, lane), bars in groups.items():
        axes.broken_barh(bars, (row - _BAR / 2 + lane * height, height), facecolors=colours[label], linewidth=0)
