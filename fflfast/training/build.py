"""From a config to the things of a run: settings filled in and checked, data opened, networks built; writes nothing."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import methods, models
from ..cohort import Cohort, Learner
from ..data import DataBundle, open_data
from ..methods.base import Method
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
from .processes import SINGLE, Processes
from .recipes import merge_recipes
from .schedule import rescale_milestones

__all__ = ["Resolved", "absolute", "build_learner", "open_bundle", "resolve", "select_device"]


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
    recipe, reference = merge_recipes(method.recipe, config.data)
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
        length = recipe.get("ramp_up_epochs", method.Options().ramp_up_epochs)
        options["ramp_up_epochs"] = length * epochs / reference
        if length and config.method != "single":
            scaled.append(f"ramp-up {length:g} → {options['ramp_up_epochs']:.3g}")
    notes = [f"{epochs} epochs where {config.method}'s recipe has {reference}, so in proportion: {', '.join(scaled)}"]
    notes = notes if scaled and epochs != reference else []
    if config.warmup_epochs is None and values["warmup_epochs"] and epochs != recipe.get("epochs", epochs):
        values["warmup_epochs"] *= epochs / recipe["epochs"]
        notes.append(f"warm-up {recipe['warmup_epochs']:g} → {values['warmup_epochs']:.3g} epochs")
    with naming("--options"):
        values["options"] = dataclasses.asdict(method.Options(**options))
    if values["trunk"] == "auto":
        values["trunk"] = _default_split(config.arch, data.num_classes) or "none"
    for key in ("data_dir", "init"):
        values[key] = absolute(values[key])
    device = select_device(config.device)
    values |= {"image_size": data.image_size, "device": str(device), "amp": _select_amp(config.amp, device)}
    if config.channels_last is None:
        values["channels_last"] = device.type == "cpu" or (device.type == "cuda" and values["amp"] != "off")
    resolved = ResolvedConfig(**values)
    check_ranges(resolved)
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


def _filled(config: TrainConfig, recipe: dict[str, Any], method: type[Method]) -> dict[str, Any]:
    """Return the settings with what is None taken from the recipe, which must leave nothing open."""
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
    start: bool = True,
    tell: Callable[[str], object] = lambda line: None,
) -> Learner:
    """Build cohort and method of a resolved config on the CPU, seeded, and try one evaluation on blank images.

    With ``start`` off, the weights that the config starts from (pretrained, init) are left out: a checkpoint follows.
    ``tell`` gets a line on what was loaded from each file.
    """
    method = _method(config)
    _seed_generators(config.seed)
    with naming("--arch"):
        nets = [
            models.create(name, num_classes, pretrained=config.pretrained and start, image_size=config.image_size)
            for name in config.arch
        ]
    if start:
        for net, file in zip(nets, config.init or (), strict=False):
            with naming("--init"):
                tell(f"{net.arch}: {models.load_weights(net, file)}")
    sub_networks: list[nn.Module] = list(nets)
    trunk: nn.Module | None = None
    if config.trunk != "none":
        if len(set(config.arch)) > 1 or len(nets) < 2:
            raise ConfigError(
                f"--trunk {config.trunk}: two or more networks of one architecture share a trunk, got "
                f"{', '.join(config.arch)}; take --trunk none"
            )
        with naming("--trunk"):
            blank = torch.zeros(1, 3, config.image_size, config.image_size)
            pairs = [models.split(net, config.trunk, example=blank) for net in nets]
        trunk, sub_networks = pairs[0][0], [sub_network for _, sub_network in pairs]
    with naming(f"--method {config.method}"):
        cohort = Cohort(sub_networks, trunk)
        own = method(cohort, num_classes, method.Options(**config.options))
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


def _default_split(arch: list[str] | None, num_classes: int) -> str | None:
    """Return where the sub-networks part by default: networks of ours that are all alike share their low layers."""
    names = arch or []
    if len(names) < 2 or len(set(names)) > 1 or names[0] not in models.available():
        return None
    return models.create(names[0], num_classes).default_split


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
    main = learner.method.main_output
    if main not in outputs:
        raise ConfigError(
            f"--method {config.method}: its main_output {main!r} is none of the outputs of predict(), "
            f"{', '.join(outputs)}"
        )


def absolute(path: Any) -> Any:
    """Return a path, or a list of paths, independent of the working folder; None stays None."""
    if isinstance(path, list):
        return [absolute(part) for part in path]
    return None if path is None else str(Path(path).expanduser().resolve())


def _join(values: Any) -> str:
    return ", ".join(map(str, values))
