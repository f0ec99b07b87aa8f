"""What a method and a task ask of a run before it starts: optimizer, networks, shared layers, refusals, joints."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from training_runs import SMALL, assert_same, flags, run, small, tensors

from fflfast import methods
from fflfast.cli import main
from fflfast.methods import DML, Method
from fflfast.training import ConfigError, TrainConfig, resolve, train
from fflfast.training.arguments import parse_arguments
from fflfast.training.build import build_learner
from fflfast.training.config import ResolvedConfig
from fflfast.training.networks import default_trunk
from fflfast.training.recipes import DATA_RECIPES, DEFAULTS, complete

BASE = {key: SMALL[key] for key in ("data", "image_size", "pad", "arch")}


class Adam(DML):
    recipe: ClassVar = {
        **{key: value for key, value in DML.recipe.items() if key not in ("momentum", "nesterov")},
        "optimizer": "adam",
        "lr": 1e-3,
    }


class Stages(DML):
    needs_stages = True
    shared_stages = 1


class Picky(DML):
    @classmethod
    def refusal(cls, settings):
        return f"knows no seed above 3, got {settings['seed']}" if settings["seed"] > 3 else None


class Wide(DML):
    @classmethod
    def architectures(cls, names):
        return [name if "@" in name or k == 0 else f"{name}@1/{k + 1}" for k, name in enumerate(names)]


def name_of(method: type[Method]) -> str:
    return f"{method.__module__}:{method.__name__}"


def resolved(method="dml", **changes):
    name = method if isinstance(method, str) else name_of(method)
    return resolve(TrainConfig(**{**BASE, "method": name, **changes})).config


def test_a_recipe_of_adam_needs_no_momentum():
    config = resolved(Adam)
    assert (config.optimizer, config.lr, config.momentum, config.nesterov) == ("adam", 1e-3, 0.0, False)
    again = resolve(TrainConfig(**{**config.to_dict(), "out": None, "resume": None})).config
    assert again.to_dict() == config.to_dict()


def test_the_learning_rate_of_a_data_set_is_for_sgd():
    for method, lr in ((DML, 0.1), (Adam, 1e-3)):
        config = resolve(TrainConfig(data="digits", arch=["tiny", "tiny"], method=name_of(method))).config
        assert (config.lr, config.epochs, config.schedule) == (lr, 30, "cosine")


def test_the_ramp_up_of_a_data_set_is_for_methods_that_have_one(monkeypatch):
    monkeypatch.setitem(DATA_RECIPES, "synthetic", {"epochs": 100, "milestones": (30,), "ramp_up_epochs": 40.0})
    ramps = [resolved(method, epochs=50).options["ramp_up_epochs"] for method in ("ffl", "dml")]
    assert ramps == [20.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "--optimizer adam: the recipe's learning rate is for sgd; give --lr too"),
        ({"optimizer": "adam", "lr": 0.01, "nesterov": True}, "--momentum and --nesterov belong to --optimizer sgd"),
        ({"optimizer": "adam", "lr": 0.01, "momentum": 0.9}, "--momentum and --nesterov belong to --optimizer sgd"),
        ({"optimizer": "lion"}, "--optimizer: expected one of 'sgd', 'adam', got lion"),
        ({"rotation": 30.0}, "--rotation is for pose, and synthetic for classification; leave it away"),
        ({"scale": 0.2}, "--scale is for pose"),
        ({"scale": 0.9}, "--scale: expected a number from 0 .off. to 0.75, got 0.9"),
        ({"flip_test": False}, "--flip-test is for pose, and synthetic for classification; leave it away"),
        ({"method": ":X"}, "expected one of .* got ':X'"),
        ({"method": "MCL-OKD"}, "did you mean 'mcl_okd'"),
        ({"rotation": 181}, "--rotation: expected degrees from 0 .off. to 180, got 181"),
        ({"task": "pose"}, "--task pose: the data set synthetic is for classification"),
        ({"task": "poses", "method": "ffl"}, "--task: expected one of classification, pose, got 'poses'"),
        (
            {"method": "okdhp"},
            "--method okdhp: is for pose, and the data set synthetic for classification; take --method",
        ),
        ({"method": name_of(Picky), "seed": 4}, "--method .*:Picky: knows no seed above 3, got 4"),
        ({"arch": ["tiny", "tini"], "method": "one"}, "--arch: no network is called 'tini'; did you mean tiny"),
        ({"arch": ["tiny@x", "tiny"], "method": "one"}, "--arch: 'tiny@x': the width behind @ must be a fraction"),
        ({"teacher": "torchvision/resnet18"}, "--teacher: no frozen network teaches in --method dml"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        resolved(**changes)


def test_adam_may_be_asked_for():
    config = resolved(optimizer="adam", lr=0.01)
    assert (config.optimizer, config.momentum, config.nesterov) == ("adam", 0.0, False)
    assert (resolved().optimizer, resolved().momentum) == ("sgd", 0.9)


def test_a_method_may_choose_the_networks():
    config = resolved(Wide)
    assert config.arch == ["tiny", "tiny@1/2"]
    again = resolve(TrainConfig(**{**config.to_dict(), "out": None, "resume": None})).config
    assert again.arch == config.arch
    learner = build_learner(config, 10)
    assert [net.arch for net in learner.cohort.sub_networks] == config.arch


def test_a_run_of_chosen_networks_goes_on_as_it_was_asked_for(tmp_path):
    method = name_of(Wide)
    whole = run(tmp_path / "whole", method=method, epochs=2)
    folder = tmp_path / "run"
    train(small(folder, method=method, epochs=2), quiet=True)
    (folder / "previous.safetensors").replace(folder / "last.safetensors")
    train(TrainConfig.from_dict({"resume": str(folder), "arch": SMALL["arch"]}), quiet=True)
    assert_same(tensors(folder), whole)


@pytest.mark.parametrize(
    ("method", "arch", "expected"),
    [
        ("ffl", ["tiny", "tiny"], "layer3"),
        ("dml", ["tiny", "tiny"], "none"),
        ("ffl", ["tiny"], "none"),
        ("ffl", ["torchvision/resnet18"] * 2, "none"),
        ("ffl", ["tiny", "resnet8"], "none"),
        ("ffl", ["resnet8", "resnet14"], "none"),
        ("oem", ["resnet8", "resnet8@3/4", "resnet8@1/2"], "layer1"),
        ("oem", ["resnet8", "resnet14"], "layer1"),
        ("okdhp", ["hourglass4@1/32", "hourglass2@1/32"], "stack1"),
    ],
    ids=["equal", "apart", "one", "of a library", "unlike", "of unlike depth", "widths", "stem", "stacks"],
)
def test_what_is_shared_by_default(method, arch, expected):
    assert default_trunk(arch, methods.resolve(method), 10, 32) == expected


def test_widths_share_their_stem():
    learner = build_learner(resolved("oem", arch=["tiny", "tiny"]), 10)
    assert sorted(name for name, _ in learner.cohort.trunk.named_children()) == ["bn1", "conv1"]


@pytest.mark.parametrize(
    ("arch", "trunk", "words"),
    [
        (["tiny", "resnet8"], "layer1", "--trunk layer1: .* those of tiny and resnet8 before layer1 are not the same"),
        (["tiny"], "layer3", "--trunk layer3: two or more networks share a trunk, got tiny"),
    ],
    ids=["unlike", "one"],
)
def test_trunks_that_cannot_be_shared(arch, trunk, words):
    config = resolved("single" if len(arch) == 1 else "dml", arch=arch, trunk=trunk)
    with pytest.raises(ConfigError, match=words):
        build_learner(config, 10)


def test_inner_feature_maps_are_returned_where_they_are_needed():
    learner = build_learner(resolved(Stages), 10)
    assert learner.cohort.trunk is not None
    output = learner.cohort(torch.zeros(2, 3, 8, 8))
    assert [len(stages) for stages in output.stages] == [2, 2]
    with pytest.raises(ConfigError, match="learns from inner feature maps, which torchvision/resnet18 does not return"):
        build_learner(resolved(Stages, arch=["torchvision/resnet18"] * 2, image_size=32, pad=0), 10)


def test_a_network_of_another_task(tmp_path, capsys):
    config = small(tmp_path / "out", arch=["hourglass2@1/32"] * 2)
    assert main(["train", *flags(config)]) == 2
    assert "--arch hourglass2@1/32: is for pose, and --method ffl for classification" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_earlier_version_did_as_the_defaults_say():
    config = resolved()
    new = ("task", "teacher", "optimizer", "rotation", "scale", "flip_test")
    old = {key: value for key, value in config.to_dict().items() if key not in new}
    assert complete(old) == config.to_dict()
    assert DEFAULTS["optimizer"] == "sgd"
    assert ResolvedConfig(**complete(old)).hash() == config.hash()


def test_the_hash_tells_teachers_apart():
    config = resolved()
    assert dataclasses.replace(config, teacher="/other").hash() != config.hash()


class Short(DML):
    """A graph of more logits than there are."""

    def __init__(self, cohort, num_classes, options=None):
        super().__init__(cohort, num_classes, options)
        self.graph = methods.DML(cohort, num_classes).graph.dml(len(cohort) + 1)


def test_a_method_of_ones_own_is_tried_before_anything_is_written(tmp_path):
    config = small(tmp_path / "run", method=name_of(Short))
    with pytest.raises(ConfigError, match=r"--method .*:Short: .*the graph has 3 logits tensors"):
        train(config, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "arch", "words"),
    [
        ("okddip", ["tiny"] * 2, "needs at least 3 sub-networks, got 2; give more of them"),
        ("single", ["tiny"] * 2, r"takes at most 1 sub-network\(s\), got 2; give fewer"),
    ],
)
def test_too_few_and_too_many_networks(method, arch, words):
    with pytest.raises(ConfigError, match=f"--method {method}: .*{words}"):
        build_learner(resolved(method, arch=arch), 4)


@pytest.mark.parametrize(("text", "said"), [("raise KeyError(3)", "KeyError: 3"), ("def", "SyntaxError")])
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, text, said):
    name = f"broken_{said[:3].lower()}"
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"cannot import '{name}:X': .*{said}"):
        methods.resolve(f"{name}:X")


def test_flags_go_over_the_weights_that_alpha_set(tmp_path):
    file = tmp_path / "config.yaml"
    written = resolve(TrainConfig(**BASE, method="dml")).config
    options = dataclasses.asdict(methods.KD.Options(alpha=0.5))
    file.write_text(
        dataclasses.replace(written, method="kd", arch=["tiny"], options=options, teacher="t").to_yaml(),
        encoding="utf-8",
    )
    again = parse_arguments(["--config", str(file), "--options.alpha", "0.7"])
    assert methods.KD.Options(**again.options) == methods.KD.Options(kl_weight=0.7, ce_weight=1 - 0.7)
    with pytest.raises(ConfigError, match=r"unknown key 'options.alpha'.*; a file holds the options of its own"):
        parse_arguments(["--config", str(file), "--method", "dml"])
    with pytest.raises(ConfigError, match=r"unknown flag --options.kl-weigth, did you mean --options.kl-weight\?"):
        parse_arguments(["--config", str(file), "--options.kl_weigth", "1"])


@pytest.mark.parametrize("way", [["--data", "lspet"], ["--task", "pose"]])
def test_options_of_the_method_that_the_data_ask_for(way):
    assert parse_arguments([*way, "--options.fau", "figure"]).options == {"fau": "figure"}


def test_filling_in_settings_draws_no_random_numbers():
    before = torch.get_rng_state()
    resolved("ffl")
    assert torch.equal(before, torch.get_rng_state())
