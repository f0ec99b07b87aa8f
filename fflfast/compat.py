"""Checkpoints of the original FFL code (Jangho-Kim/FFL-pytorch, 2020) as learners of this library.

Its `FFL_ResNet` is a trunk (conv1, bn1, layer1, layer2) with two branches (layer3_1, classfier3_1 and layer3_2,
classfier3_2), its `Fusion_module` has conv1, bn1, conv1_1, bn1_1 and fc2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import models
from .cohort import Cohort, Learner
from .methods import FFL, FFLOptions

__all__ = ["load_ffl_pytorch"]

_TRUNK = ("conv1", "bn1", "layer1", "layer2")
_BRANCHES = ({"layer3_1": "layer3", "classfier3_1": "fc"}, {"layer3_2": "layer3", "classfier3_2": "fc"})
_FUSION = {
    "conv1": "depthwise",
    "bn1": "depthwise_norm",
    "conv1_1": "pointwise",
    "bn1_1": "pointwise_norm",
    "fc2": "classifier",
}


def load_ffl_pytorch(
    model_state: Mapping[str, Any], module_state: Mapping[str, Any], *, depth: int, num_classes: int
) -> Learner:
    """A learner with the weights of the original code and its arithmetic (T = 3, target_eps = 1e-7).

    Args:
        model_state: state dict of `FFL_ResNet`, or the checkpoint that holds it under "state_dict". Load files
            with ``torch.load(file, weights_only=True, map_location="cpu")``.
        module_state: state dict of `Fusion_module`, likewise.
        depth: of the ResNet, 6n+2.
        num_classes: K.

    Returns:
        A learner in training mode, on the CPU, with ``cohort.trunk``, two sub-networks and ``method.fusion``.

    Raises:
        ValueError: names or shapes that do not fit this depth and number of classes.
        TypeError: something that is not a state dict.
    """
    network = _state(model_state, "model_state")
    fusion = _state(module_state, "module_state")
    parts = [models.split(models.create(f"resnet{depth}", num_classes), "layer3") for _ in _BRANCHES]
    cohort = Cohort([branch for _, branch in parts], parts[0][0])
    learner = Learner(cohort, FFL(cohort, num_classes, FFLOptions(target_eps=1e-7)))

    renamed = _renamed(network, {name: f"cohort.trunk.{name}" for name in _TRUNK}, "model_state", partial=True)
    for k, names in enumerate(_BRANCHES):
        mapping = {old: f"cohort.sub_networks.{k}.{new}" for old, new in names.items()}
        renamed |= _renamed(network, mapping, "model_state", partial=True)
    unknown = sorted({key.split(".")[0] for key in network} - {*_TRUNK, *_BRANCHES[0], *_BRANCHES[1]})
    if unknown:
        raise ValueError(f"load_ffl_pytorch: model_state has {', '.join(unknown)}, which FFL_ResNet does not have")
    renamed |= _renamed(fusion, {old: f"method.fusion.{new}" for old, new in _FUSION.items()}, "module_state")
    _load(learner, renamed, depth, num_classes)
    return learner


def _state(state: Mapping[str, Any], what: str) -> Mapping[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TypeError(
            f"load_ffl_pytorch: {what} must be a state dict, or a checkpoint with one under 'state_dict', got "
            f"{type(state).__name__}"
        )
    return state


def _renamed(
    state: Mapping[str, Tensor], names: Mapping[str, str], what: str, *, partial: bool = False
) -> dict[str, Tensor]:
    """The entries of `state` below the old names, under the new ones; with `partial` the others may stay out."""
    result = {}
    for key, value in state.items():
        old, dot, rest = key.partition(".")
        if old in names:
            result[names[old] + dot + rest] = value
        elif not partial:
            raise ValueError(f"load_ffl_pytorch: {what} has {key!r}, which Fusion_module does not have")
    return result


def _load(learner: Learner, state: dict[str, Tensor], depth: int, num_classes: int) -> None:
    expected = learner.state_dict()
    # Checkpoints older than PyTorch 0.4.1 have no batch counters; the arithmetic does not read them.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected]
    wrong = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    said = f"for depth={depth}, num_classes={num_classes}"
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has {extra[0]} beyond it"
        raise ValueError(f"load_ffl_pytorch: the checkpoint {problem} {said}; is the depth right?")
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"load_ffl_pytorch: {key} must have shape {tuple(expected[key].shape)} {said}, "
            f"got {tuple(state[key].shape)}"
        )
    learner.load_state_dict(state, strict=False)
