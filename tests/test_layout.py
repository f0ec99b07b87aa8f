"""Channels-last weights, and the convolutions that stay out of it on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_runs import start

from fflfast.models import create
from fflfast.training.layout import to_channels_last

CPU = torch.device("cpu")
STEPS = """
import torch
from fflfast.models import create
from fflfast.training.layout import to_channels_last
for name, size in (("tiny", 64), ("resnet8@1/2", 128), ("tiny", 128)):
    net = create(name, 10)
    to_channels_last(net, torch.device("cpu"))
    for _ in range(5):
        images = torch.randn(8, 3, size, size).to(memory_format=torch.channels_last)
        net(images)[0].sum().backward()
        held = [torch.randn(n) for n in (100, 3000, 50000)]
"""


def test_narrow_networks_take_large_images():
    """In a process of its own: what writes beyond its memory ends it."""
    process = start("-c", STEPS)
    out, err = process.communicate()
    assert process.returncode == 0, out + err


@pytest.mark.parametrize(("name", "narrow"), [("tiny", 2), ("resnet8", 0), ("resnet8@3/4", 1), ("wrn_16_2", 0)])
def test_the_same_values_in_another_order(name, narrow):
    torch.manual_seed(0)
    net = create(name, 10)
    other = copy.deepcopy(net)
    to_channels_last(other, CPU)
    kept = [m for m in other.modules() if isinstance(m, nn.Conv2d) and m._forward_pre_hooks]
    assert len(kept) == narrow
    assert all(max(m.stride) == 2 and m.kernel_size == (1, 1) and m.in_channels < 16 for m in kept)
    assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32)
    ordered = images.to(memory_format=torch.channels_last)
    net(images)[0].square().sum().backward()
    other(ordered)[0].square().sum().backward()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def test_other_devices_need_none_of_it():
    net = create("tiny", 10)
    to_channels_last(net, torch.device("meta"))
    assert not any(module._forward_pre_hooks for module in net.modules())
