"""What `fflfast doctor` puts into `distill_loss`: random input and every nasty kind its contract names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .accuracy import LossSettings, gradient_scale, gradient_share, plain_distill_loss, value_share
from .functional import distill_loss
from .graph import DistillGraph

__all__ = ["CHECKS", "Draw", "LossCheck", "broken"]

_NAN, _INF = float("nan"), float("inf")
_KD = DistillGraph(2, (0.0, 0.0), (), ((1, 0, 1.0),), ("student", "teacher"))
_TRAINABLE = DistillGraph(
    3,
    (1.0, 0.5, 0.0),
    ((0.25, 0.5, 0.75),),
    ((2, 0, 0.7, False), (3, 1, 1.3, False), (3, 2, 0.2), (0, 1, 2.0, False)),
)


class Draw:
    """Seeded input on one device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self._generator = device, torch.Generator("cpu").manual_seed(seed)

    def logits(self, count: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> list[Tensor]:
        """`count` tensors of normal logits, drawn on the CPU so that every device sees the same."""
        return [(self.normal(*shape) * scale).to(dtype).to(self.device) for _ in range(count)]

    def classes(self, *shape: int, num_classes: int) -> Tensor:
        """Class indices."""
        return torch.randint(num_classes, shape, generator=self._generator, device="cpu").to(self.device)

    def probabilities(self, *shape: int) -> Tensor:
        """Soft targets, a tenth of them exactly zero."""
        p = torch.softmax(2 * self.normal(*shape), -1) * (self.uniform(*shape) > 0.1)
        return (p / p.sum(-1, keepdim=True)).float().to(self.device)

    def mask(self, *shape: int, share: float = 0.3) -> Tensor:
        """True for a share of the elements, never for the first class."""
        mask = self.uniform(*shape) < share
        mask[..., 0] = False
        return mask.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device="cpu")


Input = tuple[list[Tensor], Tensor | None]


class _Result(NamedTuple):
    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]
    again: list[Tensor] | None  # of a second backward with another grad_output


@dataclass(frozen=True)
class LossCheck:
    """One kind of input.

    Attributes:
        name: what the table shows.
        graph: the graph of the loss.
        draw: makes logits and target.
        settings: keyword arguments of the loss.
        frozen: logits tensors that do not require grad.
        quick: whether `--quick` has it.
        compiled: whether it also runs under torch.compile.
        device_only: whether the CPU has nothing of the kind (there the host checks the target).
    """

    name: str
    graph: DistillGraph
    draw: Callable[[Draw], Input]
    settings: LossSettings = LossSettings(temperature=3.0, kl_weight=0.5)  # noqa: RUF009 (immutable)
    frozen: tuple[int, ...] = ()
    quick: bool = True
    compiled: bool = False
    device_only: bool = False

    operator = "distill_loss"

    def prepare(self, device: torch.device) -> Callable[[bool], dict[str, float]]:
        """Draw the input and evaluate the formula in float64 and float32.

        Returns a function that runs the backend of the moment, compiled or not, and maps each quantity to its
        worst error as a share of what is allowed; a broken promise that is no number is infinite.
        """
        logits, target = self.draw(Draw(device, seed=sum(map(ord, self.name))))
        wide = torch.float64 if logits[0].dtype == torch.float64 else torch.float32

        def plain(leaves: Sequence[Tensor], y: Tensor | None) -> tuple[Tensor, Tensor]:
            return plain_distill_loss(leaves, y, self.graph, self.settings)

        def ours(leaves: Sequence[Tensor], y: Tensor | None) -> tuple[Tensor, Tensor]:
            return distill_loss(leaves, y, self.graph, **self.settings._asdict())

        on_cpu = None if target is None else target.cpu()
        exact = self._run(plain, [z.cpu().double() for z in logits], on_cpu, True)
        baseline = self._run(plain, [z.to(wide) for z in logits], target, True)
        scales = gradient_scale([z.cpu() for z in logits], on_cpu, self.graph, self.settings)
        compiled_loss: list[Any] = []

        def measure(compiled: bool) -> dict[str, float]:
            if compiled and not compiled_loss:
                compiled_loss.append(torch.compile(ours, fullgraph=True, dynamic=False))
            # A compiled backward frees its buffers, so that it runs once.
            function, twice = (compiled_loss[0], False) if compiled else (ours, True)
            before = [z.clone() for z in logits]
            got = self._run(function, logits, target, twice)
            shares = {
                "loss": value_share(got.loss, baseline.loss, exact.loss),
                "terms": value_share(got.terms, baseline.terms, exact.terms),
            }
            for i, name in enumerate(self.graph.logit_names):
                if i not in self.frozen:
                    shares[f"gradient of {name}"] = gradient_share(
                        got.gradients[i], baseline.gradients[i], exact.gradients[i], scales[i]
                    )
                    if got.again is not None and baseline.again is not None and exact.again is not None:
                        factor = self._cotangent(exact.loss).abs().unsqueeze(-1)
                        shares[f"second gradient of {name}"] = gradient_share(
                            got.again[i], baseline.again[i], exact.again[i], scales[i] * factor
                        )
            again = self._run(function, logits, target, False)
            shares["same bits when repeated"] = broken(
                [(got.loss, again.loss), (got.terms, again.terms), *zip(got.gradients, again.gradients, strict=True)]
            )
            shares["input left alone"] = broken(zip(logits, before, strict=True))
            if got.loss.dtype != wide or any(g.dtype != z.dtype for g, z in zip(got.gradients, logits, strict=True)):
                shares["dtypes"] = _INF
            return shares

        return measure

    def _run(self, function: Callable[..., Any], logits: list[Tensor], target: Tensor | None, twice: bool) -> _Result:
        leaves = [z.detach().requires_grad_(i not in self.frozen) for i, z in enumerate(logits)]
        trained = [z for z in leaves if z.requires_grad]
        loss, terms = function(leaves, target)
        # The gradient that a sum sends back is one number expanded over the rows.
        gradients = torch.autograd.grad(loss.sum(), trained, retain_graph=twice)
        again = self._at(leaves, torch.autograd.grad(loss, trained, self._cotangent(loss))) if twice else None
        return _Result(loss.detach(), terms, self._at(leaves, gradients), again)

    @staticmethod
    def _at(leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """One gradient a logits tensor, an empty one where none is wanted."""
        found = iter(gradients)
        return [next(found) if z.requires_grad else z.new_empty(0) for z in leaves]

    @staticmethod
    def _cotangent(loss: Tensor) -> Tensor:
        steps = torch.arange(max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)
        return (3 - 0.25 * (steps % 16)).reshape(loss.shape)


def broken(pairs: Any) -> float:
    """0 where each pair holds the same bits, else infinite."""
    return 0.0 if all(torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)) for a, b in pairs) else _INF


def _random(graph: DistillGraph, rows: int, num_classes: int, **options: Any) -> Callable[[Draw], Input]:
    def draw(d: Draw) -> Input:
        y = d.classes(rows, num_classes=num_classes) if graph.needs_target else None
        return d.logits(graph.num_logits, rows, num_classes, **options), y

    return draw


def _edited(graph: DistillGraph, edit: Callable[[Draw, list[Tensor], Tensor], None]) -> Callable[[Draw], Input]:
    """Random logits (12, 131), then `edit` in place."""

    def draw(d: Draw) -> Input:
        z, y = d.logits(graph.num_logits, 12, 131), d.classes(12, num_classes=131)
        edit(d, z, y)
        return z, y if graph.needs_target else None

    return draw


def _mask_classes(d: Draw, z: list[Tensor], y: Tensor) -> None:
    mask = d.mask(12, 131)
    mask.scatter_(1, y[:, None], False)
    for t in z:
        t.masked_fill_(mask, -_INF)


def _mask_students(d: Draw, z: list[Tensor], y: Tensor) -> None:
    z[0].masked_fill_(d.mask(12, 131), -_INF)


def _ignore_some(d: Draw, z: list[Tensor], y: Tensor) -> None:
    y[::3] = -100
    z[0][0], z[1][3], z[2][6, 5] = _NAN, _INF, -_INF


def _ignore_all(d: Draw, z: list[Tensor], y: Tensor) -> None:
    y.fill_(-100)
    for t in z:
        t.fill_(_NAN)


def _shift(d: Draw, z: list[Tensor], y: Tensor) -> None:
    for t in z:
        t += (d.normal(12, 1) * 1e4).to(t.dtype).to(t.device)


def _empty_row(d: Draw, z: list[Tensor], y: Tensor) -> None:
    z[0][2], z[1][5, 7] = -_INF, _NAN


def _bad_target(d: Draw, z: list[Tensor], y: Tensor) -> None:
    y[1], y[4], y[6] = 131, -7, 2**40


def _first_tile(d: Draw) -> Input:
    """The first 20,000 classes masked: no block of any kernel may start from a maximum of −inf."""
    z, y = d.logits(3, 3, 20_480), d.classes(3, num_classes=480) + 20_000
    for t in z:
        t[:, :20_000] = -_INF
    return z, y


def _strided(d: Draw) -> Input:
    """A slice of wider rows, a class stride of two, one row expanded, a transpose."""
    wide, twice, row, turned = (d.logits(1, *shape)[0] for shape in ((7, 150), (7, 202), (1, 101), (101, 7)))
    return [wide[:, 11:112], twice[:, ::2], row.expand(7, 101), turned.t()], d.classes(7, num_classes=101)


def _leading(d: Draw) -> Input:
    """(B, L, C), the next token as target: a slice that no reshape can flatten without a copy."""
    return [t[:, :-1] for t in d.logits(2, 3, 6, 57)], d.classes(3, 6, num_classes=57)[:, 1:]


def _soft(d: Draw) -> Input:
    return d.logits(3, 9, 131), d.probabilities(9, 131)


def _soft_strided(d: Draw) -> Input:
    return d.logits(3, 9, 131), d.probabilities(9, 150)[:, 7:138]


_FFL = DistillGraph.ffl(2)
_T3 = LossSettings(temperature=3.0, kl_weight=0.5)

CHECKS: tuple[LossCheck, ...] = (
    LossCheck("random, float32", _FFL, _random(_FFL, 33, 100), compiled=True),
    LossCheck("random, float64", _FFL, _random(_FFL, 9, 100, dtype=torch.float64)),
    LossCheck("random, bfloat16", _FFL, _random(_FFL, 9, 1000, dtype=torch.bfloat16), compiled=True),
    LossCheck("random, float16", _FFL, _random(_FFL, 9, 1000, dtype=torch.float16)),
    LossCheck("one class", _FFL, _random(_FFL, 5, 1)),
    LossCheck("one row of 7 classes", _FFL, _random(_FFL, 1, 7)),
    LossCheck("1000 rows of 10 classes", _FFL, _random(_FFL, 1000, 10)),
    LossCheck("32,001 classes, bfloat16", _FFL, _random(_FFL, 3, 32_001, dtype=torch.bfloat16), quick=False),
    LossCheck("131,072 classes", _FFL, _random(_FFL, 2, 131_072), quick=False),
    LossCheck("300,001 classes", _KD, _random(_KD, 2, 300_001), frozen=(1,), quick=False),
    LossCheck("one network", DistillGraph.single(), _random(DistillGraph.single(), 9, 65)),
    LossCheck("5 networks, all to all", DistillGraph.dml(5), _random(DistillGraph.dml(5), 9, 65)),
    LossCheck("17 logits tensors", DistillGraph.ffl(16), _random(DistillGraph.ffl(16), 5, 33), quick=False),
    LossCheck("temperature 0.5", _FFL, _random(_FFL, 9, 131), LossSettings(0.5)),
    LossCheck("temperature 2.7", _FFL, _random(_FFL, 9, 131), LossSettings(2.7)),
    LossCheck("logits of size 30", _FFL, _random(_FFL, 9, 131, scale=30.0)),
    LossCheck("rows shifted by 10,000", _FFL, _edited(_FFL, _shift)),
    LossCheck("masked classes (−inf)", _FFL, _edited(_FFL, _mask_classes), compiled=True),
    LossCheck("first tile masked", _FFL, _first_tile),
    LossCheck("mask in the student alone", _KD, _edited(_KD, _mask_students), frozen=(1,)),
    LossCheck("weight 0 on infinite terms", _FFL, _edited(_FFL, _mask_students), _T3._replace(kl_weight=0.0)),
    LossCheck("ignored rows hold NaN", _FFL, _edited(_FFL, _ignore_some), compiled=True),
    LossCheck("all rows ignored", _FFL, _edited(_FFL, _ignore_all)),
    LossCheck("a row of −inf, one with NaN", _FFL, _edited(_FFL, _empty_row), _T3._replace(reduction="none")),
    LossCheck("class index out of range", _FFL, _edited(_FFL, _bad_target), device_only=True),
    LossCheck("strides", DistillGraph.dml(4), _strided),
    LossCheck("strided soft targets, per row", _FFL, _soft_strided, _T3._replace(reduction="none")),
    LossCheck("(B, L, C), next token", DistillGraph.kd(), _leading, LossSettings(2.0), frozen=(1,)),
    LossCheck("trainable teachers", _TRAINABLE, _random(_TRAINABLE, 9, 131), compiled=True),
    LossCheck("trainable teachers, masked", _TRAINABLE, _edited(_TRAINABLE, _mask_classes)),
    LossCheck("soft targets", _FFL, _soft, compiled=True),
    LossCheck("soft targets, smoothed", _FFL, _soft, _T3._replace(label_smoothing=0.1)),
    LossCheck("label smoothing", _FFL, _random(_FFL, 9, 131), _T3._replace(label_smoothing=0.1)),
    LossCheck("ε in the teacher", _FFL, _random(_FFL, 9, 131), _T3._replace(target_eps=1e-3)),
    LossCheck("ε, trainable teachers", _TRAINABLE, _random(_TRAINABLE, 9, 131), _T3._replace(target_eps=1e-3)),
    LossCheck("reduction sum", _FFL, _random(_FFL, 9, 131), _T3._replace(reduction="sum")),
    LossCheck("reduction none", _FFL, _random(_FFL, 9, 131), _T3._replace(reduction="none"), compiled=True),
)
