"""What a person sees of a run: a live view on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..tasks import Score

__all__ = ["Reporter", "details_table", "score_table"]

_PLAIN_SECONDS = 30.0


class Reporter:
    """Shows one run after another; ``quiet`` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._losses = Text()
        self._scores = Text()
        self._last_plain = 0.0
        self._speed = ""

    def line(self, text: str, style: str = "") -> None:
        """Print one line, never wrapped."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    @contextmanager
    def run(self, title: str, epochs: int, steps_per_epoch: int) -> Iterator[None]:
        """Show the progress of one run while entered."""
        self._steps, self._epochs = steps_per_epoch, epochs
        self._losses, self._scores = Text("loss …", style="dim"), Text("")
        self._last_plain = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("[cyan]{task.fields[speed]}"),
            expand=True,
            console=self.console,
        )
        self._bar = self._progress.add_task(title, total=epochs * steps_per_epoch, state="", speed="")
        if not self.live:
            yield
            return
        with Live(get_renderable=self._view, console=self.console, refresh_per_second=5):
            yield

    def _view(self) -> Group:
        return Group(self._progress, self._losses, self._scores)

    def step(self, epoch: int, step: int) -> None:
        """Move on to ``step`` steps done of ``epoch``."""
        self._progress.update(
            self._bar, completed=epoch * self._steps + step, state=f"epoch {epoch + 1}/{self._epochs}"
        )

    def testing(self, epoch: int) -> None:
        """Say that the test images of ``epoch`` are being classified."""
        self._progress.update(self._bar, state=f"epoch {epoch + 1}/{self._epochs} test")

    def interval(self, epoch: int, step: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """Show the mean losses of the last steps; ``losses`` begins with the total."""
        self._speed = speed = f"{images_per_second:,.0f} images/s"
        self._progress.update(self._bar, speed=speed)
        (_, total), *terms = losses.items()
        self._losses = Text.assemble(("loss ", "bold"), (f"{total:.4f}", "bold"))
        for name, value in terms:
            self._losses.append_text(Text.assemble(("  " + name + " ", "dim"), f"{value:.4f}"))
        now = time.monotonic()
        if not self.live and step < self._steps and now - self._last_plain >= _PLAIN_SECONDS:
            self._last_plain = now
            self.line(f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}  loss {total:.4f}  {speed}")

    def epoch(self, epoch: int, loss: float, scores: Mapping[str, Score], metric: str) -> None:
        """Show the test result of an epoch."""
        self._scores = Text.assemble((f"test {metric} % ", "bold"))
        for name, score in scores.items():
            self._scores.append_text(Text.assemble(("  " + name + " ", "dim"), (str(score), "green")))
        if not self.live:
            self._last_plain = time.monotonic()
            results = "  ".join(f"{name} {score}" for name, score in scores.items())
            self.line(
                f"epoch {epoch + 1:>{len(str(self._epochs))}}/{self._epochs}  loss {loss:.4f}  "
                f"test {metric} %  {results}  {self._speed}"
            )


def score_table(title: str, metric: str, *sections: Sequence[tuple[str, str, Score]], exact: bool = False) -> Table:
    """Return a table of (output, what it is, score) rows, a line between sections; ``exact`` shows every digit."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("output")
    if described := any(what for section in sections for _, what, _ in section):
        table.add_column("")
    table.add_column(f"{metric} %", justify="left" if exact else "right", style="bold")
    table.add_column("right / all", justify="right", style="dim")
    for section in sections:
        for name, what, score in section:
            shown = repr(100 * score.value) if exact else str(score)
            table.add_row(name, *([what] if described else []), shown, f"{score.correct} / {score.total}")
        table.add_section()
    return table


def details_table(title: str, details: Mapping[str, Mapping[str, Score]], whole: Mapping[str, Score]) -> Table:
    """Return a table of the scores of parts (rows: joints, and the whole below them) by output (columns)."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for output in details:
        table.add_column(output, justify="right")
    for part in dict.fromkeys(name for scores in details.values() for name in scores):
        table.add_row(part, *(str(scores[part]) for scores in details.values()))
    table.add_section()
    table.add_row("all", *(str(whole[output]) for output in details), style="bold")
    return table
