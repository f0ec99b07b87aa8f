"""Settings: three ways to give them, where the rest comes from, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from training_runs import assert_same, flags, run, small, tensors

from fflfast import models
from fflfast.cli import main
from fflfast.methods import DML, FFL, FFLOptions
from fflfast.training import ConfigError, TrainConfig, resolve, train
from fflfast.training.arguments import parse_arguments
from fflfast.training.recipes import DATA_RECIPES, merge_recipes

GIVEN = {
    "data": "digits",
    "arch": ["tiny", "resnet8"],
    "method": "dml",
    "options": {"temperature": 2.0},
    "epochs": 7,
    "lr": 1e-3,
    "milestones": [2, 5],
    "schedule": "multistep",
    "flip": True,
    "baseline": True,
    "limit_train": 40,
}
FLAGS = ["--data", "digits", "--arch", "tiny", "--arch=resnet8", "--method", "dml", "--options.temperature", "2"]
FLAGS += ["--epochs", "7", "--lr", "1e-3", "--flip", "--milestones", "2,5", "--schedule", "multistep", "--baseline"]
FLAGS += ["--limit-train", "40"]


def test_flags_yaml_and_python_give_the_same_config(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(GIVEN), encoding="utf-8")
    by_python = resolve(TrainConfig(**GIVEN)).config
    assert resolve(parse_arguments(FLAGS)).config == by_python
    assert resolve(parse_arguments(["--config", str(file)])).config == by_python
    assert resolve(TrainConfig.from_dict(GIVEN)).config == by_python


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lr", "0.5"], 0.5),
        (["--config", "FILE"], 0.25),
        (["--config", "FILE", "--lr", "0.5"], 0.5),
        (["--lr", "0.5", "--config", "FILE"], 0.25),
        ([], 0.1),
    ],
    ids=["flag", "yaml", "flag-after-yaml", "yaml-after-flag", "recipe"],
)
def test_precedence(tmp_path, arguments, expected):
    (tmp_path / "c.yaml").write_text("lr: 0.25\n", encoding="utf-8")
    arguments = [str(tmp_path / "c.yaml") if part == "FILE" else part for part in arguments]
    config = parse_arguments(["--data", "digits", "--arch", "tiny", "--arch", "tiny", *arguments])
    assert resolve(config).config.lr == expected


def test_flags_replace_a_list_of_the_yaml_file(tmp_path):
    (tmp_path / "c.yaml").write_text("arch: [resnet8, resnet8, resnet8]\n", encoding="utf-8")
    assert parse_arguments(["--config", str(tmp_path / "c.yaml"), "--arch", "tiny"]).arch == ["tiny"]


def test_the_written_config_repeats_the_run(tmp_path):
    first = run(tmp_path / "first", options={"temperature": 2}, lr=0.05)
    written = str(tmp_path / "first" / "config.yaml")
    assert main(["train", "--config", written, "--out", str(tmp_path / "second")]) == 0
    assert_same(tensors(tmp_path / "second"), first)
    assert (tmp_path / "second" / "config.yaml").read_bytes() == (tmp_path / "first" / "config.yaml").read_bytes()


def test_options_as_the_methods_own_dataclass():
    options = FFLOptions(temperature=5, ramp_up_epochs=3)
    config = resolve(TrainConfig(data="digits", arch=["tiny", "tiny"], options=options)).config
    assert config.options == dataclasses.asdict(options)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_trains_as_the_paper(data):
    recipe, reference = merge_recipes(FFL.recipe, data)
    expected = {"epochs": 300, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    expected |= {"schedule": "multistep", "milestones": (150, 225), "gamma": 0.1, "decay_norm_and_bias": True}
    assert recipe.items() >= expected.items()
    assert reference == 300


def test_every_data_set_with_its_milestones_has_their_epochs():
    for name, recipe in DATA_RECIPES.items():
        assert "milestones" not in recipe or "epochs" in recipe, name


def _resolved(**changes):
    config = {"data": "synthetic", "arch": ["tiny", "tiny"], "image_size": 8, "pad": 1, **changes}
    return resolve(TrainConfig(**config))


def test_a_shorter_run_scales_the_schedule_and_says_so():
    config, _, notes = _resolved(epochs=30)
    assert config.milestones == [15, 22]
    assert config.options["ramp_up_epochs"] == pytest.approx(8)
    scaled = "milestones 150, 225 → 15, 22, ramp-up 80 → 8"
    assert notes == [f"30 epochs where ffl's recipe has 300, so in proportion: {scaled}"]


@pytest.mark.parametrize("epochs", [1, 48])
def test_a_recipes_warm_up_scales_with_the_run(epochs):
    config, _, notes = resolve(TrainConfig(data="digits", arch=["tiny", "tiny"], epochs=epochs))
    recipe = DATA_RECIPES["digits"]
    assert config.warmup_epochs == pytest.approx(recipe["warmup_epochs"] * epochs / recipe["epochs"])
    assert notes[-1].startswith("warm-up 1 → ")


def test_what_is_given_is_not_scaled():
    config, _, notes = _resolved(epochs=30, milestones=[20], options={"ramp_up_epochs": 5})
    assert config.milestones == [20]
    assert config.options["ramp_up_epochs"] == 5
    assert notes == []


def test_the_full_recipe_is_not_scaled():
    config, _, notes = _resolved(epochs=300)
    assert config.milestones == [150, 225]
    assert notes == []


@pytest.mark.parametrize(
    ("arch", "trunk", "expected"),
    [
        (["tiny", "tiny"], None, models.create("tiny", 2).default_split),
        (["tiny", "resnet8"], None, "none"),
        (["tiny", "tiny"], "none", "none"),
        (["tiny", "tiny"], "layer2", "layer2"),
    ],
    ids=["alike", "unlike", "off", "named"],
)
def test_trunk(arch, trunk, expected):
    assert _resolved(arch=arch, trunk=trunk).config.trunk == expected


def test_the_hash_names_what_is_computed():
    base = _resolved().config
    assert dataclasses.replace(base, workers=4, out="x", log_every=7).hash() == base.hash()
    for change in ({"seed": 1}, {"lr": 0.2}, {"options": {**base.options, "temperature": 4.0}}):
        assert dataclasses.replace(base, **change).hash() != base.hash()


def test_paths_and_numbers_of_other_types(tmp_path):
    given = {
        "epochs": np.int64(7),
        "lr": np.float32(0.5),
        "arch": ("tiny", "tiny"),
        "options": {"temperature": np.int64(2)},
    }
    config = resolve(TrainConfig(data="digits", out=tmp_path / "run", init=None, **given)).config
    assert (config.epochs, config.lr, config.options["temperature"]) == (7, 0.5, 2.0)
    assert {type(value) for value in (config.epochs, config.lr, config.out)} == {int, float, str}
    missing = TrainConfig(data="cifar10", data_dir=tmp_path / "none", arch=["tiny", "tiny"])
    with pytest.raises(ConfigError, match="none, which is not a folder"):
        resolve(missing)


def test_a_recipe_may_leave_the_epochs_to_the_flags(tmp_path, monkeypatch):
    recipe = {key: value for key, value in DML.recipe.items() if key != "epochs"}
    monkeypatch.setattr(DML, "recipe", recipe)
    config, _, notes = _resolved(method="dml", epochs=200)
    assert (config.milestones, notes) == ([150, 225], [])


def test_one_image_is_not_enough_to_train(monkeypatch):
    from fflfast.training import build

    def one(config):
        data = open_bundle(config)
        data.train.targets = data.train.targets[:1]
        data.train.images = data.train.images[:1]
        return data

    open_bundle = build.open_bundle
    monkeypatch.setattr(build, "open_bundle", one)
    with pytest.raises(ConfigError, match="--data synthetic: expected at least 2 images to train on, got 1"):
        _resolved()


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="--tensorboard needs: pip install tensorboard"):
        train(small(tmp_path / "run", tensorboard=True), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def half(self, text, **options):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ConfigError, match=r"cannot write there \(No space left"):
        train(small(tmp_path / "new" / "run"), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_of_weights_gave_is_told(tmp_path, capsys):
    torch.save(models.create("tiny", 3).state_dict(), tmp_path / "w.pt")
    train(small(tmp_path / "run", epochs=1, init=[tmp_path / "w.pt"] * 2))
    out = capsys.readouterr().out
    line = f"tiny: 54 tensors loaded from {tmp_path / 'w.pt'}; another class count, not loaded: fc.weight, fc.bias\n"
    assert out.count(line) == 2, out


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_weights_that_are_not_finite_start_nothing(tmp_path, number):
    weights = models.create("tiny", 10).state_dict()
    weights["conv1.weight"][0] = float(number)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"--init.*not finite in conv1\.weight"):
        train(small(tmp_path / "run", init=[str(tmp_path / "w.pt")] * 2), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["train", *flags(small(tmp_path / "run"))]) == 2
    assert "exists and is not an empty folder; choose another\n" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["train", *flags(small(tmp_path / "file" / "run"))]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_the_default_folder_is_a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train(dataclasses.replace(small(tmp_path), out=None, epochs=1), quiet=True).folder for _ in range(2)]
    assert [str(folder) for folder in folders] == ["runs/synthetic-ffl-tiny+tiny", "runs/synthetic-ffl-tiny+tiny-2"]


@pytest.mark.parametrize("processes", ["2", "x"])
def test_torchrun_is_refused_before_it_does_harm(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigError, match="torchrun"):
        train(small(tmp_path / "run"), quiet=True)
