"""MCL-OKD: the ensemble teaches the last network, and contrast across networks brings the embeddings of an image close.

L = Σ_m CE(z_m) + λ · KL_T(mean z → z_N) + β · Σ_{a≠b} NCE(a, b), T = 3, λ = 1, β = 0.025, no ramp-up, the teacher
detached. v_m = normalised linear map (C_m → 128) of network m's pooled feature map. With u_a^j the embedding of image j
by network a in a bank, h_b(i, j) = e_ij / (e_ij + K·ē), e_ij = exp(u_a^j · v_b^i / τ), and ē the mean of all e of the
batch, detached:

    NCE(a, b) = −1/B Σ_i [log h_b(i, i) + Σ_{j of K images of other classes} log(1 − h_b(i, j))], τ = 0.1, K = 256

u_m^i ← normalise(½ u_m^i + ½ v_m^i) for the images of the batch, after the loss. Yang, An, Xu, arXiv 2006.04093, and
github.com/winycg/MCL-OKD, where the recipe comes from: SGD 0.05 to 0 by a cosine, weight decay 5e-4, batch 64, 300
epochs; K = 16,384 for VGG-16, τ = 0.07 on ImageNet. Stem and first stage are shared.

The form "batch" takes its negatives from the batch and has no bank: it replaces NCE(a, b) by the mean over the images i
of −log [e_ii / (e_ii + Σ_{j of another class} e_ij)], e_ij = exp(v_a^j · v_b^i / τ), with gradient into both networks.
That is the interactive contrast of the authors' later MCL (arXiv 2104.12565), whose positives, however, are other
images of the same class, two of which its sampler puts into each batch. Under several processes a batch is what one of
them has of it.

Departures: the source adds 1e-7 where it normalises h, and draws the negatives of a row at random without repetition;
here one is drawn from each of K equal parts of the class-sorted training set (see `EmbeddingBank.draw`). The source
knows one process; here ē is the mean over all of them.

Memory traffic of the bank: with R = 4·B·(K+1)·N·128 bytes (B = 64, K = 256, N = 4: 34 MB), a step reads R from the bank
and writes it side by side, and the products read that once in the forward and once in the backward, 4R in all; the
update reads and writes 4·B·N·128 bytes. The source gathers for each of the N(N−1) ordered pairs, N−1 times as much. The
bank itself, in memory and in every checkpoint, has 4·n·N·128 bytes (50,000 images, N = 4: 102 MB), which a step reads
and writes about nine times more under ``--nan skip``: what a step changes is then copied and put back as a whole.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cohort import Batch, Cohort, CohortOutput, StepState
from ..graph import DistillGraph
from .base import CIFAR_RECIPE, Method, MethodOptions, known_channels, pooled_features, row_mean
from .memory import EmbeddingBank

__all__ = ["MCL", "MCLOptions"]


@dataclass(frozen=True)
class MCLOptions(MethodOptions):
    """Options of MCL-OKD; the defaults are the source's for ResNets on CIFAR-100.

    Attributes:
        form: "bank", or "batch" for negatives from the batch alone.
        contrast_weight: β.
        contrast_temperature: τ.
        embedding_size: length of an embedding.
        negatives: K, drawn for each image from the bank.
        momentum: how much of an old embedding stays in the bank, in [0, 1).
    """

    ramp_up_epochs: float = 0.0
    form: str = "bank"
    contrast_weight: float = 0.025
    contrast_temperature: float = 0.1
    embedding_size: int = 128
    negatives: int = 256
    momentum: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("bank", "batch"):
            raise ValueError(f'MCLOptions: form must be "bank" or "batch", got {self.form!r}')
        for name in ("embedding_size", "negatives"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"MCLOptions: {name} must be an int of at least 1, got {value!r}")
        if self.contrast_temperature <= 0:
            raise ValueError(
                f"MCLOptions: contrast_temperature must be greater than 0, got {self.contrast_temperature}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"MCLOptions: momentum must be in [0, 1), got {self.momentum}")
        if self.contrast_weight < 0:
            raise ValueError(f"MCLOptions: contrast_weight must not be negative, got {self.contrast_weight}")


class MCL(Method):
    """Multi-view Contrastive Learning (arXiv 2006.04093), judged by its last network; architectures may differ.

    The form "bank" needs `attach` before the first step and the index of each image in ``batch.index``.

    Raises:
        ValueError: fewer than two sub-networks, or one without a spatial feature map; in a step, targets that are
            probabilities, a batch without indices, or a bank without images.
    """

    Options = MCLOptions
    recipe = MappingProxyType(
        {**CIFAR_RECIPE, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine"}
    )
    shared_stages = 1
    replicated = ("memory.bank", "memory.seed", "memory.draws", "memory.by_class", "memory.spans")
    extra_term_names = ("contrast",)
    options: MCLOptions

    def __init__(self, cohort: Cohort, num_classes: int, options: MCLOptions | None = None) -> None:
        super().__init__(cohort, num_classes, options)
        channels, size = known_channels(cohort, "MCL"), self.options.embedding_size
        self.graph = DistillGraph.mcl_okd(len(channels))
        self.main_output = f"sub{len(channels) - 1}"
        self.embeddings = nn.ModuleList(nn.Linear(c, size) for c in channels)
        self.memory = EmbeddingBank(len(channels), size, self.options.momentum) if self.options.form == "bank" else None

    @classmethod
    def refusal(cls, settings: Mapping[str, Any]) -> str | None:
        if settings.get("mixup") or settings.get("cutmix"):
            return "contrast needs images of one class each, and mixed images have two; take --mixup 0 --cutmix 0"
        return None

    def attach(self, targets: Tensor) -> None:
        if self.memory is None:
            return
        self.memory.attach(targets)
        others = len(targets) - int(targets.unique(return_counts=True)[1].max())
        if self.options.negatives > others:
            warnings.warn(
                f"MCL: {self.options.negatives} negatives for each image, but some have only {others} images of other "
                "classes, which are then drawn several times; set the option negatives lower",
                stacklevel=2,
            )

    def extra_terms(
        self, output: CohortOutput, batch: Batch, state: StepState | None
    ) -> list[tuple[Tensor | float, Tensor]]:
        if batch.target.is_floating_point():
            raise ValueError("MCL: expected targets int64 (B,), got probabilities; contrast needs one class an image")
        pooled = pooled_features(output, "MCL")
        with torch.autocast(pooled[0].device.type, enabled=False):
            embedded = torch.stack([self._embed(k, x) for k, x in enumerate(pooled)], 1)
            if self.memory is None:
                rows = self._within_batch(embedded, batch.target)
            else:
                index = self._index(batch)
                rows = self._against_bank(self.memory, embedded, index)
                if self.training:
                    self.memory.update(index, embedded)
            across = 1 - torch.eye(embedded.shape[1], dtype=rows.dtype, device=rows.device)
            contrast = row_mean((rows * across).sum((1, 2)))
        return [(self.options.contrast_weight, contrast)]

    def _embed(self, k: int, pooled: Tensor) -> Tensor:
        layer = cast(nn.Linear, self.embeddings[k])
        return F.normalize(layer(pooled.to(layer.weight.dtype)), dim=1)

    def _index(self, batch: Batch) -> Tensor:
        index = getattr(batch, "index", None)
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != batch.target.shape:
            raise ValueError(
                "MCL: the bank needs batch.index, int64 (B,), the place of each image in the training set, got "
                f"{f'{index.dtype} {tuple(index.shape)}' if isinstance(index, Tensor) else 'none'}; or take the form "
                '"batch"'
            )
        return index

    def _against_bank(self, memory: EmbeddingBank, embedded: Tensor, index: Tensor) -> Tensor:
        """For each image, −Σ log h of its own row − Σ log(1 − h) of K others: (B, N, N), [i, a, b]."""
        count, (rows, networks, _) = self.options.negatives, embedded.shape
        chosen = memory.bank[torch.cat([index[:, None], memory.draw(index, count)], 1)]  # (B, K+1, N, D)
        scores = chosen.flatten(1, 2) @ embedded.transpose(1, 2) / self.options.contrast_temperature
        scores = scores.view(rows, 1 + count, networks, networks)  # log e, [i, j, a, b]
        odds = scores - memory.log_mean_exp(scores) - math.log(count)  # log h − log(1 − h)
        return F.softplus(odds).sum(1) - odds[:, 0]

    def _within_batch(self, embedded: Tensor, target: Tensor) -> Tensor:
        """For each image, −log of its share among those of other classes: (B, N, N), [i, b, a]."""
        rows, networks, _ = embedded.shape
        products = embedded.flatten(0, 1) @ embedded.transpose(0, 1).flatten(0, 1).T
        scores = products.view(rows, networks, networks, rows) / self.options.contrast_temperature  # [i, b, a, j]
        own = torch.eye(rows, dtype=torch.bool, device=target.device)
        counted = own | (target[:, None] != target)
        shares = scores.masked_fill(~counted[:, None, None], -math.inf).logsumexp(3)
        return shares - scores.diagonal(dim1=0, dim2=3).movedim(2, 0)
