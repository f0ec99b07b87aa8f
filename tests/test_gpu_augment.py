"""Augmentation on a real GPU: the bytes of the reference on the CPU, counters on the device, capture, no waiting."""

from __future__ import annotations

import pytest
import torch
from test_augment import TABLE, random_images

from fflfast import use_backend
from fflfast.ops import augment_reference, backends
from fflfast.ops.augment import IMPLEMENTATIONS, augment, mix, normalize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda", 0)
SHAPES = [((64, 3, 32, 32), 4), ((7, 1, 8, 8), 1), ((5, 3, 5, 12), 4), ((9, 3, 224, 224), 0), ((3, 1, 1, 1), 0)]


@pytest.fixture(params=IMPLEMENTATIONS)
def forced(request):
    if (reason := backends.missing(request.param)) is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "pad"), SHAPES, ids=str)
def test_the_bytes_of_the_reference(forced, shape, pad, dtype, channels_last):
    images, table = random_images(*shape), TABLE.to(dtype)
    for seed, flip in ((3, True), (2**63 - 1, False)):
        index = torch.arange(shape[0]) * 1_234_567_891
        wanted = augment_reference.augment(images, index, seed, 2**33, 1, pad, flip, table, channels_last)
        epoch = torch.tensor(2**33, device=CUDA)
        got = augment(
            images.to(CUDA), index.to(CUDA), seed=seed, epoch=epoch, view=torch.tensor(1), pad=pad, flip=flip,
            table=table.to(CUDA), channels_last=channels_last,
        )  # fmt: skip
        assert got.stride() == wanted.stride()
        assert torch.equal(got.cpu(), wanted)
    assert torch.equal(
        normalize(images.to(CUDA), table.to(CUDA), channels_last=channels_last).cpu(),
        augment_reference.normalize(images, table, channels_last),
    )


def test_triton_is_what_is_chosen():
    if (reason := backends.missing("triton")) is not None:
        pytest.skip(reason)
    images, index = random_images(2, 3, 8, 8).to(CUDA), torch.arange(2, device=CUDA)
    augment(images, index, seed=0, epoch=0, table=TABLE.to(CUDA))
    with torch.profiler.profile() as profile:
        augment(images, index, seed=0, epoch=0, table=TABLE.to(CUDA))
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("augment_kernel" in name for name in kernels) == 1


def test_the_host_never_waits(forced):
    images, index, table = random_images(8, 3, 8, 8).to(CUDA), torch.arange(8, device=CUDA), TABLE.to(CUDA)
    target, epoch = torch.arange(8, device=CUDA), torch.zeros((), dtype=torch.int64, device=CUDA)

    def step():
        x = augment(images, index, seed=1, epoch=epoch, table=table)
        return mix(x, target, 10, seed=1, epoch=epoch, step=epoch, mixup_alpha=0.2, cutmix_alpha=1.0)[0]

    wanted = step()  # compiles, and makes the tables of ratios
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, wanted)


def test_a_captured_graph_sees_new_epochs(forced):
    images, index, table = random_images(8, 3, 8, 8).to(CUDA), torch.arange(8, device=CUDA), TABLE.to(CUDA)
    epoch = torch.zeros((), dtype=torch.int64, device=CUDA)

    def call(value):
        return augment(images, index, seed=1, epoch=value, table=table, channels_last=True)

    wanted = [call(e) for e in range(4)]
    call(epoch)  # a counter on the device is another kernel, which cannot be loaded during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(epoch)
    for e in range(4):
        epoch.fill_(e)
        graph.replay()
        assert torch.equal(out, wanted[e])


def test_compiled(forced):
    images, index, table = random_images(8, 3, 8, 8).to(CUDA), torch.arange(8, device=CUDA), TABLE.to(CUDA)
    compiled = torch.compile(lambda x, i, e: augment(x, i, seed=1, epoch=e, table=table).sum((1, 2, 3)), fullgraph=True)
    for e in (0, 1, 5):
        wanted = augment(images, index, seed=1, epoch=e, table=table).sum((1, 2, 3))
        torch.testing.assert_close(compiled(images, index, e), wanted)
