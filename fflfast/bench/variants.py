"""Which loops a benchmark of training holds side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["NAMES", "Variant", "choose"]

NAMES = ("naive", "serial", "streams", "graph", "floor")


@dataclass(frozen=True)
class Variant:
    """One loop.

    Attributes:
        loop: "naive" (the published code's, see `fflfast.bench.naive`), "ours" (what `fflfast train` does) or "floor"
            (the same with `fflfast.bench.floor.Floor`: the networks alone).
        plan: how its steps run; naive has none.
        compile: whether each sub-network is compiled.
    """

    loop: str
    plan: str = ""
    compile: bool = False

    @property
    def name(self) -> str:
        """As tables and files name it."""
        plan = f"floor {self.plan}" if self.loop == "floor" else self.plan or self.loop
        return f"{plan} compiled" if self.compile else plan

    @property
    def floor(self) -> Variant | None:
        """The floor under it: the same plan and compile setting."""
        return Variant("floor", self.plan, self.compile) if self.loop == "ours" else None


def choose(
    names: Sequence[str] | None, left_out: Mapping[str, str], *, compile: bool, alone: bool
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants to measure, and why others are not, by name.

    Args:
        names: of `NAMES`, what was asked for; None for all that make sense here.
        left_out: plans that make no sense or cannot run here, with the reason.
        compile: measure every plan with compiled sub-networks too.
        alone: one network without a method, which is its own floor.
    """
    wanted = NAMES if names is None else names
    refused = {plan: left_out[plan] for plan in wanted if plan in left_out}
    plans = [name for name in wanted if name not in ("naive", "floor", *left_out)]
    chosen = [Variant("naive")] if "naive" in wanted else []
    ours = [Variant("ours", plan, compiled) for plan in plans for compiled in ((False, True) if compile else (False,))]
    chosen += ours
    if "floor" in wanted and alone:
        refused["floor"] = "one network with cross-entropy is its own floor"
    elif "floor" in wanted:
        chosen += [v.floor for v in ours if v.floor] or [Variant("floor", "serial")]
    return chosen, refused
