"""PCK: the share of joints that are found near enough to where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data import Keypoints
from ..heatmaps import decode_heatmaps
from .base import Score, Summing
from .counting import Counting

__all__ = ["PCK", "torso_lengths"]


class PCK(Counting):
    """Percentage of correct keypoints: counts the joints whose error is at most ``tolerance`` times the torso's length.

    PCK@0.2 as in Y. Yang, D. Ramanan: Articulated Human Detection with Flexible Mixtures of Parts, TPAMI 2013, with the
    torso's length in place of the box of the person, as usual on Leeds Sports Pose. The torso is the distance from the
    left shoulder to the right hip, from the right shoulder to the left hip where one of those is not visible, and a
    person who shows neither counts for nothing. Only visible joints count; see `fflfast.data.Keypoints`.

    Args:
        keypoints: what the J joints are.
        image_size: S of the network's input, in whose pixels targets are.
        names, device: see `Counting`.
        tolerance: in units of the torso's length.
    """

    def __init__(
        self,
        keypoints: Keypoints,
        image_size: int,
        names: Sequence[str] = (),
        device: torch.device | str | None = None,
        *,
        tolerance: float = 0.2,
    ) -> None:
        self.keypoints, self.image_size, self.tolerance = keypoints, image_size, tolerance
        super().__init__(names, device, (len(keypoints.names) + 1,))  # the last part: persons, seen or not

    @torch.no_grad()
    def update(self, heatmaps: Mapping[str, Tensor], target: Tensor, bad: Tensor | None = None) -> None:
        """Count one batch: heatmaps (B, J, h, w) by name, target (B, J, 3). A map with a NaN is never right.

        Where ``bad``, a 0-dim bool, nothing is counted.
        """
        self.names = self.names or tuple(heatmaps)
        torso = torso_lengths(target, self.keypoints.torso)
        counted = (target[..., 2] > 0) & (torso > 0)[:, None]
        persons = torch.full((1,), target.shape[0], device=target.device)
        right = []
        for name in self.names:
            places, score = decode_heatmaps(heatmaps[name], self.image_size)
            near = (places - target[..., :2]).norm(dim=-1) <= self.tolerance * torso[:, None]
            right.append((counted & near & ~score.isnan()).sum(dim=0))
        correct = torch.stack(right)
        none = correct.new_zeros((len(right), 1))
        self._add(torch.cat([correct, none], dim=1), torch.cat([counted.sum(dim=0), persons]), bad)

    def read(self, processes: Summing | None = None) -> dict[str, Score]:
        """Return the score of every output over all joints that count, empty if there was no person; waits.

        Args:
            processes: over whose images the scores are; each of them calls this, and all get the same.
        """
        joints = self.details(processes)
        return {
            name: Score(*(sum(score[k] for score in scores.values()) for k in (0, 1)))
            for name, scores in joints.items()
        }

    def details(self, processes: Summing | None = None) -> dict[str, dict[str, Score]]:
        """Return by output the score of each joint; otherwise as `read`."""
        *correct, total = self._read(processes) or [[0]]
        if not total[-1]:
            return {}
        return {
            name: {joint: Score(*pair) for joint, *pair in zip(self.keypoints.names, row, total, strict=False)}
            for name, row in zip(self.names, correct, strict=True)
        }


def torso_lengths(target: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return how long each person is from one joint of a pair to the other, (B,): of the first pair that is visible.

    Args:
        target: (B, J, 3), see `fflfast.data.Keypoints`.
        pairs: of joints; 0 where no pair is visible.
    """
    length = target.new_zeros(target.shape[0])
    for a, b in reversed(pairs):
        first, second = target[:, a], target[:, b]
        visible = (first[:, 2] > 0) & (second[:, 2] > 0)
        length = torch.where(visible, (first[:, :2] - second[:, :2]).norm(dim=-1), length)
    return length
