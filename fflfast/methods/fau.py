"""The feature aggregation unit of OKDHP (arXiv 2108.02092): how much each branch counts for each joint of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FAU_FORMS", "FeatureAggregation"]

FAU_FORMS = ("code", "figure")
_KERNELS = (3, 5, 7)


class FeatureAggregation(nn.Module):
    """Weights of N branches from the output of the stem that they share.

    With u_k = mean over H × W of ReLU(BN(conv k×k of the stem's output)), C → C channels, for k = 3, 5, 7, both forms
    end in a linear layer v → a of C/4 entries, N linear layers a → J, and a softmax over the branches. The published
    code and the paper's figure differ in v:

    - "code": v = u_3 + u_5 + u_7, of C entries.
    - "figure": v = [W_3 u_3, W_5 u_5, W_7 u_7, W_0 u_0] with u_0 the mean of the stem's output itself and 1×1
      convolutions W, whose number of channels it does not say: here C/4 each. They stand before the pool in the figure;
      behind it, as here, they give the same for less, since both are linear.

    N, which the code takes for the number of kernels, is free here. What the figure leaves out (norm and activation
    behind the k×k convolutions, the size of a, the softmax) is as in the code.

    Args:
        channels: C of the stem's output.
        branches: N.
        joints: J.
        form: "code" or "figure".

    Raises:
        ValueError: another form.
    """

    def __init__(self, channels: int, branches: int, joints: int, form: str = "code") -> None:
        super().__init__()
        if form not in FAU_FORMS:
            raise ValueError(f"FeatureAggregation: form must be one of {', '.join(FAU_FORMS)}, got {form!r}")
        inner = max(1, channels // 4)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, k, padding=k // 2), nn.BatchNorm2d(channels), nn.ReLU())
            for k in _KERNELS
        )
        self.mix = nn.ModuleList(nn.Linear(channels, inner) for _ in range(4)) if form == "figure" else None
        self.reduce = nn.Linear(channels if self.mix is None else 4 * inner, inner)
        self.select = nn.Linear(inner, branches * joints)  # the N layers in one
        self.shape = (branches, joints)

    def forward(self, features: Tensor) -> Tensor:
        """Weights (B, N, J), positive, which sum to 1 over the branches, of the stem's output (B, C, H, W)."""
        pooled = [conv(features).mean(dim=(2, 3)) for conv in self.convs]
        if self.mix is None:
            v = sum(pooled[1:], pooled[0])
        else:
            pooled.append(features.mean(dim=(2, 3)))
            v = torch.cat([mix(u) for mix, u in zip(self.mix, pooled, strict=True)], dim=1)
        scores = self.select(self.reduce(v)).unflatten(1, self.shape)
        return torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=1)
