"""Pose on a real GPU: the same bytes as on a CPU, and no wait for the device."""

from __future__ import annotations

import pytest
import torch
from test_pose_task import TABLE, pose, sample, training, uint8_batch

from fflfast.data import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)


def on_cuda(batch):
    return Batch(*(part.to(CUDA) for part in batch))


def test_a_training_batch_has_the_bytes_of_a_cpus():
    batch = uint8_batch(64, 192)
    options = {"seed": 2, "rotation": 30.0, "scale": 0.25, "flip": True}
    task = pose(**options)
    task.prepare(CUDA)
    zero = torch.zeros((), dtype=torch.int64, device=CUDA)
    for epoch in range(4):
        want = training(pose(**options), batch, epoch=epoch)
        got = task.training_batch(
            on_cuda(batch), TABLE.to(CUDA), epoch=zero + epoch, step=zero, views=1, channels_last=True
        )
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_batches_and_counts_wait_for_nothing_and_can_be_captured():
    task = pose(rotation=30.0, scale=0.25, flip=True)
    task.prepare(CUDA)
    table, batch = TABLE.to(CUDA), on_cuda(uint8_batch())
    epoch, step = (torch.zeros((), dtype=torch.int64, device=CUDA) for _ in range(2))
    metric, maps = task.metric(("a",), CUDA), sample(10)[0].to(CUDA)

    def run():
        made = task.training_batch(batch, table, epoch=epoch, step=step, views=1, channels_last=True)
        metric.update({"a": maps}, made.target)
        return made

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    metric.reset()
    epoch.fill_(5)
    graph.replay()
    counted = metric.details()
    captured = [part.clone() for part in made]
    metric.reset()
    assert all(torch.equal(a, b) for a, b in zip(run(), captured, strict=True))
    assert metric.details() == counted
