"""From a config to the things of a run: settings filled in and checked, data opened, networks built; writes nothing."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from .. import methods
from ..cohort import Learner
from ..data import Batch, DataBundle, open_data
from ..methods.base import Method
from ..models.registry import check_name
from .arguments import check_types
from .config import (
    RECIPE_FIELDS,
    ConfigError,
    ResolvedConfig,
    TrainConfig,
    check_given,
    check_ranges,
    flag,
    naming,
)
from .log import summary_writer
from .networks import build_cohort, default_trunk
from .processes import SINGLE, Processes
from .recipes import merge_recipes
from .schedule import rescale_milestones

__all__ = ["Resolved", "absolute", "build_learner", "open_bundle", "resolve", "select_device", "teacher_address"]

_OF_ONE_TASK = {"classification": "mixup cutmix label_smoothing pad", "pose": "rotation scale"}
"""Settings that are 0 in a run for any other task."""


class Resolved(NamedTuple):
    """A config without gaps, the data it names, and what the user should be told about the filling."""

    config: ResolvedConfig
    data: DataBundle
    notes: list[str]


def resolve(config: TrainConfig, processes: Processes = SINGLE) -> Resolved:
    """Fill every field that is None from the recipes, and open the data; ConfigError for whatever cannot be run.

    Args:
        config: settings, with or without gaps.
        processes: those that will share the run.
    """
    check_given(config)
    chosen = "method" in config.given  # where it is not, the task says which
    if config.task and not chosen:
        with naming("--task"):
            config = dataclasses.replace(config, method=methods.default(config.task))
    method = _method(config)
    config = check_types(config, method.Options)
    if not config.data:
        raise ConfigError("--data: expected the name of a data set, got none; try --data digits")
    if not config.arch:
        raise ConfigError("--arch: expected at least one architecture, got none; try --arch resnet20 --arch resnet20")
    check_ranges(config)
    if config.tensorboard:
        summary_writer()
    data = open_bundle(config)
    if not chosen and not config.task and data.task != method.task:
        with naming("--data"):
            config = dataclasses.replace(config, method=methods.default(data.task))
        method = _method(config)
    _check_task(config, method, data)
    recipe, reference = merge_recipes(method.recipe, data.name)
    recipe |= {key: data.recipe[key] for key in ("pad", "flip") if key in data.recipe}
    values = _filled(config, recipe, method)
    epochs, scaled = values["epochs"], []
    reference = reference or epochs
    if values["schedule"] == "cosine":
        values["milestones"] = config.milestones or []
    elif config.milestones is None:
        values["milestones"] = rescale_milestones(recipe["milestones"], epochs, reference)
        scaled.append(f"milestones {_join(recipe['milestones'])} → {_join(values['milestones'])}")
    options = dict(values["options"] or {})
    if "ramp_up_epochs" not in options:
        own = method.Options().ramp_up_epochs
        # What a data set says of the ramp-up is for methods that have one.
        length = recipe.get("ramp_up_epochs", own) if own else method.recipe.get("ramp_up_epochs", own)
        options["ramp_up_epochs"] = length * epochs / reference
        if length and len(values["arch"]) > 1:
            scaled.append(f"ramp-up {length:g} → {options['ramp_up_epochs']:.3g}")
    notes = [f"{epochs} epochs where {config.method}'s recipe has {reference}, so in proportion: {', '.join(scaled)}"]
    notes = notes if scaled and epochs != reference else []
    if config.warmup_epochs is None and values["warmup_epochs"] and epochs != recipe.get("epochs", epochs):
        values["warmup_epochs"] *= epochs / recipe["epochs"]
        notes.append(f"warm-up {recipe['warmup_epochs']:g} → {values['warmup_epochs']:.3g} epochs")
    with naming("--options"):
        values["options"] = dataclasses.asdict(method.Options(**options))
    with naming("--arch"):
        values["arch"] = method.architectures(values["arch"])
        for name in values["arch"]:
            check_name(name)
        if values["trunk"] == "auto":
            values["trunk"] = default_trunk(values["arch"], method, data.num_classes, data.image_size)
    for key in ("data_dir", "init"):
        values[key] = absolute(values[key])
    device = select_device(config.device)
    values |= {
        "task": data.task,
        "teacher": teacher_address(config.teacher),
        "image_size": data.image_size,
        "device": str(device),
        "amp": _select_amp(config.amp, device),
    }
    if config.channels_last is None:
        values["channels_last"] = device.type == "cpu" or (device.type == "cuda" and values["amp"] != "off")
    resolved = ResolvedConfig(**values)
    check_ranges(resolved)
    _check_method(resolved, method)
    if processes.count * 2 > resolved.batch_size:
        raise ConfigError(
            f"--batch-size: expected at least 2 images for each of {processes.count} processes, got "
            f"{resolved.batch_size} for all of them; take a larger batch or fewer processes"
        )
    if resolved.nan == "skip" and device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"--nan skip: an optimizer on {device.type} cannot leave a step out by itself; take raise or rollback"
        )
    if resolved.pad >= data.image_size:
        raise ConfigError(f"--pad: expected less than the {data.image_size} pixels of an image, got {resolved.pad}")
    if len(data.train) < 2:
        raise ConfigError(f"--data {config.data}: expected at least 2 images to train on, got {len(data.train)}")
    return Resolved(resolved, data, notes)


def _check_task(config: TrainConfig, method: type[Method], data: DataBundle) -> None:
    if config.task not in (None, data.task):
        raise ConfigError(
            f"--task {config.task}: the data set {config.data} is for {data.task}; take other data, or no --task"
        )
    if method.task != data.task:
        with naming("--data"):
            other = methods.default(data.task)
        raise ConfigError(
            f"--method {config.method}: is for {method.task}, and the data set {config.data} for {data.task}; take "
            f"--method {other}, or other data"
        )
    for task, names in _OF_ONE_TASK.items():
        for name in names.split():
            if getattr(config, name) and data.task != task:
                raise ConfigError(f"{flag(name)} is for {task}, and {config.data} for {data.task}; leave it away")
    if not config.flip_test and data.task != "pose":
        raise ConfigError(f"--flip-test is for pose, and {config.data} for {data.task}; leave it away")


def _check_method(config: ResolvedConfig, method: type[Method]) -> None:
    """Raise ConfigError with the reason of a method that cannot run as configured."""
    with naming(f"--method {config.method}"):
        reason = method.refusal(config.to_dict())
    if reason:
        raise ConfigError(f"--method {config.method}: {reason}")
    if method.needs_teacher and config.teacher is None:
        raise ConfigError(
            f"--method {config.method}: needs a frozen network that teaches, got none; give --teacher with a run's "
            "folder, an exported file, torchvision/NAME or timm/NAME"
        )
    if config.teacher is not None and not method.needs_teacher:
        raise ConfigError(
            f"--teacher: no frozen network teaches in --method {config.method}; take --method kd, or leave it away"
        )


def _filled(config: TrainConfig, recipe: dict[str, Any], method: type[Method]) -> dict[str, Any]:
    """Return the settings with what is None taken from the recipe, which must leave nothing open."""
    if config.optimizer not in (None, recipe["optimizer"]) and config.lr is None:
        raise ConfigError(
            f"--optimizer {config.optimizer}: the recipe's learning rate is for {recipe['optimizer']}; give --lr too"
        )
    if (config.optimizer or recipe["optimizer"]) == "adam":
        if config.momentum or config.nesterov:
            raise ConfigError("--momentum and --nesterov belong to --optimizer sgd; leave them away with adam")
        recipe = {**recipe, "momentum": 0.0, "nesterov": False}
    values = config.to_dict()
    values |= {key: recipe[key] for key in RECIPE_FIELDS if values[key] is None and key in recipe}
    if values["schedule"] == "cosine":
        values["milestones"] = values["milestones"] or []
    missing = [key for key in RECIPE_FIELDS if values[key] is None]
    if missing:
        raise ConfigError(
            f"--method {config.method}: its recipe lacks {', '.join(missing)}; add the keys, or give "
            f"{', '.join(map(flag, missing))}"
        )
    return check_types(TrainConfig(**values), method.Options).to_dict()


def open_bundle(config: TrainConfig) -> DataBundle:
    """Open the data set that a config names."""
    with naming("--data"):
        return open_data(
            config.data or "",
            config.data_dir,
            download=config.download,
            image_size=config.image_size,
            seed=config.seed,
        )


def build_learner(
    config: ResolvedConfig,
    num_classes: int,
    *,
    teacher: nn.Module | None = None,
    start: bool = True,
    tell: Callable[[str], object] = lambda line: None,
) -> Learner:
    """Build cohort and method of a resolved config on the CPU, seeded, and try one evaluation on blank images.

    ``teacher`` goes to a method that takes one, see `teacher.load_teacher`; it may be None where nothing is trained.
    With ``start`` off, the weights that the config starts from (pretrained, init) are left out: a checkpoint follows.
    ``tell`` gets a line on what was loaded from each file.
    """
    method = _method(config)
    _seed_generators(config.seed)
    cohort = build_cohort(config, method, num_classes, start=start, tell=tell)
    with naming(f"--method {config.method}"):
        given = {"teacher": teacher} if method.needs_teacher else {}
        own = method(cohort, num_classes, method.Options(**config.options), **given)
        learner = Learner(cohort, own, label_smoothing=config.label_smoothing)
    _try_out(learner, config)
    return learner


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def select_device(name: str) -> torch.device:
    """Return the device that a name stands for; ConfigError where it is of another kind or this machine lacks it.

    Of several processes that torchrun started on a machine each gets a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected auto, cpu, cuda, cuda:N or mps")
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not usable here ({reason}); try --device cpu") from None
    return device


def _select_amp(amp: str, device: torch.device) -> str:
    if amp == "auto":
        capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if capable else "off"
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16 needs a GPU; on a CPU take --amp off, or --amp bf16")
    return amp


def _method(config: TrainConfig) -> type[Method]:
    with naming("--method"):
        method = methods.resolve(config.method)
    options = config.options
    if dataclasses.is_dataclass(options) and not isinstance(options, method.Options):
        raise ConfigError(
            f"--options: expected {method.Options.__name__} of the method {config.method}, got {type(options).__name__}"
        )
    return method


def _try_out(learner: Learner, config: ResolvedConfig) -> None:
    size = config.image_size
    learner.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            outputs = learner.predict(torch.zeros(2, 3, size, size))
    except Exception as error:  # whatever a network raises on images it cannot take
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--arch {', '.join(config.arch)}: cannot take {size}×{size} images ({reason}); "
            "choose another architecture or --image-size"
        ) from error
    learner.train()
    _try_step(learner, config)
    main = learner.method.main_output
    if main not in outputs:
        raise ConfigError(
            f"--method {config.method}: its main_output {main!r} is none of the outputs of predict(), "
            f"{', '.join(outputs)}"
        )


def _try_step(learner: Learner, config: ResolvedConfig) -> None:
    """Take the loss of two blank images by a copy, where the method is of the user's own: what is wrong shows here."""
    method = cast(Method, learner.method)
    if type(method).__module__.partition(".")[0] == __name__.partition(".")[0] or method.task != "classification":
        return
    blank = torch.zeros(2, 3, config.image_size, config.image_size)
    images = blank if method.num_views == 1 else (blank,) * method.num_views
    with naming(f"--method {config.method}"), torch.no_grad(), torch.random.fork_rng(devices=()):
        tried = copy.deepcopy(learner)
        cast(Method, tried.method).attach(torch.arange(2))
        tried(Batch(images, torch.zeros(2, dtype=torch.int64), torch.arange(2)))


def absolute(path: Any) -> Any:
    """Return a path, or a list of paths, independent of the working folder; None stays None."""
    if isinstance(path, list):
        return [absolute(part) for part in path]
    return None if path is None else str(Path(path).expanduser().resolve())


def teacher_address(name: str | None) -> str | None:
    """Return what `teacher.load_teacher` takes, independent of the working folder."""
    library = (name or "").partition("/")[0] in ("torchvision", "timm")
    return name if name is None or (library and not os.path.exists(name)) else absolute(name)


def _join(values: Any) -> str:
    return ", ".join(map(str, values))
