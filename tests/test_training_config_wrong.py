"""Wrong settings: one line that names the remedy, exit code 2 and nothing on the disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from training_runs import flags, small

from fflfast.cli import main
from fflfast.methods import DML
from fflfast.training import ConfigError, TrainConfig, resolve

WRONG = {
    "no data": ("--arch tiny", ["--data", "try --data digits"]),
    "no arch": ("--data digits", ["--arch", "try --arch"]),
    "unknown flag": ("BASE --epcohs 3", ["--epcohs", "did you mean --epochs?"]),
    "unknown option": ("BASE --options.temprature 3", ["--options.temprature", "--options.temperature?"]),
    "option of another method": ("BASE --method dml --options.fusion-channels 3", ["--options.fusion-channels"]),
    "unknown data": (
        "--data cifar101 --arch tiny --arch tiny",
        ["--data: expected one of", "cifar101", "did you mean 'cifar10"],
    ),
    "unknown arch": ("--data digits --arch resnet2O", ["resnet2O", "did you mean"]),
    "unknown method": ("BASE --method fll", ["--method: expected one of", "did you mean 'ffl'?"]),
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
    "a device of no use": ("BASE --device meta", ["--device meta", "cuda:N", "--device cpu"]),
    "strong mixup": ("BASE --mixup 101", ["--mixup: expected a number from 0 (off) to 100, got 101"]),
    "strong cutmix": ("BASE --cutmix 200", ["--cutmix: expected a number from 0"]),
    "endless": (f"BASE --epochs {10**400}", ["--epochs: expected at least 1, got 1000", "…"]),
    "endless seed": (f"BASE --seed {2**63}", ["--seed"]),
    "endless rate": (f"BASE --lr {10**400}", ["--lr: expected a number, got 1000"]),
    "long path": (f"BASE --out {'o' * 300}", ["--out", "name too long"]),
    "long run": (f"--resume {'o' * 300}", ["--resume", "name too long"]),
    "NUL in a path": ("BASE --out a\0b", ["--out: expected a name, got 'a\\x00b'"]),
    "NUL in a run": ("--resume a\0b", ["--resume: expected a name"]),
    "nothing for a trunk": ("BASE --trunk=", ["--trunk: expected a name, got ''"]),
    "nothing for data": ("--data= --arch tiny", ["--data: expected a name"]),
    "options as a word": ("BASE --options 3", ["--options: expected", "--options.temperature 3", 'got "3"']),
    "two hyphens": ("BASE --", ["unexpected argument '--'"]),
    "no milestones": ("BASE --milestones a", ["--milestones: expected a list of whole numbers, got ['a']"]),
    "data without a folder": ("--data cifar100 --arch tiny --arch tiny", ["--data: cifar100 needs", "--data-dir"]),
    "a folder for nothing": ("BASE --data-dir x", ["--data: digits reads no files; leave out --data-dir"]),
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
    assert main(["train", *command.split(" ")]) == 2
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
        ("options: 3\n", ["--options: expected the method's options", "got 3"]),
        ("method: null\n", ["--method: expected a value, got null"]),
        ("data: \udcff\n", ["--config", "UTF-8"]),
    ],
    ids=["unknown-key", "wrong-type", "unknown-option", "a-list", "no-yaml", "options", "null", "bytes"],
)
def test_wrong_yaml(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
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
        ({"options": [1]}, "--options: expected the method's options by name (--options.temperature 3), got [1]"),
        ({"options": DML.Options()}, "--options: expected FFLOptions of the method ffl, got DMLOptions"),
        ({"method": DML}, "--method: expected a method's name or an import path"),
        ({"method": None}, "--method: expected a value, got null"),
        ({"seed": None}, "--seed: expected a value, got null"),
        ({"device": 3.5}, "--device: expected a text, got 3.5"),
        ({"arch": [torch.nn.Sequential(), "tiny"]}, "--arch: expected names of networks, got a Sequential; a network"),
        ({"milestones": ["x" * 10_000]}, "--milestones: expected a list of whole numbers, got ['xxx"),
    ],
    ids=lambda value: "-".join(f"{k}-{type(v).__name__}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_python(given, words):
    with pytest.raises(ConfigError) as error:
        resolve(TrainConfig.from_dict({"data": "digits", "arch": ["tiny", "tiny"], **given}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


OWN = {
    "broken syntax": ("class Own(:", ["--method", "SyntaxError"]),
    "broken import": ("raise KeyError('oh')", ["--method", "KeyError: 'oh'"]),
    "broken init": ("class Own(FFL):\n  def __init__(self, *a): raise KeyError('oh')", ["--method", "KeyError: 'oh'"]),
    "wrong output": ("class Own(DML):\n  main_output = 'fused'", ["main_output 'fused'", "sub0, sub1, ensemble"]),
    "short recipe": (
        "class Own(DML):\n  recipe = {'epochs': 10}",
        ["its recipe lacks lr, momentum,", "--lr, --momentum,"],
    ),
    "empty recipe": ("class Own(DML):\n  recipe = {}", ["its recipe lacks lr, momentum,"]),
    "mistyped recipe": ("class Own(DML):\n  recipe = {**DML.recipe, 'lrr': 1}", ["'lrr', did you mean lr?"]),
    "wrong recipe": ("class Own(DML):\n  recipe = {**DML.recipe, 'lr': 'x'}", ["--lr: expected a number, got x"]),
}


@pytest.mark.parametrize(("text", "words"), OWN.values(), ids=OWN)
def test_wrong_methods_of_ones_own(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own_method.py").write_text(f"from fflfast.methods import *\n{text}\n", encoding="utf-8")
    run_flags = flags(small(tmp_path / "run", epochs=None, method="own_method:Own"))
    assert main(["train", *run_flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert not (tmp_path / "run").exists()
