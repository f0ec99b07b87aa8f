"""A frozen network that teaches: of a run, of an exported file, or published by torchvision or timm."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import models
from ..cohort import Learner
from ..data import DataBundle
from .checkpoint import Snapshot
from .config import ConfigError, ResolvedConfig, naming
from .evaluation import check_classes, is_run, load_file, load_run

__all__ = ["Teacher", "check_teacher", "load_teacher"]

_FINGERPRINT = "learner/method.teacher_fingerprint"


class Teacher(nn.Module):
    """A frozen network in eval mode on images of another normalisation.

    Args:
        network: images (B, 3, H, W), normalised by ``mean`` and ``std``, to logits (B, K), or a tuple that begins so.
        mean, std: of the network's images, by channel, in units of pixel values 0 … 255.
        data: whose normalisation the images have that `forward` gets.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], data: DataBundle) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.training = False
        own, run = (
            torch.tensor(pair, dtype=torch.float64).view(2, -1, 1, 1) for pair in ((mean, std), (data.mean, data.std))
        )
        self.same = torch.equal(own, run)
        self.register_buffer("scale", (run[1] / own[1]).float())
        self.register_buffer("shift", ((run[0] - own[0]) / own[1]).float())

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W) that are normalised as the run's."""
        out = self.network(images if self.same else images * self.scale + self.shift)
        return out if isinstance(out, Tensor) else out[0]

    def train(self, mode: bool = True) -> Teacher:
        """Stay as it is, whatever the network does that holds it."""
        return self


def load_teacher(name: str, data: DataBundle, device: str = "cpu") -> Teacher:
    """Load a frozen network for the classes and the image size of a run's data; it lies on the CPU, in float32.

    Args:
        name: a run's folder or checkpoint, whose main output teaches (of a run with ``ema`` the averaged weights); a
            file that ``fflfast export`` wrote; torchvision/NAME or timm/NAME[.TAG] with the published weights.
        data: of the run.
        device: where the run will be.

    Raises:
        ConfigError: no such network, or one that was not made for these classes or this image size.
    """
    with naming(f"--teacher {name}"):
        if os.path.exists(name):
            try:
                network, facts = _from_file(Path(name), device)
            except ConfigError as error:
                raise ConfigError(f"--teacher {name}: {error}") from error
            check_classes(f"--teacher {name}", facts, data, "take a teacher that was trained on these classes")
            if facts["image_size"] != data.image_size:
                was, now = facts["image_size"], data.image_size
                raise ConfigError(
                    f"--teacher {name}: was trained on {was}×{was} images, and the run has {now}×{now}; take another "
                    f"teacher, or --image-size {was} where the data leave a choice"
                )
        elif name.partition("/")[0] in _LIBRARIES:
            network, facts = _published(name, data)
        else:
            raise ConfigError(
                f"--teacher {name}: no such folder or file; give a run's folder, a checkpoint, an exported file, "
                "torchvision/NAME or timm/NAME"
            )
        return Teacher(network, facts["mean"], facts["std"], data)


def check_teacher(snapshot: Snapshot, config: ResolvedConfig, learner: Learner) -> None:
    """Raise ConfigError where another teacher than the learner's taught the run that a snapshot is of."""
    saved, own = snapshot.tensors.get(_FINGERPRINT), getattr(learner.method, "teacher_fingerprint", None)
    if saved is not None and own is not None and not torch.equal(saved, own):
        raise ConfigError(
            f"--teacher {config.teacher}: is not the network that taught the run {config.out} so far (its weights "
            "differ); give that one, or start a new run in another --out"
        )


class _MainOutput(nn.Module):
    """What a trained learner is judged by, as a network."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        return self.learner.predict(images)[str(self.learner.method.main_output)]


def _from_file(path: Path, device: str) -> tuple[nn.Module, dict[str, Any]]:
    if is_run(path):
        _, learner, facts = load_run(path)
        return _MainOutput(learner.eval()), facts
    network, facts = load_file(path)
    if isinstance(network, torch.fx.GraphModule) and torch.device(device).type != "cpu":
        raise ConfigError(f"--teacher {path}: a .pt2 program runs on the CPU it was traced on; give the run's folder")
    return network, facts


class _Published(NamedTuple):
    """What a library says of its weights; mean and std are in units of 0 … 1."""

    classes: int
    names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]


def _of_torchvision(name: str) -> _Published:
    weights = importlib.import_module("torchvision.models").get_model_weights(name).DEFAULT
    transforms, names = weights.transforms(), weights.meta["categories"]
    mean, std = transforms.mean, transforms.std
    if name in ("googlenet", "inception_v3"):
        mean = std = (0.5, 0.5, 0.5)  # what their first layer gets; torchvision's own class converts to that inside
    return _Published(len(names), names, mean, std)


def _of_timm(name: str) -> _Published:
    about = importlib.import_module("timm").get_pretrained_cfg(name)
    if about is None:
        raise ValueError("timm knows no published weights of it")
    return _Published(about.num_classes, about.label_names or (), about.mean, about.std)


_LIBRARIES = {"torchvision": _of_torchvision, "timm": _of_timm}


def _published(name: str, data: DataBundle) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network of a library; its classes are checked before its weights are downloaded."""
    library, _, short = name.partition("/")
    about = _LIBRARIES[library](short)
    # ImageNet's folders bear the numbers of WordNet, in whose order every library has the classes.
    numbered = len(data.class_names) == 1000 and all(re.fullmatch(r"n\d{8}", c) for c in data.class_names)
    if about.classes != data.num_classes or not (numbered or list(about.names) == list(data.class_names)):
        raise ConfigError(
            f"--teacher {name}: its published weights know {about.classes} classes, and those of {data.name} "
            f"({data.num_classes}, the first {data.class_names[0]!r}) are not the same; take a teacher that "
            "was trained on them"
        )
    net = models.create(name, about.classes, pretrained=True, image_size=data.image_size)
    facts = {"mean": [255 * v for v in about.mean], "std": [255 * v for v in about.std]}
    return net.eval(), facts
