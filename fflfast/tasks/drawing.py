"""Skeletons over images, on axes of matplotlib."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..data import Keypoints

__all__ = ["draw_person"]

_LEFT, _RIGHT, _MIDDLE = "#4477aa", "#ee6677", "#ccbb44"  # Paul Tol's "bright"
_TRUE, _SHADOW = "#ffffff", "#00000060"


def draw_person(axes: Any, image: Tensor, found: Tensor, truth: Tensor, keypoints: Keypoints) -> None:
    """Draw a person's true skeleton (white, dotted) and the one that was found (left blue, right red).

    Limbs that end in an unseen joint have no truth; what was found of them is faint.

    Args:
        axes: of matplotlib.
        image: uint8 (3, H, W).
        found: (J, 2), x and y in its pixels.
        truth: (J, 3), x, y and visible.
        keypoints: which joints are connected.
    """
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    axes.set_axis_off()
    axes.set_xlim(-0.5, image.shape[-1] - 0.5)  # a limb that leaves the image does not widen it
    axes.set_ylim(image.shape[-2] - 0.5, -0.5)
    places, true = found.tolist(), truth.tolist()
    for a, b in keypoints.skeleton:
        seen = true[a][2] > 0 and true[b][2] > 0
        if seen:
            for style, shade, width in (("-", _SHADOW, 2.2), (":", _TRUE, 1.2)):  # seen on bright and dark alike
                axes.plot(*zip(true[a][:2], true[b][:2], strict=True), style, color=shade, lw=width)
        colour = _side(keypoints.names[a], keypoints.names[b])
        axes.plot(*zip(places[a], places[b], strict=True), "-", color=colour, lw=1.8, alpha=1.0 if seen else 0.3)


def _side(*names: str) -> str:
    sides = {name.partition("_")[0] for name in names} & {"left", "right"}
    return _MIDDLE if len(sides) != 1 else _LEFT if sides == {"left"} else _RIGHT
