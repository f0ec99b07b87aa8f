"""Tensors of more than 2³¹ elements on a real GPU: every offset of theirs needs 64 bits.

The checks are those of large.py, which test_large.py tries on few elements. Each test takes a few seconds and up to
50 GB of the GPU's memory.
"""

from __future__ import annotations

import operator_backends
import pytest
import torch
from large import (
    assert_augment,
    assert_fusion,
    assert_loss,
    draw_fusion,
    draw_logits,
    images_around,
    run_augment,
    run_fusion,
    run_loss,
)

from fflfast import DistillGraph, use_backend
from fflfast.ops import backends


def _memory() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


pytestmark = pytest.mark.skipif(_memory() < 60 << 30, reason="needs a CUDA device with 60 GiB free")
MORE = 2**31
PLACES = (2**30, MORE)  # elements: the second is the 2³¹st, the first the 2³¹st byte
ROWS, CLASSES = 67_200, 32_000
GRAPHS = {
    "FFL": DistillGraph.ffl(2),  # rows on chip
    "trainable teacher": DistillGraph(2, (1, 0.5), (), ((1, 0, 0.7, False), (0, 1, 0.3))),  # rows swept
}


@pytest.fixture(autouse=True)
def memory():
    yield
    torch.cuda.empty_cache()


def needs(backend):
    if (reason := backends.missing(backend)) is not None:
        (pytest.fail if backend in operator_backends.REQUIRED else pytest.skip)(reason)


@pytest.fixture(scope="module")
def drawn():
    assert ROWS * CLASSES > MORE
    return draw_logits(3, ROWS, CLASSES, "cuda")


@pytest.mark.parametrize(("name", "reduction"), [("FFL", "mean"), ("FFL", "none"), ("trainable teacher", "mean")])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_loss(drawn, backend, name, reduction):
    """A mean writes gradients in the forward and scales them, a loss a row leaves them to the backward."""
    needs(backend)
    graph, (logits, target) = GRAPHS[name], drawn
    logits = logits[: graph.num_logits]
    with use_backend(backend):
        found = run_loss(logits, target, graph, reduction)
    assert_loss(found, logits, target, graph, reduction, chunk=(1 << 24) // CLASSES)


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("cuda", "contiguous_format"), ("cuda", "channels_last"), ("triton", "channels_last")],
)
def test_fusion(backend, layout):
    """More than 65,535 images, too, which is where two dimensions of a grid end."""
    needs(backend)
    batch, channels, outputs, size = 131_200, (256, 8), 256, 8
    assert batch * channels[0] * size**2 > MORE
    f = draw_fusion(batch, channels, outputs, size, "cuda", getattr(torch, layout))
    implementation = operator_backends.fusion(backend)
    assert implementation.refuses(f.maps, f.depthwise, f.pointwise) is None
    found = run_fusion(implementation.functions, f)
    spots = images_around(PLACES, [c * size**2 for c in (*channels, sum(channels), outputs)], batch)
    assert_fusion(found, f, chunk=4096, spots=spots)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", ["triton"])
def test_augmentation(backend, channels_last):
    needs(backend)
    batch, size = 14_300, 224
    assert 3 * batch * size**2 > MORE
    with use_backend(backend):
        made = run_augment(batch, size, "cuda", channels_last=channels_last)
    assert_augment(*made, chunk=200)
