"""Settings: three ways to give them, where the rest comes from, and what is said about wrong ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from runs import assert_same, flags, run, small, tensors

from fflfast import models
from fflfast.cli import main
from fflfast.methods import FFL, FFLOptions
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


WRONG = {
    "no data": ("--arch tiny", ["--data", "try --data digits"]),
    "no arch": ("--data digits", ["--arch", "try --arch"]),
    "unknown flag": ("BASE --epcohs 3", ["--epcohs", "did you mean --epochs?"]),
    "unknown option": ("BASE --options.temprature 3", ["--options.temprature", "--options.temperature?"]),
    "option of another method": ("BASE --method dml --options.fusion-channels 3", ["--options.fusion-channels"]),
    "unknown data": ("--data cifar101 --arch tiny --arch tiny", ["cifar101", "did you mean 'cifar10"]),
    "unknown arch": ("--data digits --arch resnet2O", ["resnet2O", "did you mean"]),
    "unknown method": ("BASE --method fll", ["--method", "did you mean 'ffl'?"]),
    "method that cannot be imported": ("BASE --method no.such:Thing", ["no.such:Thing"]),
    "method that is none": ("BASE --method pathlib:Path", ["pathlib:Path"]),
    "stray word": ("digits --arch tiny", ["'digits'", "--name value"]),
    "not a number": ("BASE --epochs many", ["--epochs: expected a whole number, got many"]),
    "half an epoch": ("BASE --epochs 2.5", ["--epochs: expected a whole number, got 2.5"]),
    "no epochs": ("BASE --epochs 0", ["--epochs: expected at least 1, got 0"]),
    "infinite rate": ("BASE --lr .inf", ["--lr: expected a finite number above 0, got inf"]),
    "no rate": ("BASE --lr 0", ["--lr"]),
    "batch of one": ("BASE --batch-size 1", ["--batch-size: expected at least 2"]),
    "not a choice": ("BASE --schedule linear", ["--schedule: expected one of 'multistep', 'cosine', got linear"]),
    "no value": ("BASE --lr", ["--lr: expected a value"]),
    "milestones fall": ("BASE --milestones 5,2", ["--milestones: expected rising epochs"]),
    "milestones of a cosine": ("BASE --milestones 2 --schedule cosine", ["--milestones", "--schedule multistep"]),
    "nesterov alone": ("BASE --momentum 0", ["--nesterov", "--momentum"]),
    "long warm-up": ("BASE --epochs 3 --warmup-epochs 3", ["--warmup-epochs: expected fewer than 3"]),
    "temperature 0": ("BASE --options.temperature 0", ["--options", "temperature must be greater than 0"]),
    "pad of the whole image": ("BASE --pad 8", ["--pad", "8"]),
    "no such device": ("BASE --device cuda:77", ["--device cuda:77", "--device cpu"]),
    "no device at all": ("BASE --device gpu", ["--device gpu", "--device cpu"]),
    "fp16 on a CPU": ("BASE --device cpu --amp fp16", ["--amp fp16"]),
    "no folder": ("--data cifar10 --data-dir no/such --arch tiny --arch tiny", ["no/such"]),
    "one network": ("--data digits --arch tiny", ["--method ffl", "at least 2"]),
    "two alone": ("BASE --method single", ["--method single", "at most 1"]),
    "baseline of single": ("--data digits --arch tiny --method single --baseline", ["--baseline"]),
    "no such split": ("BASE --trunk layer9", ["--trunk", "layer9"]),
    "trunk of unlike networks": ("--data digits --arch tiny --arch resnet8 --trunk layer3", ["--trunk layer3"]),
    "no such weights": ("BASE --init a.pt --init b.pt", ["--init", "a.pt"]),
    "weights for one of two": ("BASE --init a.pt", ["--init: expected one file for each --arch (2), got 1"]),
    "two starts": ("BASE --pretrained --init a.pt --init b.pt", ["--pretrained and --init"]),
    "nothing published": ("BASE --pretrained", ["--arch", "no published weights"]),
    "small images": ("--data digits --arch torchvision/alexnet --method single", ["alexnet", "8×8", "--image-size"]),
    "no config file": ("--config no.yaml", ["--config", "no.yaml"]),
    "no run": ("--resume no/run", ["--resume no/run"]),
    "resume without a folder": ("BASE --resume auto", ["--resume auto", "--out"]),
}


@pytest.mark.parametrize(("command", "words"), WRONG.values(), ids=WRONG)
def test_wrong_settings(tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    command = command.replace("BASE", "--data digits --arch tiny --arch tiny")
    assert main(["train", *command.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fflfast: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epcohs: 3\n", ["'epcohs'", "did you mean epochs?"]),
        ("epochs: many\n", ["--epochs: expected a whole number, got many"]),
        ("options: {temprature: 3}\n", ["temprature", "did you mean options.temperature?"]),
        ("- a\n- b\n", ["--config"]),
        ("epochs: [\n", ["--config"]),
    ],
    ids=["unknown-key", "wrong-type", "unknown-option", "a-list", "no-yaml"],
)
def test_wrong_yaml(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text, encoding="utf-8")
    assert main(["train", "--config", "c.yaml", "--data", "digits", "--arch", "tiny", "--arch", "tiny"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epcohs": 3}, "unknown key 'epcohs', did you mean epochs?"),
        ({"epochs": "many"}, "--epochs: expected a whole number, got many"),
        ({"arch": 3}, "--arch: expected a list of names, got 3"),
        ({"options": {"temprature": 3}}, "did you mean options.temperature?"),
    ],
    ids=["unknown-key", "wrong-type", "no-list", "unknown-option"],
)
def test_wrong_python(given, words):
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig.from_dict({"data": "digits", "arch": ["tiny", "tiny"], **given}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["train", *flags(small(tmp_path / "run"))]) == 2
    assert f"continue the run in it with --resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["train", *flags(small(tmp_path / "file" / "run"))]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_the_default_folder_is_a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train(dataclasses.replace(small(tmp_path), out=None, epochs=1), quiet=True).folder for _ in range(2)]
    assert [str(folder) for folder in folders] == ["runs/synthetic-ffl-tiny+tiny", "runs/synthetic-ffl-tiny+tiny-2"]


def test_torchrun_is_refused_before_it_does_harm(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        train(small(tmp_path / "run"), quiet=True)
