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

# Where each of the original's modules lives in a learner.
_MODEL = {
    **{name: f"cohort.trunk.{name}" for name in ("conv1", "bn1", "layer1", "layer2")},
    "layer3_1": "cohort.sub_networks.0.layer3",
    "classfier3_1": "cohort.sub_networks.0.fc",
    "layer3_2": "cohort.sub_networks.1.layer3",
    "classfier3_2": "cohort.sub_networks.1.fc",
}
_MODULE = {
    "conv1": "method.fusion.depthwise",
    "bn1": "method.fusion.depthwise_norm",
    "conv1_1": "method.fusion.pointwise",
    "bn1_1": "method.fusion.pointwise_norm",
    "fc2": "method.fusion.classifier",
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
    parts = [models.split(models.create(f"resnet{depth}", num_classes), "layer3") for _ in range(2)]
    cohort = Cohort([branch for _, branch in parts], parts[0][0])
    learner = Learner(cohort, FFL(cohort, num_classes, FFLOptions(target_eps=1e-7)))
    own = learner.state_dict()
    with_depth = f"for depth={depth}, num_classes={num_classes}"
    state = _translated(model_state, "model_state", _MODEL, own, with_depth)
    state |= _translated(module_state, "module_state", _MODULE, own, with_depth)
    learner.load_state_dict(state, strict=False)
    return learner


def _translated(
    given: Mapping[str, Any], what: str, modules: Mapping[str, str], own: Mapping[str, Tensor], said: str
) -> dict[str, Tensor]:
    """The entries of one state dict under our names; every one that is missing, left over or misshapen is an error."""
    state = _state(given, what)
    names = {
        f"{theirs}{key[len(ours) :]}": key
        for theirs, ours in modules.items()
        for key in own
        if key.startswith(f"{ours}.")
    }
    # Checkpoints older than PyTorch 0.4.1 have no batch counters; the arithmetic does not read them.
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    left_over = [name for name in state if name not in names]
    if missing or left_over:
        problem = f"lacks {missing[0]!r}" if missing else f"has {left_over[0]!r}, which does not belong there"
        raise ValueError(
            f"load_ffl_pytorch: {what} {problem} {said} ({len(missing)} missing, {len(left_over)} too many); "
            "are the depth and the order of the two states right?"
        )
    for name, value in state.items():
        expected = tuple(own[names[name]].shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"load_ffl_pytorch: {name!r} of {what} must have shape {expected} {said}, got {tuple(value.shape)}"
            )
    return {names[name]: value for name, value in state.items()}


def _state(state: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TypeError(
            f"load_ffl_pytorch: {what} must be a state dict, or a checkpoint with one under 'state_dict', got "
            f"{type(state).__name__}"
        )
    # nn.DataParallel puts "module." before every name.
    return {key.removeprefix("module."): value for key, value in state.items()}
