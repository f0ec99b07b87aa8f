"""Training recipes per data set: what a run takes where neither flags nor YAML say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import RECIPE_FIELDS, ConfigError, TrainConfig, suggest

__all__ = ["DATA_RECIPES", "complete", "merge_recipes"]

DEFAULTS: Mapping[str, Any] = {
    "optimizer": "sgd",
    "decay_norm_and_bias": True,
    "schedule": "multistep",
    "gamma": 0.1,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rotation": 0.0,
    "scale": 0.0,
    "trunk": "auto",
}
"""What every recipe leaves alone unless it says so."""

DATA_RECIPES: Mapping[str, Mapping[str, Any]] = {
    # The method's own recipe (FFL: arXiv 1904.09058 and its published code) is made for CIFAR.
    "cifar10": {},
    "cifar100": {},
    # Ours: some 1,200 images of 8 × 8 pixels; two ResNet-20 and one alone take about a minute on two CPU cores. Weight
    # decays of 1e-4 and 5e-4 (two seeds each) did not differ clearly, so the method's own 1e-4 stays.
    "digits": {"epochs": 30, "batch_size": 64, "lr": 0.1, "schedule": "cosine", "warmup_epochs": 1.0},
    # Ours, a reduced budget: the method's recipe shortened, not tuned for the best accuracy.
    "fashion_mnist": {"epochs": 12},
    # The usual ImageNet recipe (arXiv 1512.03385, 90 epochs) as later papers run FFL's loss: 100 epochs, ×0.1 at 30, 60
    # and 90, ramp-up over 80.
    "imagefolder": {"epochs": 100, "batch_size": 256, "milestones": (30, 60, 90), "ramp_up_epochs": 80.0},
    # Ours: long enough to see that a set-up works and how fast it is.
    "synthetic": {"epochs": 2},
    "synthetic-imagenet": {"epochs": 2, "batch_size": 256},
}
"""By data set: values over the method's recipe; ``ramp_up_epochs`` stands for the method's option of that name. A rate
is one of SGD: the recipe of a method with another optimizer keeps its own."""


def merge_recipes(method_recipe: Mapping[str, Any], data: str) -> tuple[dict[str, Any], int | None]:
    """Return the values that a run starts from, and the number of epochs for which its milestones and ramp-up hold.

    None for a method that names no epochs. ConfigError where its recipe has a key that no run knows.
    """
    known = (*RECIPE_FIELDS, "ramp_up_epochs")
    for key in method_recipe:
        if key not in known:
            raise ConfigError(f"--method: its recipe has the unknown key {key!r}{suggest(str(key), known)}")
    data_recipe = dict(DATA_RECIPES.get(data, {}))
    if method_recipe.get("optimizer", "sgd") != "sgd":
        data_recipe.pop("lr", None)
    reference = data_recipe if "milestones" in data_recipe else method_recipe
    return {**DEFAULTS, **method_recipe, **data_recipe}, reference.get("epochs")


def complete(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a saved run; one of an earlier version did what the defaults of today say."""
    return {**TrainConfig().to_dict(), "task": "classification", **DEFAULTS, **saved}
