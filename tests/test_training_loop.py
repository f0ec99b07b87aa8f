"""What a run computes and records, against the same written out by hand."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from steps import Reads
from training_runs import SMALL, STEPS, Noisy, assert_same, run, small, tensors

from fflfast.data import Batch, Loader
from fflfast.ops.augment import augment, normalization_table, normalize
from fflfast.tasks import Classification, Score
from fflfast.training import TrainConfig, TrainingError, checkpoint, resolve, train
from fflfast.training.build import build_learner
from fflfast.training.feeding import task_for
from fflfast.training.log import Means
from fflfast.training.optimizer import build_optimizers
from fflfast.training.step import TrainStep


def _parts(**changes):
    config, data, _ = resolve(TrainConfig(**{**SMALL, **changes}))
    return config, data, build_learner(config, data.num_classes)


def test_two_epochs_are_what_plain_pytorch_computes(tmp_path):
    """FFL by hand: two SGD optimizers as the paper's code has them, one loss written with torch.nn.functional."""
    changes = {"epochs": 2, "lr": 0.02, "milestones": [1], "options": {"ramp_up_epochs": 2.0}}
    got = run(tmp_path / "run", **changes)
    config, data, learner = _parts(**changes)
    learner.train()
    fusion = {name: p for name, p in learner.named_parameters() if name.startswith("method.fusion.")}
    rest = [p for name, p in learner.named_parameters() if name not in fusion]
    shared = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "fused": False}
    optimizers = [
        torch.optim.SGD(rest, weight_decay=1e-4, **shared),
        torch.optim.SGD(fusion.values(), weight_decay=1e-5, **shared),
    ]
    table = normalization_table(data.mean, data.std)
    loader = Loader(data.train, batch_size=24, seed=0, train=True, limit=100)
    for epoch in range(2):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 if epoch < 1 else 0.002
        for batch in loader.epoch(epoch):
            images = augment(batch.images, batch.index, seed=0, epoch=epoch, pad=1, flip=config.flip, table=table)
            output = learner.cohort(images)
            fused = learner.method.fused_logits(output)
            z = [*output.logits, fused]

            def kl(teacher, student):
                p, log_q = F.softmax(teacher.detach() / 3, -1), F.log_softmax(student / 3, -1)
                return 9 * F.kl_div(log_q, p, reduction="batchmean")

            teaching = kl(fused, z[0]) + kl(fused, z[1]) + kl((z[0] + z[1]) / 2, fused)
            ramp = math.exp(-5 * (1 - epoch / 2) ** 2)
            loss = sum(F.cross_entropy(logits, batch.target) for logits in z) + ramp * teaching
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(got[f"learner/{name}"], value, rtol=1e-4, atol=1e-5)


def test_parameter_groups():
    config, _, learner = _parts(weight_decay=5e-4)
    (optimizer,) = build_optimizers(learner, config)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(learner.parameters()))
    for name, parameter in learner.named_parameters():
        assert decay[id(parameter)] == (1e-5 if name.startswith("method.fusion.") else 5e-4), name


def test_no_decay_on_norms_and_biases():
    config, _, learner = _parts(decay_norm_and_bias=False)
    (optimizer,) = build_optimizers(learner, config)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in learner.named_parameters():
        expected = 0.0 if parameter.ndim < 2 else 1e-5 if name.startswith("method.fusion.") else 1e-4
        assert decay[id(parameter)] == expected, name


def test_a_step_reads_nothing_from_the_device():
    """On a CPU the loss itself looks at its target; the trainer around it adds not one read."""
    config, data, learner = _parts()
    task = task_for(config, data)
    step = TrainStep(learner, task, normalization_table(data.mean, data.std), config, torch.device("cpu"))
    batch = next(Loader(data.train, batch_size=24, seed=0, train=True).epoch(0))
    images = normalize(batch.images, step.table)
    means, metric = Means(("loss", *learner.term_names)), task.metric()
    with Reads() as alone:
        learner(Batch(images, batch.target, batch.index), step.state).loss.backward()
    with Reads() as reads:
        step.set_schedule(learning_rate=0.1, kl_weight=0.5)
        output = step(batch, epoch=0, step=0)
        means.update(output, 24)
        metric.update(output.logits, batch.target)
    assert reads.count == alone.count
    with Reads() as counter:
        means.read()
    assert counter.count <= len(means.names)


def test_the_record_of_a_run(tmp_path):
    folder = tmp_path / "run"
    result = train(small(folder, log_every=2), quiet=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = [r for r in records if r["kind"] == "train"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [(r["epoch"], r["step"]) for r in parts] == [(e, STEPS * e + s) for e in range(3) for s in (2, 4, 5)]
    terms = ["ce/sub0", "ce/sub1", "ce/fused", "kl/fused→sub0", "kl/fused→sub1", "kl/ensemble→fused"]
    for record in epochs:
        own = [r for r in parts if r["epoch"] == record["epoch"]]
        for name in ("loss", *terms):
            # means over images: intervals of 48, 48 and 4 images
            assert record[name] == pytest.approx(sum(n * r[name] for n, r in zip((48, 48, 4), own, strict=True)) / 100)
        total = sum(record[t] for t in terms[:3]) + record["kl_weight"] * sum(record[t] for t in terms[3:])
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert [r["test_accuracy/fused"] for r in epochs][-1] == result.scores["fused"].value
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == [
        {k: float(v) for k, v in r.items() if k != "kind"} for r in epochs
    ]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["scores"]["fused"]["correct"] == result.scores["fused"].correct
    assert summary["best"]["accuracy"] == max(r["test_accuracy/fused"] for r in epochs)


def test_best_holds_the_weights_of_the_best_epoch(tmp_path):
    run(tmp_path / "run")
    info = checkpoint.read(tmp_path / "run" / checkpoint.BEST).info
    epoch = info["position"]["best_epoch"]
    shorter = train(small(tmp_path / "shorter", epochs=3), quiet=True)
    records = [json.loads(s) for s in (shorter.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracy = [r["test_accuracy/fused"] for r in records if r["kind"] == "epoch"]
    assert accuracy.index(max(accuracy)) == epoch
    assert not any(name.startswith("optimizer/") for name in tensors(tmp_path / "run", checkpoint.BEST))


def test_the_baseline_is_that_network_trained_alone(tmp_path):
    run(tmp_path / "run", arch=["tiny", "resnet8"], baseline=True)
    for arch in ("tiny", "resnet8"):
        alone = run(tmp_path / arch, arch=[arch], method="single")
        assert_same(tensors(tmp_path / "run" / f"baseline-{arch}"), alone)


@pytest.mark.parametrize("checkpoint_every", [0, 1])
def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path, checkpoint_every):
    with pytest.raises(TrainingError, match=r"not finite.*smaller --lr.*last good checkpoint is .*last\.safetensors"):
        train(small(tmp_path / "run", lr=1e30, checkpoint_every=checkpoint_every), quiet=True)
    snapshot, path, warnings = checkpoint.load_latest(tmp_path / "run")
    assert path.name == checkpoint.LAST
    assert warnings == []
    assert all(bool(t.isfinite().all()) for t in snapshot.tensors.values() if t.is_floating_point())


def test_a_weight_that_is_not_a_number_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    """A running variance that overflowed shows in no training loss."""
    take_step = TrainStep.__call__

    def spoil(self, inputs, *, epoch, step, **others):
        output = take_step(self, inputs, epoch=epoch, step=step, **others)
        if epoch == 1 and step == 3:
            self.learner.get_buffer("method.fusion.depthwise_norm.running_var").fill_(math.nan)
        return output

    monkeypatch.setattr(TrainStep, "__call__", spoil)
    with pytest.raises(TrainingError, match=r"1 weights are not finite.*depthwise_norm\.running_var"):
        train(small(tmp_path / "run"), quiet=True)
    assert checkpoint.load_latest(tmp_path / "run")[0].info["position"]["epoch"] == 1


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    train(small(tmp_path / "run", limit_train=25, epochs=1), quiet=True)
    records = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[-1]["step"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
        {"amp": "bf16", "channels_last": True},
        {"schedule": "cosine", "warmup_epochs": 0.5, "decay_norm_and_bias": False},
        {"method": "dml", "arch": ["tiny", "resnet8", "tiny"]},
        {"method": "ffl", "arch": ["tiny", "resnet8"]},
        {"method": "single", "arch": ["tiny"], "deterministic": True},
        {"tensorboard": True, "workers": 2},
    ],
    ids=["mixing", "bf16", "cosine", "dml-of-three", "unlike", "single", "tensorboard"],
)
def test_options_train(tmp_path, changes):
    got = run(tmp_path / "run", epochs=1, **changes)
    assert all(bool(t.isfinite().all()) for t in got.values() if t.is_floating_point())
    assert (tmp_path / "run" / "tensorboard").exists() == changes.get("tensorboard", False)


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_is_the_runs_own_choice(tmp_path, monkeypatch, before):
    seen = []
    take_step = TrainStep.__call__

    def look(self, *arguments, **options):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return take_step(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "__call__", look)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        run(tmp_path / "run", epochs=1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.backends.cudnn.benchmark == before
    assert set(seen) == {(True, False)}


@pytest.mark.parametrize(("limit", "images"), [(25, 24), (100, 100), (10**6, 1024)], ids=["tail", "all", "beyond"])
def test_the_speed_counts_the_images_that_were_trained(tmp_path, limit, images):
    folder = tmp_path / "run"
    train(small(folder, limit_train=limit, epochs=1), quiet=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["images_per_second"] * summary["seconds"] == pytest.approx(images)


@pytest.mark.parametrize(("method", "parts"), [("ffl", 3), ("pcl", 6)])
def test_compile_is_asked_of_each_part_and_changes_no_name(tmp_path, monkeypatch, method, parts):
    """Of each network that a method holds besides, too."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    plain = run(tmp_path / "plain", method=method)
    assert_same(run(tmp_path / "compiled", method=method, compile=True), plain)
    assert len(compiled) == parts


def test_a_method_by_import_path(tmp_path):
    result = train(small(tmp_path / "run", method="training_runs:Noisy"), quiet=True)
    assert list(result.scores) == ["sub0", "sub1", "ensemble", "fused"]
    assert Noisy.recipe["epochs"] == 300


def test_it_learns(tmp_path):
    result = train(TrainConfig(data="digits", arch=["tiny", "tiny"], epochs=8, out=str(tmp_path / "run")), quiet=True)
    assert result.scores["fused"].value > 0.85


def test_accuracy_counts_and_never_counts_a_row_of_nan():
    metric = Classification(3).metric()
    good = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    broken = torch.tensor([[math.nan] * 3, [0.0, 1.0, math.nan]])
    metric.update({"good": good, "broken": broken}, torch.tensor([0, 2]))
    metric.update({"good": good, "broken": broken}, torch.tensor([0, 0]))
    assert metric.read() == {"good": Score(3, 4), "broken": Score(0, 4)}


def test_accuracy_of_nothing():
    assert Classification(3).metric().read() == {}
    assert Score(0, 0).value == 0.0
    assert str(Score(1, 3)) == "33.33"


def test_metric_and_means_go_on_where_they_were():
    metric, means = Classification(3).metric(), Means(("loss", "ce/sub0"))
    cpu = torch.device("cpu")
    for target in (torch.tensor([0, 1]), torch.tensor([2, 2])):
        other_metric, other_means = Classification(3).metric(), Means(means.names)
        other_metric.load(json.loads(json.dumps(metric.state())), cpu)
        other_means.load(json.loads(json.dumps(means.state())), cpu)
        output = type("Output", (), {"loss": torch.tensor(1 / 3), "terms": torch.tensor([0.1])})
        for each_metric, each_means in ((metric, means), (other_metric, other_means)):
            each_metric.update({"sub0": torch.eye(3)[target]}, target)
            each_means.update(output, 2)
        assert other_metric.read() == metric.read()
        assert other_means.peek() == means.peek()
