"""Everything a training run needs, in one dataclass that Python, YAML and the command line fill alike."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ConfigError", "ResolvedConfig", "TrainConfig", "check_given", "check_ranges", "naming"]


class ConfigError(ValueError):
    """A run that cannot be started as configured; the message is one line and names the remedy."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run

    A field left at None takes its value from the recipe of the method or of the data set when the run starts
    (`fflfast.training.resolve`), which also checks every value and raises `ConfigError`.

    Args:
        data: data set: digits, fashion_mnist, cifar10, cifar100, imagefolder, synthetic, synthetic-imagenet, for pose
            lspet or coco-keypoints
        task: what is learned, classification or pose (default: as the data and the method say)
        data_dir: folder that holds the data set (digits and the synthetic ones need none)
        download: fetch a missing data set into data_dir
        image_size: height and width of the images in pixels, where the data set leaves a choice
        limit_train: train on this many of the training images, the same ones for every seed
        limit_test: test on this many of the test images, always the same ones
        arch: architecture of a sub-network; repeat the flag for each one (resnet32, torchvision/NAME, timm/NAME …)
        method: how sub-networks teach each other: ffl, dml, kd, cl, one, okddip, kdcl, pcl, oem, mcl_okd, afd, single;
            for pose okdhp; or package.module:Class (a run for pose that names none takes okdhp)
        options: the method's own options
        teacher: frozen network that teaches (--method kd): a run's folder, a checkpoint, an exported file,
            torchvision/NAME or timm/NAME with its published weights
        trunk: low layers that the sub-networks share: auto (as the method's paper, where all are networks of ours with
            the same low layers), none, or the name of the first module that is not shared
        pretrained: start from the weights that torchvision or timm publish (downloads them)
        init: file of weights to start from; repeat the flag, one for each --arch
        epochs: passes over the training images
        batch_size: images in a step, over all processes
        optimizer: sgd or adam
        lr: peak learning rate
        momentum: momentum of SGD
        nesterov: Nesterov momentum of SGD
        weight_decay: L2 penalty (a method may set its own for its modules)
        decay_norm_and_bias: apply weight decay to norm weights and biases too
        schedule: learning rate over time, multistep or cosine
        milestones: epochs at which multistep multiplies the learning rate by gamma
        gamma: factor of the multistep schedule
        warmup_epochs: epochs of linear warm-up at the start
        label_smoothing: label smoothing of every cross-entropy
        mixup: alpha of mixup (0 = off)
        cutmix: alpha of CutMix (0 = off)
        pad: pixels of reflection padding before the random crop
        flip: mirror training images at random
        rotation: largest random rotation in degrees, to either side (pose)
        scale: largest random change of scale, to either side: 0.25 means 0.75 to 1.25 (pose)
        flip_test: in tests, average the heatmaps of each image and of its mirror image (pose)
        seed: seed of weights, data order and augmentation
        device: auto, cpu, cuda, cuda:N or mps
        amp: mixed precision of the training step; auto = bf16 on CUDA devices that have it, else off
        channels_last: keep weights and images in channels-last memory order (default: on a CPU, and on a CUDA device
            under mixed precision)
        compile: compile each sub-network with torch.compile
        plan: how a step runs: serial, streams (sub-networks side by side), graph (the whole step as one CUDA graph), or
            auto, which times those that the device offers and keeps the fastest
        data_on: where a data set that fits into memory lies: device, host, or auto (device, if it takes at most an
            eighth of the memory there)
        deterministic: choose deterministic algorithms, so that a CUDA run repeats bit for bit (a CPU run always does)
        workers: threads that load images (0 = none)
        accumulate: parts into which a batch is cut, whose gradients are added up before the step
        clip_norm: largest norm of all gradients together (0 = no clipping)
        ema: decay of an exponential moving average of the weights, which then is what is tested (0 = off)
        nan: what to do when loss or gradients are not finite: raise, skip (leave the step out, decided on the device)
            or rollback (take the weights of the last checkpoint and go on with the next images)
        sync_buffers: when several processes average the running statistics of the sub-networks' norms: before each
            test (epoch) or after every step
        out: folder of the run, which must be new (default: runs/DATA-METHOD-ARCHITECTURES)
        resume: folder of an interrupted run to continue exactly, or auto: continue the run in --out if it is there
        baseline: afterwards train one network of each architecture alone with the same recipe and seed
        checkpoint_every: steps between checkpoints within an epoch (0 = before and after the test of each epoch only)
        log_every: steps between two records of the losses
        tensorboard: write TensorBoard events too
    """

    data: str | None = None
    task: str | None = None
    data_dir: str | None = None
    download: bool = False
    image_size: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None

    arch: list[str] | None = None
    method: str = "ffl"
    options: Mapping[str, Any] | None = None
    teacher: str | None = None
    trunk: str | None = None
    pretrained: bool = False
    init: list[str] | None = None

    epochs: int | None = None
    batch_size: int | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    weight_decay: float | None = None
    decay_norm_and_bias: bool | None = None
    schedule: Literal["multistep", "cosine"] | None = None
    milestones: list[int] | None = None
    gamma: float | None = None
    warmup_epochs: float | None = None
    label_smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    pad: int | None = None
    flip: bool | None = None
    rotation: float | None = None
    scale: float | None = None
    flip_test: bool = True

    seed: int = 0
    device: str = "auto"
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    channels_last: bool | None = None
    compile: bool = False
    plan: Literal["auto", "serial", "streams", "graph"] = "auto"
    deterministic: bool = False
    data_on: Literal["auto", "host", "device"] = "auto"
    workers: int = 0
    accumulate: int = 1
    clip_norm: float = 0.0
    ema: float = 0.0
    nan: Literal["raise", "skip", "rollback"] = "raise"
    sync_buffers: Literal["epoch", "step"] = "epoch"

    out: str | None = None
    resume: str | None = None
    baseline: bool = False
    checkpoint_every: int = 0
    log_every: int = 50
    tensorboard: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from a mapping such as a YAML file gives, and remember its keys as `given`.

        An unknown key raises ConfigError.
        """
        for key in values:
            if key not in FIELDS:
                raise ConfigError(f"unknown key {key!r}{suggest(str(key), FIELDS)}; see fflfast train --help")
        config = cls(**values)
        object.__setattr__(config, "_given", frozenset(values))
        return config

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were asked for: the keys of `from_dict`, else the fields off their default."""
        changed = (field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return getattr(self, "_given", frozenset(changed))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain Python values that JSON and YAML can hold."""
        options = self.options
        if dataclasses.is_dataclass(options) and not isinstance(options, type):
            options = dataclasses.asdict(options)
        return {name: _plain(options if name == "options" else getattr(self, name)) for name in FIELDS}

    def to_yaml(self) -> str:
        """Return the settings as a YAML file for ``--config``, without the folder of the run itself."""
        values = self.to_dict()
        values.pop("out")
        values.pop("resume")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def hash(self) -> str:
        """Return 12 hex digits that are the same for two runs that compute the same thing."""
        left_out = MAY_CHANGE - {"teacher"}
        values = {key: value for key, value in self.to_dict().items() if key not in left_out}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class ResolvedConfig(TrainConfig):
    """A config in which every recipe value is filled in and every name resolved, as `resolve` returns it."""

    data: str
    task: str
    image_size: int
    arch: list[str]
    options: Mapping[str, Any]
    channels_last: bool
    trunk: str
    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    schedule: Literal["multistep", "cosine"]
    milestones: list[int]
    gamma: float
    warmup_epochs: float
    label_smoothing: float
    mixup: float
    cutmix: float
    pad: int
    flip: bool
    rotation: float
    scale: float


FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))

RECIPE_FIELDS = tuple(list(ResolvedConfig.__annotations__)[6:])
"""Fields whose None means: as the recipe says (trunk to scale)."""

MAY_CHANGE = frozenset(
    (
        "data_dir",
        "download",
        "teacher",
        "device",
        "plan",
        "data_on",
        "workers",
        "nan",
        "out",
        "resume",
        "baseline",
        "checkpoint_every",
        "log_every",
        "tensorboard",
    )
)
"""Fields that do not decide what a run computes, so that a resumed run may change them: ``data_dir`` and ``teacher``
say where something lies, and what lies there must be the same."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def check_given(config: TrainConfig) -> None:
    """Raise ConfigError for null where no recipe fills in, and for a text that nothing can be called."""
    for field in dataclasses.fields(config):
        if field.default is not None and getattr(config, field.name) is None:
            raise ConfigError(f"{flag(field.name)}: expected a value, got null; leave it away for {field.default}")
    for name, value in config.to_dict().items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (not text.strip() or "\0" in text):
                raise ConfigError(f"{flag(name)}: expected a name, got {text!r}; leave it away for the default")
            if isinstance(value, list) and name == "arch" and not isinstance(text, str):
                raise ConfigError(
                    f"--arch: expected names of networks, got a {type(text).__name__}; a network of your own trains "
                    "with fflfast.Cohort and fflfast.Learner in a loop of yours"
                )


def check_ranges(config: TrainConfig) -> None:
    """Raise ConfigError for a value out of range or settings that contradict each other; None passes."""
    for names, test, expected in _RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not (_is_number(value) and test(value)):
                raise ConfigError(f"{flag(name)}: expected {expected}, got {shorten(value)}")
    if (config.warmup_epochs or 0) >= (config.epochs or math.inf):
        raise ConfigError(f"--warmup-epochs: expected fewer than {config.epochs} epochs, got {config.warmup_epochs}")
    milestones = config.milestones or []
    if any(m < 1 for m in milestones) or list(milestones) != sorted(set(milestones)):
        raise ConfigError(f"--milestones: expected rising epochs from 1 on, got {milestones}")
    if milestones and config.schedule == "cosine":
        raise ConfigError("--milestones belong to --schedule multistep; leave one of the two out")
    if config.batch_size is not None and 2 * config.accumulate > config.batch_size:
        raise ConfigError(
            f"--accumulate: expected parts of at least 2 images of a batch of {config.batch_size}, got "
            f"{config.accumulate} parts; take fewer parts or a larger --batch-size"
        )
    if config.nesterov and config.optimizer != "adam" and config.momentum == 0:
        raise ConfigError("--nesterov needs a momentum above 0; give --momentum 0.9 or --nesterov false")
    if config.pretrained and config.init:
        raise ConfigError("--pretrained and --init both say where to start from; leave one of the two out")
    if config.init and len(config.init) != len(config.arch or ()):
        raise ConfigError(
            f"--init: expected one file for each --arch ({len(config.arch or ())}), got {len(config.init)}"
        )


def _is_number(value: float) -> bool:
    """Tell whether a value is finite and, if whole, one of 64 bits."""
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


_RANGES: tuple[tuple[str, Any, str], ...] = (
    ("epochs image_size log_every accumulate", lambda v: v >= 1, "at least 1"),
    ("limit_test", lambda v: v >= 1, "at least 1 image"),
    ("batch_size limit_train", lambda v: v >= 2, "at least 2 images (batch normalisation needs them)"),
    ("lr", lambda v: v > 0, "a finite number above 0"),
    ("gamma", lambda v: v > 0, "a finite number above 0"),
    ("momentum label_smoothing ema", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("weight_decay warmup_epochs clip_norm", lambda v: v >= 0, "a finite number, 0 or above"),
    ("mixup cutmix", lambda v: 0 <= v <= 100, "a number from 0 (off) to 100"),
    ("pad seed workers checkpoint_every", lambda v: v >= 0, "0 or above"),
    ("rotation", lambda v: 0 <= v <= 180, "degrees from 0 (off) to 180"),
    ("scale", lambda v: 0 <= v <= 0.75, "a number from 0 (off) to 0.75"),
)


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Turn whatever a part of the library, or code of the user's, says about a wrong value into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, TypeError, ImportError, OSError)) else f"{type(error).__name__}: "
        raise ConfigError(f"{flag}: {kind}{' '.join(str(error).split())}") from error


def shorten(value: Any) -> str:
    """Return a value as one line of a message, at most some 80 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean …?" for a name close to a known one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""
