"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from steps import batches, bits, make, same_bits
from torch import nn

import fflfast
from fflfast.training.average import Averages


class _Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.randn((), generator=generator))
        self.register_buffer("table", torch.randn(2, generator=generator), persistent=False)
        self.to(dtype)


def _move(net, generator):
    """Change everything in place, as a step does."""
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.add_(1)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_the_average_is_the_formulas(decay):
    net = _Net(torch.float64)
    averages = Averages(net, decay)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    assert all(torch.equal(averages.tensors()[name], value) for name, value in expected.items())
    generator = torch.Generator().manual_seed(1)
    for t in range(30):
        _move(net, generator)
        averages.update()
        weight = max(1 - decay, 1 / (t + 1))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = (1 - weight) * expected[name] + weight * value
            else:
                expected[name] = value.clone()
    got = averages.tensors()
    assert got.pop("updates") == 30
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
        assert got[name].stride() == net.state_dict()[name].stride(), name


def test_the_first_updates_are_plain_means():
    net = nn.Linear(1, 1, bias=False)
    averages = Averages(net, 0.999)
    for value in (5.0, 1.0, 3.0):
        net.weight.data.fill_(value)
        averages.update()
    assert averages.tensors()["weight"].item() == pytest.approx(3.0)


@pytest.mark.parametrize("fails", [False, True])
def test_applied_lends_the_averages_and_gives_the_same_bits_back(fails):
    net = _Net()
    averages = Averages(net, 0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        _move(net, generator)
        averages.update()
    _move(net, generator)
    with torch.no_grad():
        net.norm.bias.fill_(-0.0)
        net.norm.running_var[0] = torch.nan
    own, held = bits(net.state_dict().values()), bits(averages.tensors().values())
    addresses = [t.data_ptr() for t in net.state_dict().values()]
    try:
        with averages.applied():
            lent = {name: averages.tensors()[name] for name in net.state_dict()}
            assert same_bits(bits(net.state_dict().values()), bits(lent.values()))
            assert [t.data_ptr() for t in net.state_dict().values()] == addresses
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same_bits(bits(net.state_dict().values()), own)
    assert same_bits(bits(averages.tensors().values()), held)


def test_a_bad_step_changes_no_bit():
    net = _Net()
    with torch.no_grad():
        net.norm.bias.fill_(-0.0)
    averages = Averages(net, 0.9)
    before = bits(averages.tensors().values())
    counter = net.norm.num_batches_tracked.clone()
    _move(net, torch.Generator().manual_seed(1))
    net.norm.num_batches_tracked.copy_(counter)  # a counter is put back before its copy is taken
    averages.update(torch.tensor(True))
    assert same_bits(bits(averages.tensors().values()), before)


def test_a_good_step_under_the_guard_is_the_same_step():
    results = []
    for bad in (None, torch.tensor(False)):
        net, generator = _Net(), torch.Generator().manual_seed(1)
        averages = Averages(net, 0.9)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for _ in range(3):
            averages.update(bad)
            _move(net, generator)
        results.append(bits(averages.tensors().values()))
    assert same_bits(*results)


def test_tensors_go_into_a_checkpoint_and_back_in_place():
    net, other = _Net(), _Net()
    averages, restored = Averages(net, 0.9), Averages(other, 0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        _move(net, generator)
        averages.update()
    saved = {name: t.clone(memory_format=torch.contiguous_format) for name, t in averages.tensors().items()}
    addresses = [t.data_ptr() for t in restored.tensors().values()]
    restored.load(saved)
    assert [t.data_ptr() for t in restored.tensors().values()] == addresses
    assert same_bits(bits(restored.tensors().values()), bits(averages.tensors().values()))
    other.load_state_dict(net.state_dict())
    for each, module in ((averages, net), (restored, other)):
        _move(module, torch.Generator().manual_seed(3))
        each.update()
    assert same_bits(bits(restored.state()), bits(averages.state()))
    with pytest.raises(KeyError, match=r"norm\.weight"):
        restored.load({name: t for name, t in saved.items() if name != "norm.weight"})


def test_the_decay_is_checked():
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a decay from 0 to below 1"):
            Averages(nn.Linear(1, 1), decay)


def test_a_step_keeps_averages_and_lends_them():
    step = make(ema=0.5)
    values = []
    for k, batch in enumerate(batches(step, 3)):
        step(batch, epoch=0, step=k)
        values.append({name: p.detach().double() for name, p in step.learner.named_parameters()})
    held = step.averages.tensors()
    for name in values[0]:
        expected = 0.25 * values[0][name] + 0.25 * values[1][name] + 0.5 * values[2][name]
        torch.testing.assert_close(held[name].double(), expected, rtol=1e-5, atol=1e-7)
    with step.averaged():
        assert same_bits(bits(step.learner.parameters()), bits([held[name] for name in values[0]]))
        names = {name: t for name, t in held.items() if name != "updates"}
        step.learner.load_state_dict(names)
    assert same_bits(bits(step.learner.parameters()), bits([v.float() for v in values[2].values()]))
    plain = make()
    assert plain.averages is None
    with plain.averaged():
        pass


def test_averaging_goes_with_every_layout():
    with fflfast.use_backend("reference"):
        steps = [make(ema=0.9, channels_last=channels_last) for channels_last in (False, True)]
        for step in steps:
            for k, batch in enumerate(batches(step, 2)):
                step(batch, epoch=0, step=k)
    left, right = (step.averages.tensors() for step in steps)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-4)


def test_what_is_not_learned_keeps_its_own_value():
    """Frozen parameters, which may move otherwise, and a memory that the method keeps equal over the processes."""
    net = nn.Module()
    net.peer, net.method = _Net(), _Net()
    net.peer.conv.requires_grad_(False)
    net.method.register_buffer("memory", torch.zeros(5))
    net.method.replicated = ("memory",)
    averages = Averages(net, 0.5)
    left_out = {"peer.conv.weight", "peer.conv.bias", "method.memory"}
    assert averages.tensors().keys() == {*net.state_dict(), "updates"} - left_out
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        _move(net, generator)
        averages.update()
    own = {name: value.clone() for name, value in net.state_dict().items()}
    with averages.applied():
        for name, value in net.state_dict().items():
            assert torch.equal(value, own[name]) == (name in left_out or "tracked" in name), name
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
