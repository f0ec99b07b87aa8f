"""Which images each batch of an epoch has, and which of them are a process's own."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .batch import Split
from .order import check_counter, permutation

__all__ = ["Sampler", "share"]

_SUBSET_SEED = 0


def share(n: int, rank: int, world: int) -> tuple[int, int]:
    """Return (start, stop): the rows of a batch of ``n`` images that process ``rank`` of ``world`` trains on.

    Contiguous, in the order of the ranks, of sizes that differ by at most one. No process trains on a single image,
    with which batch normalisation could not: where there are fewer than two images for each, the last processes have
    none.

    Raises:
        TypeError, ValueError: no ints, n < 0, world < 1, or no 0 ≤ rank < world.
    """
    check_counter("n", n)
    check_counter("world", world, 1)
    check_counter("rank", rank)
    if rank >= world:
        raise ValueError(f"rank: expected 0 … {world - 1} of {world} processes, got {rank}")
    active = max(1, min(world, n // 2))
    each, more = divmod(n, active)
    start, stop = (min(r * each + min(r, more), n) for r in (rank, rank + 1))
    return start, stop


class Sampler:
    """The order of a split's images, its batches, and one process's part of them; what the loaders have in common.

    Training shuffles every epoch, cuts batches of ``batch_size`` and gives each process its `share` of each. Evaluation
    keeps the file order and gives process r the whole batches r, r + world, …, so that each is computed as it would be
    by one process; where the last round has no batch for a process, it gets an empty one. Either way the batches of all
    processes together do not depend on their number.

    Args:
        split: its name and its number of images count.
        batch_size: images a batch, over all processes.
        seed: ≥ 0; not used for evaluation.
        train: whether to shuffle.
        drop_last: leave out a last batch that is smaller than the others.
        limit: use only this many images, drawn once over the whole split, the same for every seed; None for all.
        rank, world: which of how many processes this is.
        lead: put one row before each share of a training batch: the image before it in the whole batch (before the
            first comes the last), for methods that mix neighbours. None is put before an empty share, nor where there
            is but one process.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        drop_last: bool,
        limit: int | None,
        rank: int,
        world: int,
        lead: bool,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("limit", len(split) if limit is None else limit, 1),
        ):
            check_counter(name, value, least)
        share(0, rank, world)
        if lead and not train:
            raise ValueError("lead: expected False for evaluation, which mixes no images")
        self.split, self.batch_size, self.seed, self.train = split, batch_size, seed, train
        self.rank, self.world, self.lead, self.drop_last = rank, world, lead and world > 1, drop_last
        self.places = torch.arange(len(split), device="cpu")
        if limit is not None and limit < len(split):
            self.places = permutation(len(split), seed=_SUBSET_SEED, epoch=0)[:limit].sort().values
        full, rest = divmod(len(self.places), batch_size)
        self._num_batches = full + (rest > 0 and not drop_last)
        self._num_used = min(self._num_batches * batch_size, len(self.places))
        if self._num_batches == 0:
            raise ValueError(
                f"{split.name}: drop_last with batch_size {batch_size} leaves no batch of {self.num_images} "
                "images; choose a smaller batch_size"
            )

    @property
    def num_images(self) -> int:
        """Number of images an epoch draws from."""
        return len(self.places)

    def __len__(self) -> int:
        """Return the number of steps an epoch, the same for every process."""
        return self._num_batches if self.train else -(-self._num_batches // self.world)

    def images(self, step: int) -> int:
        """Return how many images all processes together have at a step, 0 ≤ step < len."""
        if not 0 <= step < len(self):
            raise ValueError(f"step: expected 0 … {len(self) - 1} of {self.split.name}, got {step}")
        rows = self.batch_size * (1 if self.train else self.world)
        return min(rows, self._num_used - step * rows)

    def rows(self, epoch: int, start_step: int = 0) -> tuple[Tensor, list[tuple[int, int]]]:
        """Return this process's part of an epoch: one tensor, and where the slice of each step lies in it.

        Args:
            epoch: ≥ 0; decides the order when training.
            start_step: 0 … len; the first step asked for.

        Returns:
            int64 (m,), positions in ``places``, and (start, stop) of each step from ``start_step`` on.

        Raises:
            ValueError: start_step beyond the epoch.
        """
        check_counter("epoch", epoch)
        check_counter("start_step", start_step)
        if start_step > len(self):
            raise ValueError(
                f"start_step: expected 0 … {len(self)} batches of {self.split.name}, got {start_step}; "
                "was the run started with another batch_size or limit?"
            )
        if self.train:
            order = permutation(self.num_images, seed=self.seed, epoch=epoch)
        else:
            order = torch.arange(self.num_images, device="cpu")
        spans = [self._span(step) for step in range(start_step, len(self))]
        if not self.lead:
            return order, spans
        # With a row before each share the slices of an epoch overlap, or begin at the batch's end: laid out anew.
        parts, ends = [order[:0]], [0]
        for step, (start, stop) in enumerate(spans, start_step):
            if start < stop:
                first = step * self.batch_size
                before = first + (start - first - 1) % self.images(step)
                parts += [order[before : before + 1], order[start:stop]]
            ends.append(ends[-1] + stop - start + (start < stop))
        return torch.cat(parts), list(itertools.pairwise(ends))

    def _span(self, step: int) -> tuple[int, int]:
        """Return where this process's images of a step stand in the epoch's order."""
        if self.train:
            first = step * self.batch_size
            start, stop = share(self.images(step), self.rank, self.world)
            return first + start, first + stop
        batch = step * self.world + self.rank
        start, stop = (min(b * self.batch_size, self._num_used) for b in (batch, batch + 1))
        return start, stop
