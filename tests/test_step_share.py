"""`python -m benchmarks.step_share` puts the time of a step where it was spent."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

CPU = torch.device("cpu")
PAUSE = 0.05


@pytest.fixture
def tiny():
    share = module("step_share")
    return share, share.setup("nchw", "before", CPU, "tiny", 4, "off")


def pause(*_):
    time.sleep(PAUSE)


@pytest.mark.parametrize(
    "place", ["nowhere", "fusion forward", "fusion backward", "loss backward", "before the fusion"]
)
def test_time_is_counted_where_it_is_spent(tiny, monkeypatch, place):
    share, setup = tiny
    fusion = setup.step.learner.method.fusion
    setup.run()
    forward = fusion.forward

    def slow(features):
        if place == "fusion forward":
            pause()
        if place == "before the fusion":  # its backward is the sub-networks'
            features[0].register_hook(pause)
        logits = forward(features)
        if place == "fusion backward":
            logits.register_hook(pause)
        return logits

    monkeypatch.setattr(fusion, "forward", slow)
    loss = share.base.distill_loss

    def slow_loss(logits, *arguments, **options):
        output = loss(logits, *arguments, **options)
        if place == "loss backward":
            output.loss.register_hook(pause)
        return output

    monkeypatch.setattr(share.base, "distill_loss", slow_loss)
    found = share.profiled_step(setup)
    assert 0 < sum(found[part + way] for part in share.PARTS for way in (" forward", " backward")) < found["step"]
    slow_parts = {name for name, ms in found.items() if ms >= 1e3 * PAUSE and name != "step"}
    assert slow_parts == ({place} if place in found else set())


def test_every_node_between_inputs_and_outputs_counts_once():
    nodes = module("step_share").Nodes()
    weight = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True).exp()
    h = x * weight
    y = (h + h.sin()).sum()
    nodes.add("loss", [y], [x])
    assert {y.grad_fn._sequence_nr(), h.grad_fn._sequence_nr()} < nodes.of["loss"]
    assert len(nodes.of["loss"]) == 4  # mul, sin, add, sum: neither exp nor what accumulates
    assert x.grad_fn._sequence_nr() not in nodes.of["loss"]


def test_the_command(tmp_path, monkeypatch, capsys):
    share, report = module("step_share"), module("report")
    arguments = ["step_share", "--out", str(tmp_path), "--arch", "tiny", "--batch", "8", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert share.main() == 0
    rows = report.read(tmp_path / "step_share.csv")
    assert [(row["layout"], row["backend"], row["part"]) for row in rows] == [
        (layout, backend, part)
        for layout in ("channels_last", "nchw")
        for backend in ("before", "after")
        for part in share.PARTS
    ]
    for row in rows:
        assert 0 < float(row["share"]) < 1
        assert float(row["total_ms"]) == pytest.approx(float(row["forward_ms"]) + float(row["backward_ms"]), rel=1e-3)
    assert {row["fusion_backend"] for row in rows if row["backend"] == "before"} == {"reference"}
    assert (tmp_path / "step_share.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out
