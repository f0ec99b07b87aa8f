"""The matrix products of the fused feature fusion, emulated: against the reference in float64 across every edge of
their tiles, the same bits in every order of threads, and none of their barriers and waits there for nothing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import simt_build
import torch
from test_fusion_stages import Problem, close, feature_maps

from fflfast.ops import fusion_reference, native

SEEDS = range(1, 4)
MUTATION_SEEDS = range(1, 25)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {
    "pointwise_product": "pointwise",
    "inference_product": "inference",
    "gradient_product": "backward_sums",
    "weight_product": "backward_sums",
}


class Case(NamedTuple):
    """Feature maps and outputs, and the device: one multiprocessor takes the large tiles where both sides allow it, and
    gives each block several tiles; many take the small ones, a block each."""

    batch: int
    channels: list[int]
    height: int
    width: int
    outputs: int
    dtype: torch.dtype
    layout: str = "channels_last"
    tf32: bool = False
    float_weights: bool = True
    training: bool = True
    sm_count: int = 1


CASES = {
    # Large tiles, several of them in each direction, none of them full.
    "large": Case(3, [64, 70], 7, 7, 130, BF16),
    "large-float16": Case(3, [128], 7, 7, 70, FP16, "nchw", float_weights=False),
    "large-float32": Case(3, [33, 40], 7, 7, 70, FP32),
    "large-tf32": Case(3, [33, 40], 7, 7, 70, FP32, tf32=True),
    # Several small tiles a block, then one.
    "rounds": Case(3, [8, 8], 16, 17, 6, BF16),
    "spread": Case(5, [16, 8], 7, 7, 66, FP16, float_weights=False, sm_count=132),
    "spread-float32": Case(4, [40, 5], 6, 6, 72, FP32, "mixed", sm_count=132),
    "spread-tf32": Case(2, [40, 5], 6, 6, 68, FP32, tf32=True, sm_count=132),
    "sliced": Case(2, [9, 7], 5, 6, 9, BF16, "sliced", sm_count=132),
    # Many images a tile, and many tiles an image; one row, one column, the widest row.
    "pixels": Case(70, [3, 4], 1, 1, 5, BF16),
    "image": Case(1, [5], 20, 13, 3, FP16, "nchw", sm_count=132),
    "widest": Case(1, [4], 3, 64, 4, BF16, sm_count=132),
    "tallest": Case(2, [4], 64, 2, 4, FP32),
    "frozen": Case(3, [8, 66], 9, 8, 20, BF16, training=False),
    "frozen-large": Case(2, [65], 12, 12, 70, FP32, training=False),
    "frozen-images": Case(40, [8, 8], 3, 3, 9, FP16, "nchw", float_weights=False, training=False),
    # More columns of tiles, and tiles of the weight, than there are counters for their last blocks.
    "outputs": Case(4, [4], 16, 16, 1030, BF16, float_weights=False, sm_count=80),
    "channels": Case(2, [1030], 8, 8, 4, FP32, "nchw", sm_count=132),
    # A weight of one tile, its pixels split among many blocks.
    "split": Case(8, [8], 16, 16, 5, FP32, sm_count=132),
}
# What the mutation test runs: quick, and together all sites.
MUTATED = (
    "rounds",
    "spread",
    "spread-float32",
    "frozen",
    "frozen-images",
    "frozen-large",
    "split",
    "channels",
    "outputs",
)


@pytest.fixture(scope="module")
def library():
    return simt_build.load_fuse_features()


@pytest.fixture(scope="module")
def stages(library):
    return native.fusion_functions(lambda: native.fusion_operators("fflfast_emulated"))


@pytest.fixture(autouse=True)
def fresh(library):
    with simt_build.fresh(library, "fusion_tickets"):
        yield


@pytest.fixture(scope="module")
def problems():
    """Case name -> its problem, made once."""
    made = {}

    def problem(name):
        if name not in made:
            case = CASES[name]
            maps = feature_maps(case.batch, case.channels, case.height, case.width, case.layout)
            training = (case.training, case.training)
            made[name] = Problem(maps, case.outputs, case.dtype, training=training, float_weights=case.float_weights)
        return made[name]

    return problem


def calls(problem, case):
    """Stage -> its arguments in float64."""
    p = problem
    stages = {
        "pointwise": [p.maps, p.depthwise, p.norm1, p.pointwise, [], True, case.tf32],
        "backward_sums": [
            p.grad, p.maps, p.depthwise, p.norm1, p.pointwise, p.y, p.norm2, p.sums2, True, case.tf32
        ],
    }  # fmt: skip
    if not case.training:
        stages["inference"] = [p.maps, p.depthwise, p.norm1, p.pointwise, p.norm2, case.tf32]
    return stages


def on_device(library, case, seed):
    library.device(sm_count=case.sm_count)
    library.seed(seed)


def emulate(library, stages, problem, case, seed, only=None):
    """Everything that the products of a case return, or that one stage does."""
    on_device(library, case, seed)
    results = []
    for name, arguments in calls(problem, case).items():
        if only not in (None, name):
            continue
        got = stages[name](*problem.cast(*arguments))
        results += [got] if isinstance(got, torch.Tensor) else got
    return results


def bits(tensors):
    return [t.reshape(-1).view(torch.uint8).clone() for t in tensors]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def near(got, plain, exact, case, what):
    """The stages' rule; tf32 has 10 bits of fraction, and a product's error is that of its operands."""
    if case.tf32:
        assert got.shape == exact.shape
        assert (got.double() - exact).abs().max() <= 2.0**-9 * exact.abs().max(), what
    else:
        close(got, plain, exact, what)


@pytest.mark.parametrize("name", CASES)
def test_right_and_the_same_in_every_order(library, stages, problems, name):
    case, p = CASES[name], problems(name)
    results = iter(emulate(library, stages, p, case, seed=0))
    first = []
    for stage, arguments in calls(p, case).items():
        exact = fusion_reference.STAGES[stage](*arguments)
        plain = fusion_reference.STAGES[stage](*p.cast(*arguments))
        exact, plain = ([r] if isinstance(r, torch.Tensor) else r for r in (exact, plain))
        got = [next(results) for _ in exact]
        first += got
        if stage == "pointwise":  # moments are those of y as stored
            own, truth = (fusion_reference._moments(got[0].to(d).mT[:, :, :, None]) for d in (FP32, torch.float64))
            near(got[0], plain[0], exact[0], case, "y")
            close(got[1][0], own[0], truth[0], "mean of y")
            close(got[1][1], own[1], truth[1], "M2 of y")
        else:
            for i, (ours, theirs, truth) in enumerate(zip(got, plain, exact, strict=True)):
                kept = stage == "backward_sums" and i == 2  # dz (B, H·W, C)
                ours = ours.mT.unflatten(2, truth.shape[2:]) if kept else ours
                near(ours, theirs.to(ours.dtype), truth, case, f"{stage}[{i}]")
    for seed in SEEDS:
        assert same(bits(emulate(library, stages, p, case, seed)), bits(first)), seed


def test_launches(library, stages, problems):
    """One launch each and two for the backward, one where the weight wants no gradient; large tiles and small ones."""

    def launched(name, stage, **changes):
        case, p = CASES[name], problems(name)
        on_device(library, case, seed=0)
        before = len(library.launches())
        arguments = p.cast(*calls(p, case)[stage])
        stages[stage](*(changes.get(str(i), a) for i, a in enumerate(arguments)))
        return [(launch.kernel, launch.grid, launch.block) for launch in library.launches()[before:]]

    # 147 pixels, 134 channels in four blocks of 64, 130 outputs: two large tiles each way.
    assert launched("large", "pointwise") == [("pointwise_product", 2, 256)]
    assert launched("large", "backward_sums") == [("gradient_product", 2, 256), ("weight_product", 4, 256)]
    assert launched("large", "backward_sums", **{"8": False}) == [("gradient_product", 2, 256)]
    # 245 pixels, 24 channels in two blocks of 64, 66 outputs: small tiles, a block each.
    assert launched("spread", "pointwise") == [("pointwise_product", 8, 128)]
    assert launched("spread", "backward_sums") == [("gradient_product", 8, 128), ("weight_product", 2, 128)]
    assert launched("frozen-large", "inference") == [("inference_product", 2, 256)]
    assert launched("frozen", "inference") == [("inference_product", 3, 128)]
    # The splits of a weight, and more tiles of it than counters.
    assert launched("split", "backward_sums")[1] == ("weight_product", 8, 128)
    assert launched("outputs", "backward_sums")[1] == ("weight_product", 34, 128)


@pytest.fixture(scope="module")
def right(library, stages, problems):
    """(case, stage) -> (its bits in one order of threads, the (kernel, site) pairs that it visits)."""
    results = {}
    for name in MUTATED:
        for stage in calls(problems(name), CASES[name]):
            library.reset()
            got = emulate(library, stages, problems(name), CASES[name], seed=0, only=stage)
            results[name, stage] = (bits(got), library.visited())
    return results


def test_cases_visit_every_site(library, right):
    visited = set().union(*(pairs for _, pairs in right.values()))
    assert {site for _, site in visited} == {site for site in library.sites() if site > 100}


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_site_is_there_for_nothing(library, stages, problems, right, kernel):
    stage = KERNELS[kernel]

    def is_right(name, seed):
        got = emulate(library, stages, problems(name), CASES[name], seed, only=stage)
        return same(bits(got), right[name, stage][0])

    visits = {
        name: {site for visitor, site in pairs if visitor == kernel}
        for (name, of), (_, pairs) in right.items()
        if of == stage
    }
    missed = simt_build.unnoticed(library, kernel, "fusion_tickets", visits, is_right, lambda site: MUTATION_SEEDS)
    assert missed == set()
