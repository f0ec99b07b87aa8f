"""Pose networks: shapes, shared low parts, branches of unlike length, and files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fflfast.cohort import Cohort
from fflfast.models import create, export_sub_network, load_exported, split
from fflfast.models.hourglass import Hourglass

SMALL = ["hourglass2@1/32", "hourglass4@1/32", "mobilepose@1/4"]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [32, 64])
def test_every_stack_gives_heatmaps_of_a_quarter_of_the_size(name, size):
    net = create(name, 5)
    maps, features, stages = net(torch.randn(2, 3, size, size))
    assert maps.shape == (2, 5, size // 4, size // 4)
    assert features.shape == (2, net.feature_channels, size // 4, size // 4)
    assert [stage.shape for stage in stages] == [maps.shape] * (net.heatmaps - 1)
    assert (net.heatmaps, net.arch, net.num_classes) == (int(name[9]) if "hour" in name else 1, name, 5)


def test_sizes_are_those_of_the_original_network():
    """Four stacks of 256 channels for MPII's 16 joints have 13.0 M parameters (FPD, CVPR 2019, and its code)."""
    net = create("hourglass4", 16)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 13.0
    assert create("hourglass1@1/4", 16).feature_channels == 64
    levels = [module for module in net.stack0.modules() if isinstance(module, Hourglass)]
    assert len(levels) == 4


def test_an_hourglass_is_its_recursion():
    """Of even maps: beside the block at full size, the same at half the size, and each pixel of it four times over."""
    torch.manual_seed(0)
    net = Hourglass(2, 4).eval()
    x = torch.randn(2, 4, 8, 8)

    def plainly(hourglass, x):
        low = hourglass.down(F.max_pool2d(x, 2))
        low = plainly(hourglass.inner, low) if isinstance(hourglass.inner, Hourglass) else hourglass.inner(low)
        return hourglass.skip(x) + hourglass.up(low).repeat_interleave(2, 2).repeat_interleave(2, 3)

    torch.testing.assert_close(net(x), plainly(net, x), rtol=0, atol=0)


def test_a_stack_reads_its_predecessors_input_features_and_heatmaps():
    torch.manual_seed(0)
    net = create("hourglass2@1/32", 5).eval()
    images = torch.randn(2, 3, 64, 64)
    x = net.stem(images)

    def features(stack, x):
        return F.relu(stack.bn(stack.conv(stack.res(stack.hourglass(x)))))

    first = features(net.stack0, x)
    early = net.stack0.score(first)
    last = features(net.stack1, x + net.stack0.merge_features(first) + net.stack0.merge_score(early))
    maps, feature_map, stages = net(images)
    torch.testing.assert_close(stages[0], early)
    torch.testing.assert_close(feature_map, last)
    torch.testing.assert_close(maps, net.stack1.score(last))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_every_split_is_the_network(name, training):
    torch.manual_seed(0)
    net = create(name, 5).train(training)
    x = torch.randn(2, 3, 64, 64)
    for at in net.part_names[1:]:
        trunk, branch = split(net, at)
        own = {**trunk.state_dict(), **branch.state_dict()}
        whole = net.state_dict()
        assert own.keys() == whole.keys()
        assert all(tensor.data_ptr() == whole[key].data_ptr() for key, tensor in own.items())
        assert len(own) == len(trunk.state_dict()) + len(branch.state_dict())
        assert (branch.arch, branch.num_classes, branch.feature_channels) == (name, 5, net.feature_channels)
        assert trunk.heatmaps + branch.heatmaps == net.heatmaps
        expected = copy.deepcopy(net)
        below, above = copy.deepcopy((trunk, branch))
        assert below.training == above.training == training
        maps, features, stages = expected(x)
        hidden, (stem, *shared) = below(x)
        got = above(hidden)
        assert torch.equal(got[0], maps)
        assert torch.equal(got[1], features)
        assert len(shared) + len(got[2]) == len(stages)
        assert all(map(torch.equal, (*shared, *got[2]), stages))
        assert stem.shape[1] == trunk.stem_channels
        left = expected.state_dict()
        for key, tensor in {**below.state_dict(), **above.state_dict()}.items():
            assert torch.equal(tensor, left[key]), key


def test_branches_of_unlike_length_share_the_first_stacks():
    nets = [create(f"hourglass{n}@1/32", 5) for n in (2, 4, 6)]
    parts = [split(net, "stack1") for net in nets]
    trunks = [{key: tensor.shape for key, tensor in trunk.state_dict().items()} for trunk, _ in parts]
    assert trunks[0] == trunks[1] == trunks[2]
    cohort = Cohort([branch for _, branch in parts], parts[0][0])
    output = cohort(torch.randn(2, 3, 32, 32))
    assert [len(stages) for stages in output.stages] == [0, 2, 4]
    assert len(output.trunk_stages) == 2  # the stem's output and the heatmaps of one stack
    assert cohort.trunk_channels == parts[0][0].stem_channels == 8


def test_default_places_are_half_of_the_stacks_and_the_decoder():
    places = {name: create(f"{name}@1/64", 2).default_split for name in ("hourglass1", "hourglass2", "hourglass8")}
    assert places == {"hourglass1": "stack0", "hourglass2": "stack1", "hourglass8": "stack4"}
    assert create("mobilepose", 2).default_split == "decoder"


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns_in_channels_last_and_bf16_and_from_one_image(name):
    net = create(name, 5).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps, _, stages = net(x)
    sum(out.float().square().sum() for out in (maps, *stages)).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_compiles_whole():
    torch.manual_seed(0)
    trunk, branch = split(create("hourglass2@1/64", 5).eval(), "stack1")
    x = torch.randn(2, 3, 64, 64)
    hidden, _ = trunk(x)
    for part, given, expected in ((branch, hidden, branch(hidden)[0]), (trunk, x, hidden)):
        compiled = torch.compile(part, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(given)[0], expected)


def test_files_hold_the_network_by_itself(tmp_path):
    net = create("hourglass2@1/32", 5).eval()
    trunk, branch = split(net, "stack1")
    file = export_sub_network(branch, trunk, tmp_path / "sub0.safetensors", metadata={})
    loaded, metadata = load_exported(file)
    x = torch.randn(2, 3, 64, 64)
    assert (metadata["arch"], metadata["num_classes"]) == ("hourglass2@1/32", 5)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x)[0])


def test_a_place_that_is_none_is_named():
    net = create("hourglass2@1/32", 5)
    for at in ("stem", "stack2", "layer3"):
        with pytest.raises(ValueError, match=rf"hourglass2@1/32 at '{at}'; a split is possible at: stack0, stack1"):
            split(net, at)
