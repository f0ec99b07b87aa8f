"""The fusion module's norms synchronised across processes, against nn.BatchNorm2d on the whole batch in one process."""

from __future__ import annotations

import datetime
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_fuse_features import Composition, pair
from torch import nn

from fflfast.nn import FeatureFusion
from fflfast.ops.fusion_stages import combine_moments

SHAPES = [(5, 4, 6, 5), (5, 3, 6, 5)]
MODES = ("train", "frozen_depthwise", "cumulative")
# (mode, compiled, dtype)
RUNS = [
    *((mode, False, dtype) for mode in MODES for dtype in (torch.float32, torch.float64)),
    ("train", True, torch.float32),
    ("frozen_depthwise", True, torch.float32),
    ("train", True, torch.float64),
]


def modules(dtype):
    ours, plain, features = pair(SHAPES, torch.float32)
    return ours.to(dtype), plain.to(dtype), [f.to(dtype) + 2 for f in features]


def loss_of(out, rows):
    return (out.double() * torch.arange(1, rows.stop + 1, dtype=torch.float64)[rows, None].sin()).square().sum()


def whole_batch(mode):
    """Truth in float64: outputs, gradients of feature maps and parameters, buffers."""
    _, plain, features = modules(torch.float64)
    set_mode(plain, mode)
    leaves = [f.requires_grad_() for f in features]
    out = plain(leaves)
    loss_of(out, slice(0, 5)).backward()
    return out.detach(), [f.grad for f in leaves], [p.grad for p in plain.parameters()], list(plain.buffers())


def set_mode(module, mode):
    if mode == "frozen_depthwise":
        module.depthwise_norm.eval()
    if mode == "cumulative":
        module.depthwise_norm.momentum = module.pointwise_norm.momentum = None


def worker(rank, folder, split, backend):
    os.environ["FFLFAST_BACKEND"] = backend
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    rows = slice(0, split) if rank == 0 else slice(split, 5)
    for mode, compiled, dtype in RUNS:
        torch.save(one_step(mode, compiled, dtype, rows), f"{folder}/{mode}-{compiled}-{dtype}-{rank}")
    leave()


def leave():
    """End this process once both are done, without the interpreter's teardown under gloo's threads, which may abort."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)


def ddp_worker(rank, folder):
    """DistributedDataParallel on the CPU, which refuses nn.SyncBatchNorm; and an evaluation on one process alone."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    torch.manual_seed(0)
    ours = FeatureFusion([4, 3], 6, 7, sync_batch_norm=True).double()
    features = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    rows = slice(0, 2) if rank == 0 else slice(2, 5)
    parallel = nn.parallel.DistributedDataParallel(ours)
    loss_of(parallel([f[rows] for f in features]), rows).backward()
    torch.save([p.grad * 2 for p in ours.parameters()], f"{folder}/gradients-{rank}")  # DDP took the mean
    if rank == 0:
        for name in ("depthwise_norm", "pointwise_norm"):
            width = getattr(ours, name).num_features
            setattr(ours, name, nn.SyncBatchNorm(width, track_running_stats=False).double())
        ours.eval()(features)  # its norms take the statistics of this batch: nobody else is asked
    leave()


def one_step(mode, compiled, dtype, rows):
    ours, _, features = modules(dtype)
    set_mode(ours, mode)
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert isinstance(ours.depthwise_norm, nn.SyncBatchNorm)
    torch._dynamo.reset()
    run = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    leaves = [f[rows].clone().requires_grad_() for f in features]
    out = run(leaves)
    loss_of(out, rows).backward()
    return (
        out.detach(), [f.grad for f in leaves], [p.grad for p in ours.parameters()], [b.clone() for b in ours.buffers()]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "split"), [("auto", 3), ("auto", 5), ("reference", 4)], ids=["uneven", "empty", "reference_one_sample"]
)
def test_two_processes_equal_one(tmp_path, backend, split):
    mp.spawn(worker, (str(tmp_path), split, backend), nprocs=2)
    truth = {mode: whole_batch(mode) for mode in MODES}
    for mode, compiled, dtype in RUNS:
        out, maps, parameters, buffers = truth[mode]
        both = [torch.load(tmp_path / f"{mode}-{compiled}-{dtype}-{rank}") for rank in range(2)]
        near = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}

        def same(got, expected, near=near):
            torch.testing.assert_close(got.double(), expected.double(), **near)

        same(torch.cat([b[0] for b in both]), out)
        for k, expected in enumerate(maps):
            same(torch.cat([b[1][k] for b in both]), expected)
        for k, expected in enumerate(parameters):  # each process has its share, as DDP expects it
            same(both[0][2][k] + both[1][2][k], expected)
        for got in zip(both[0][3], both[1][3], strict=True):
            assert torch.equal(*got)
        for got, expected in zip(both[0][3], buffers, strict=True):
            same(got, expected)


def test_under_distributed_data_parallel_on_the_cpu(tmp_path):
    mp.spawn(ddp_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    plain = Composition([4, 3], 6, 7).double()
    torch.manual_seed(0)
    plain.load_state_dict(FeatureFusion([4, 3], 6, 7).double().state_dict())
    features = [torch.randn(s, dtype=torch.float64) for s in SHAPES]
    loss_of(plain(features), slice(0, 5)).backward()
    for rank in range(2):
        for got, p in zip(torch.load(tmp_path / f"gradients-{rank}"), plain.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-9, atol=1e-10)


def test_a_group_of_one_and_no_group_at_all():
    """A converted module works where nothing is initialised, as nn.SyncBatchNorm does."""
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(FeatureFusion([3, 2], 4, 5))
    plain = Composition([3, 2], 4, 5)
    plain.load_state_dict(ours.state_dict())
    features = [torch.randn(2, c, 4, 4) for c in (3, 2)]
    torch.testing.assert_close(ours(features), plain(features))
    with pytest.raises(ValueError, match="more than 1 value"):
        ours([f[:1, :, :1, :1] for f in features])


def test_moments_combine_without_cancellation(monkeypatch):
    """Chan's formula on a mean of a thousand and a deviation of a thousandth, with a process that has no values."""
    values = [torch.randn(2, 40, dtype=torch.float64) * 1e-3 + 1e3 + k * 1e-3 for k in range(2)]
    parts = [(torch.stack([v.mean(1), (v - v.mean(1, True)).square().sum(1)]), torch.tensor(40.0)) for v in values]
    parts.append((torch.zeros(2, 2, dtype=torch.float64), torch.tensor(0.0)))
    rows = [torch.cat([m.flatten(), c.double().view(1)]) for m, c in parts]
    monkeypatch.setattr("fflfast.ops.fusion_stages._group", lambda name: None)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(dist, "all_gather", lambda out, mine, group: out.__setitem__(slice(None), rows))
    moments, count = combine_moments(*parts[0], "some")
    whole = torch.cat(values, 1)
    assert count == 80
    torch.testing.assert_close(moments[0], whole.mean(1), rtol=1e-15, atol=0)
    torch.testing.assert_close(moments[1] / 80, whole.var(1, correction=0), rtol=1e-6, atol=0)
