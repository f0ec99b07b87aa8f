"""The networks of a run: built by name, with their first weights and the low layers that they share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import models
from ..cohort import Cohort
from ..methods.base import Method
from ..models.base import SubNetwork
from .config import ConfigError, ResolvedConfig, naming

__all__ = ["build_cohort", "default_trunk"]


def build_cohort(
    config: ResolvedConfig,
    method: type[Method],
    num_classes: int,
    *,
    start: bool = True,
    tell: Callable[[str], object] = lambda line: None,
) -> Cohort:
    """Build the sub-networks of a resolved config and their trunk.

    Args:
        config: says which.
        method: asks for inner feature maps, or does not.
        num_classes: K; of a pose network its joints.
        start: whether to load the weights that the config starts from (pretrained, init).
        tell: gets a line on what was loaded from each file.
    """
    with naming("--arch"):
        nets = [
            models.create(name, num_classes, pretrained=config.pretrained and start, image_size=config.image_size)
            for name in config.arch
        ]
    if start:
        for net, file in zip(nets, config.init or (), strict=False):
            with naming("--init"):
                tell(f"{net.arch}: {models.load_weights(net, file)}")
    for net in nets:
        task = getattr(net, "task", "classification")
        if task != method.task:
            raise ConfigError(
                f"--arch {net.arch}: is for {task}, and --method {config.method} for {method.task}; take another "
                "network or method"
            )
    if method.needs_stages:
        for net in nets:
            if not net.stage_names:
                raise ConfigError(
                    f"--method {config.method}: learns from inner feature maps, which {net.arch} does not return; take "
                    "networks of ours, such as resnet32"
                )
            net.return_stages = True
    if config.trunk == "none":
        return Cohort(nets)
    if len(nets) < 2:
        raise ConfigError(
            f"--trunk {config.trunk}: two or more networks share a trunk, got {', '.join(config.arch)}; take "
            "--trunk none"
        )
    with naming(f"--trunk {config.trunk}"):
        trunk, sub_networks = _share(nets, config.trunk, config.image_size)
    return Cohort(sub_networks, trunk)


def default_trunk(names: Sequence[str], method: type[Method], num_classes: int, image_size: int) -> str:
    """Return where the networks of a run part by default, "none" for nowhere.

    Networks of ours share what the method's paper shares, if they are all alike there; where unlike networks would part
    in several places, they part at the lowest.
    """
    own = all(name.partition("@")[0] in models.available() for name in names)
    if len(names) < 2 or method.shared_stages == -1 or not own:
        return "none"
    with torch.random.fork_rng(devices=()):  # networks to look at alone, whose weights nobody should notice
        nets = [models.create(name, num_classes) for name in dict.fromkeys(names)]
    places = [_place(net, method.shared_stages) for net in nets]
    order = [name for name, _ in nets[0].named_modules()]
    at = next((name for name in order if name in places), None)
    if at is None or None in places:
        return "none"
    if len(nets) > 1:
        try:
            _share(nets, at, image_size)
        except ValueError:
            return "none"
    return at


def _place(net: SubNetwork, shared_stages: int | None) -> str | None:
    """Return the first module that is not shared, None where the network does not say."""
    if shared_stages is None:
        return net.default_split
    return net.stage_names[shared_stages] if shared_stages < len(net.stage_names) else None


def _share(nets: Sequence[SubNetwork], at: str, image_size: int) -> tuple[nn.Module, list[nn.Module]]:
    """Take the networks apart before their module ``at``: the low layers of the first, and what is left of each.

    ValueError where the low layers of networks of unlike names do not compute the same from the same weights.
    """
    blank = torch.zeros(1, 3, image_size, image_size)
    pairs = [models.split(net, at, example=blank) for net in nets]
    trunk = pairs[0][0]
    for net, (other, _) in zip(nets[1:], pairs[1:], strict=True):
        if net.arch != nets[0].arch and not _alike(trunk, other, blank.shape):
            raise ValueError(
                f"networks that share a trunk have the same low layers, and those of {nets[0].arch} and {net.arch} "
                f"before {at} are not the same; take --trunk none, or networks of one architecture"
            )
    return trunk, [sub_network for _, sub_network in pairs]


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module, shape: Sequence[int]) -> bool:
    states = [{name: tensor.shape for name, tensor in part.state_dict().items()} for part in (one, other)]
    if states[0] != states[1]:
        return False
    one, other = copy.deepcopy(one).eval(), copy.deepcopy(other).eval()
    other.load_state_dict(one.state_dict())
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))  # the global generator draws weights
    outputs: list[list[Tensor]] = [tree_leaves(part(images)) for part in (one, other)]
    return len(outputs[0]) == len(outputs[1]) and all(map(torch.equal, *outputs))
