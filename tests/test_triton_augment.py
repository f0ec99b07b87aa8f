"""The Triton kernel of augment beyond what every backend's tests ask: programs, what is refused, what is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_augment import TABLE, random_images

from fflfast import kernels, use_backend
from fflfast.ops import augment_reference
from fflfast.ops.augment import IMPLEMENTATIONS, augment

if (reason := kernels.available()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fflfast.kernels import augment as triton_augment
from fflfast.kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 11, 7), (2, 1, 8, 8), (1, 3, 1, 33)], ids=str)
def test_images_of_several_programs(monkeypatch, shape, channels_last):
    monkeypatch.setattr(launch, "AUGMENT_BYTES", 16 * 4)
    pad = min(shape[2:]) - 1
    arguments = (random_images(*shape), torch.arange(shape[0]) + 77, 3, 4, 5, pad, True, TABLE, channels_last)
    assert torch.equal(triton_augment.augment(*arguments), augment_reference.augment(*arguments))
    images, *_, table, _ = arguments
    assert torch.equal(
        triton_augment.normalize(images, table, channels_last),
        augment_reference.normalize(images, table, channels_last),
    )


def test_every_draw_is_the_references():
    """Of images whose pixels all differ, so that no offset and no flip looks like another."""
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(32, -1, -1, -1)
    index = torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 32))
    plain = torch.arange(256.0)[:, None].expand(-1, 3)
    arguments = (images, index, 2**63 - 1, 2**32, 7, 3, True, plain, False)
    got = triton_augment.augment(*arguments)
    assert torch.equal(got, augment_reference.augment(*arguments))
    assert len({image.numpy().tobytes() for image in got}) > 20


def test_images_that_lie_more_than_two_gigabytes_apart():
    memory = torch.empty(2**31 + 64, dtype=torch.uint8)  # of which a few pages are ever touched
    images = memory.as_strided((3, 3, 2, 2), (2**30, 4, 2, 1))  # a stride of 32 bits, a distance of more
    images.copy_(random_images(3, 3, 2, 2))
    arguments = (images, torch.arange(3), 1, 2, 3, 1, True, TABLE, False)
    assert torch.equal(triton_augment.augment(*arguments), augment_reference.augment(*arguments))


def test_refuses_what_it_cannot_count():
    assert kernels.refuses_augment(random_images(2, 3, 8, 8)) is None
    wide = torch.empty(1, 1, 1, device="meta", dtype=torch.uint8)
    for shape, strides in (
        ((1, 3, 30_000, 30_000), None),
        ((2**24, 3, 224, 224), None),
        ((1, 3, 2, 2), (1, 2**31, 2, 1)),
    ):
        images = wide.expand(shape) if strides is None else wide.as_strided(shape, strides)
        assert "32 bits" in kernels.refuses_augment(images)
    assert "no kernels for meta" in kernels.refuses_augment(torch.empty(2, 3, 8, 8, dtype=torch.uint8, device="meta"))


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    used = []
    run = IMPLEMENTATIONS["triton"].functions["augment"]
    monkeypatch.setitem(IMPLEMENTATIONS["triton"].functions, "augment", lambda *case: used.append(1) or run(*case))
    images, index = random_images(1, 3, 4, 4), torch.arange(1)
    augment(images, index, seed=0, epoch=0, pad=1, table=TABLE)
    assert not used
    with use_backend("triton"):
        augment(images, index, seed=0, epoch=0, pad=1, table=TABLE)
    assert used


# ---- what a launch would compile, without a device and without the interpreter

LAUNCHES = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
import triton
from fflfast.kernels import augment as op

target = GPUTarget("cuda", 90, 32)
backend = make_backend(target)
seen = {}

def run(self, *args, grid, warmup, **kwargs):
    kwargs["debug"] = False
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    key = (str(specialization), str(options))
    if key not in seen:
        seen[key] = (self, self._pack_args(backend, kwargs, bound, specialization, options))

JITFunction.run = run
table = torch.zeros(3, 256).t()

def launch(batch=128, seed=7, epoch=0, view=0, step=1):
    images = torch.zeros(batch, 3, 32, 32 * step, dtype=torch.uint8)[..., ::step]
    op.augment(images, torch.arange(batch), seed, epoch, view, 4, True, table, False)

counts = []
launch()
launch(epoch=torch.tensor(0))
op.normalize(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), table, False)
counts.append(len(seen))
for batch in (1, 2, 17, 1000):
    launch(batch)
for word in (1, 2, 16, 300):
    launch(seed=word, epoch=word, view=word)
    launch(epoch=torch.tensor(word))
op.normalize(torch.zeros(7, 3, 32, 32, dtype=torch.uint8), table, False)
counts.append(len(seen))
launch(step=2)
launch(step=3)
counts.append(len(seen))
for self, (options, signature, constants, attributes) in seen.values():
    triton.compile(ASTSource(self, signature, constants, attributes), target=target, options=options.__dict__)
print(json.dumps(counts))
"""


def test_a_launch_compiles_and_new_sizes_and_values_do_not_recompile():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    root = str(Path(__file__).resolve().parent.parent)
    result = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment, cwd=root)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [3, 3, 4]  # counters as numbers, one as a pointer, evaluation; other strides
