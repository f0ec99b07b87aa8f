"""A bank of embeddings, one row an image of the training set, and the negatives that are drawn from it.

Nothing here waits for a device. Draws are hashes in integer arithmetic, so that every device takes the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from ..ops.counters import hash_words, scaled

__all__ = ["EmbeddingBank"]


class EmbeddingBank(nn.Module):
    """The embeddings of all training images by N networks, each moved towards what its image gives in a step.

    `attach` makes room; a checkpoint may be loaded without it, but then there is nothing to draw negatives from. Where
    several processes train, each holds the whole bank and all apply the updates of all, so that every bank has the same
    bits; the process group then needs a backend for CPU tensors too, as "cpu:gloo,cuda:nccl" is. In evaluation mode
    nothing changes and no process waits for another.

    Args:
        networks: N.
        dim: D, length of an embedding.
        momentum: how much of the old embedding a new one keeps, in [0, 1).

    Attributes:
        bank: (n, N, D); the N embeddings of an image lie side by side, so that one gather fetches them all.
        seed: int64, 0-dim, drawn from PyTorch's generator when the module is built.
        draws: int64, 0-dim, how often negatives were drawn in training.
    """

    bank: Tensor
    seed: Tensor
    draws: Tensor
    by_class: Tensor
    spans: Tensor

    def __init__(self, networks: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("bank", torch.empty(0, networks, dim))
        self.register_buffer("seed", torch.randint(1 << 31, ()))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        # These follow from the training set: images in the order of their classes; for each image, where its class
        # begins in that order and how many images it has.
        self.register_buffer("by_class", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("spans", torch.empty(0, 2, dtype=torch.int64), persistent=False)

    def attach(self, targets: Tensor) -> None:
        """Make room for a training set and fill it with random numbers; a bank of its size, loaded before, is kept.

        Args:
            targets: int64 (n,), the class of each image by its index.

        Raises:
            ValueError: targets of another kind, or of fewer than two classes, which leave no negatives.
        """
        if targets.dtype != torch.int64 or targets.dim() != 1:
            raise ValueError(
                f"EmbeddingBank: expected targets int64 (n,), one class an image, got {targets.dtype} "
                f"{tuple(targets.shape)}"
            )
        device, targets = self.bank.device, targets.cpu()
        classes, counts = targets.unique(return_counts=True)
        if len(classes) < 2:
            raise ValueError(
                f"EmbeddingBank: expected images of at least two classes, got {len(classes)}; negatives are of another "
                "class than their image"
            )
        place = torch.searchsorted(classes, targets)
        self.by_class = targets.argsort(stable=True).to(device)
        self.spans = torch.stack([(counts.cumsum(0) - counts)[place], counts[place]], 1).to(device)
        if len(self.bank) != len(targets):
            # A generator of its own: PyTorch's is in another state in each process.
            generator = torch.Generator().manual_seed(int(self.seed))
            uniform = torch.rand(len(targets), *self.bank.shape[1:], generator=generator, dtype=self.bank.dtype)
            # As in the source: uniform with a variance of 1/D, so that the length of a row is about 1.
            self.bank = uniform.mul_(2).sub_(1).mul_((3 / self.bank.shape[2]) ** 0.5).to(device)

    def draw(self, index: Tensor, count: int) -> Tensor:
        """Draw images of other classes: int64 (B, count) for images ``index``, int64 (B,).

        The images of all other classes, in the order of their classes, are cut into ``count`` parts as equal as can be,
        and one is drawn from each: all differ, unless there are fewer than ``count``.

        Raises:
            ValueError: nothing was attached.
        """
        if not len(self.by_class):
            raise ValueError(
                "EmbeddingBank: there are no images to draw from; call attach(targets of the training set) before the "
                "first step"
            )
        start, size = (column[:, None] for column in self.spans[index].unbind(1))
        part = torch.arange(count, device=index.device)
        others = len(self.by_class) - size
        low, high = others * part // count, others * (part + 1) // count
        word = cast(Tensor, hash_words(self.seed, self.draws, index[:, None], part))
        place = low + scaled(word, high - low)
        if self.training:
            self.draws.add_(1)
        return self.by_class[torch.where(place < start, place, place + size)]

    @torch.no_grad()
    def log_mean_exp(self, scores: Tensor) -> Tensor:
        """log of the mean of exp over the first two dimensions of scores (B, K, …), without gradient.

        In training it is the mean over the rows of all processes, which all call it, with any number of rows.
        """
        total = scores.logsumexp((0, 1))
        both = torch.stack([total, torch.full_like(total, scores.shape[0] * scores.shape[1]).log()])
        if self.training and _world_size() > 1:
            parts = [torch.empty_like(both) for _ in range(_world_size())]
            dist.all_gather(parts, both)
            both = torch.stack(parts).logsumexp(0)
        return both[0] - both[1]

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor) -> None:
        """Move the rows of images ``index``, int64 (B,) without repetition, towards ``embeddings`` (B, N, D), in place.

        Of length 1 afterwards. Every process calls it, with the images of its own.
        """
        index, embeddings = _rows_of_all(index, embeddings)
        moved = self.momentum * self.bank[index] + (1 - self.momentum) * embeddings
        self.bank.index_copy_(0, index, F.normalize(moved, dim=-1))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        loaded = state_dict.get(f"{prefix}bank")
        if loaded is not None and not len(self.by_class) and loaded.shape[1:] == self.bank.shape[1:]:
            self.bank = self.bank.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rows_of_all(*tensors: Tensor) -> list[Tensor]:
    """The rows of all processes, in the order of the ranks; each gives as many as it has, of every tensor."""
    if _world_size() == 1:
        return list(tensors)
    # How large a gather is, hosts have to know: they tell each other, and no device is asked.
    counts = torch.zeros(_world_size(), dtype=torch.int64, device="cpu")
    counts[dist.get_rank()] = len(tensors[0])
    dist.all_reduce(counts)
    sizes: list[int] = counts.tolist()
    gathered = []
    for tensor in tensors:
        own = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        own[: len(tensor)] = tensor
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return gathered
