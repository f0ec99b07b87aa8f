"""The fusion's CUDA kernels without a matrix product, emulated on the host: in every layout and size, in any order of
threads, with nothing read outside of their inputs and no barrier there for nothing. What all backends have in common is
in tests/test_fusion_stages.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import simt_build
import torch
from guarded import between_guards, died
from test_fusion_stages import Problem, close, draw, feature_maps

from fflfast.ops import fusion_reference, native

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
SEEDS = range(1, 5)
MUTATION_SEEDS = range(1, 25)
# The sites below are those of the products (tests/test_fusion_products.py).
FIRST_PRODUCT_SITE = 100


@pytest.fixture(scope="module")
def library():
    return simt_build.load_fuse_features()


@pytest.fixture(autouse=True)
def fresh(library):
    with simt_build.fresh(library, "fusion_tickets"):
        yield


def stage(name):
    return native.fusion_functions(lambda: native.fusion_operators("fflfast_emulated"))[name]


class Case(NamedTuple):
    """Feature maps, and the device; few multiprocessors make each block take several tiles."""

    channels: tuple[int, ...]
    batch: int
    height: int
    width: int
    out: int = 5
    dtype: torch.dtype = FLOAT
    layout: str = "nchw"
    training: tuple[bool, bool] = (True, True)
    float_weights: bool = True
    sm_count: int = 1
    capability: int = 90
    needs: int | None = None


def on_device(library, case):
    shared = 163 if case.capability < 90 else 227
    library.device(sm_count=case.sm_count, capability=case.capability, shared_per_block=shared * 1024)


def problem_of(case):
    maps = feature_maps(case.batch, case.channels, case.height, case.width, case.layout)
    return Problem(maps, case.out, case.dtype, training=case.training, float_weights=case.float_weights)


def calls(case):
    """(stage, what the reference gets in float64, the same in PyTorch's dtypes, what the kernels get)."""
    p = problem_of(case)
    needs = (1 << len(p.maps) + 1) - 1 if case.needs is None else case.needs
    exact = fusion_reference.backward_sums(
        p.grad, p.maps, p.depthwise, p.norm1, p.pointwise, p.y, p.norm2, p.sums2, False, False
    )
    sums1, dz = exact[0].float().double(), exact[2].to(p.dtype).double()
    cast = p.cast(p.maps, p.depthwise, p.norm1, sums1)
    cast[3] = sums1.float()
    kept = dz.to(p.dtype).flatten(2).mT.contiguous()
    plain = [
        ("depthwise_statistics", (p.maps, p.depthwise)),
        ("pool", (p.y, p.norm2)),
        ("backward_pool", (p.grad, p.active, p.pixels)),
    ]
    found = [(name, arguments, p.cast(*arguments), p.cast(*arguments)) for name, arguments in plain]
    inputs = (p.maps, p.depthwise, p.norm1, sums1, [dz], needs)
    return [*found, ("backward_inputs", inputs, [*cast, [dz.float()], needs], [*cast, [kept], needs])]


def assert_right(case, results):
    for (name, exact, plain, _), got in zip(calls(case), results, strict=True):
        truth, baseline = (as_list(fusion_reference.STAGES[name](*a)) for a in (exact, plain))
        for i, (g, q, e) in enumerate(zip(as_list(got), baseline, truth, strict=True)):
            close(g, q, e, f"{name}[{i}]")


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def placed(value, place):
    if isinstance(value, torch.Tensor):
        return place(value) if value.dim() else value
    if isinstance(value, fusion_reference.Norm):
        return value._make(placed(v, place) for v in value)
    return [placed(v, place) for v in value] if isinstance(value, list) else value


def emulate(library, case, seed=0, place=lambda tensor: tensor):
    """What the four stages return for a case."""
    on_device(library, case)
    library.seed(seed)
    return [stage(name)(*placed(list(given), place)) for name, _, _, given in calls(case)]


def running(case):
    """Moments, counts, running statistics and counters of two norms; one count stands for one on the device."""
    channels = (sum(case.channels), case.out)
    moments = [draw(2, c, seed=c).abs().float() for c in channels]
    counts = [torch.tensor(12.0), torch.tensor([30.0])]
    return moments, counts, [draw(c, seed=9).float() for c in channels for _ in range(2)], [torch.tensor(3)] * 2


def bits(results):
    flat = [t for result in results for t in as_list(result)]
    return [t.contiguous().view(-1).view(torch.uint8).clone() for t in flat]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- sizes and layouts

LAYOUTS = ("nchw", "channels_last", "mixed", "sliced", "expanded")
SIZES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 5), (7, 7), (8, 8), (4, 64), (64, 4), (1, 64), (64, 1), (17, 31), (64, 64))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(library, size, dtype):
    for layout in ("nchw", "channels_last"):
        case = Case((8, 3), 1 if size == (64, 64) else 3, *size, dtype=dtype, layout=layout)
        assert_right(case, emulate(library, case))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(16, 8), (5, 7), (70, 1, 33)], ids=str)
def test_layouts(library, channels, layout, dtype):
    for size in ((4, 6), (3, 3)):  # of which the pixels of one are whole packs
        case = Case(channels, 2, *size, dtype=dtype, layout=layout, out=16, float_weights=dtype != HALF)
        assert_right(case, emulate(library, case))


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_maps_that_begin_anywhere(library, layout, offset):
    def moved(tensor):
        if tensor.dim() != 4:
            return tensor
        base = torch.full((tensor.numel() + 16,), math.nan, dtype=tensor.dtype)
        return base[offset:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    case = Case((8, 16), 2, 4, 4, dtype=BFLOAT, layout=layout)
    assert_right(case, emulate(library, case, place=moved))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("sm_count", [1, 2, 132])
def test_many_blocks_and_tiles(library, sm_count, dtype):
    """Blocks of channels, tiles a block, a batch that ends inside a tile, rows of an image in different tiles."""
    for size, batch in (((5, 5), 23), ((20, 20), 3), ((3, 40), 5)):
        case = Case((70, 9), batch, *size, dtype=dtype, sm_count=sm_count, layout="mixed", capability=80)
        assert_right(case, emulate(library, case))
    grids = {launch.grid for launch in library.launches() if launch.kernel == "depthwise_statistics"}
    assert max(grids) > 4 or sm_count == 1  # more than the blocks of channels


def test_every_subset_of_gradients(library):
    for needs in range(8):
        for training in ((True, True), (False, False)):
            case = Case((4, 3), 2, 4, 3, needs=needs, training=training)
            assert_right(case, emulate(library, case))


def test_a_stride_beyond_31_bits(library):
    case = Case((3, 4), 2, 3, 5, dtype=BFLOAT)
    torch.use_deterministic_algorithms(False)  # which would fill the 4 GB
    far = torch.empty(2**31 + 64, dtype=BFLOAT)  # untouched but for its two ends

    def place(tensor):
        if tensor.shape != (2, 4, 3, 5):
            return tensor
        return far.as_strided(tensor.shape, (2**31, 15, 5, 1)).copy_(tensor)

    assert_right(case, emulate(library, case, place=place))


# ---- numbers


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(
    "distort",
    [{"shift": 1e3, "scale": 1e-3}, {"shift": -1e3, "scale": 1.0}, {"scale": 1e-5}, {"scale": 0.0, "shift": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (6, 5), (16, 16)], ids=str)
def test_moments_of_awkward_data(library, size, distort, dtype):
    library.device(sm_count=1)
    problem = Problem(feature_maps(7, (3, 4), *size, "channels_last", **distort), 4, dtype)
    given = problem.cast(problem.maps, problem.depthwise)
    got = stage("depthwise_statistics")(*given)[0]
    exact, plain = (
        fusion_reference.depthwise_statistics(*a)[0] for a in ((problem.maps, problem.depthwise), tuple(given))
    )
    for i in range(2):
        close(got[i], plain[i], exact[i], str(i))


def test_one_value_and_dead_channels():
    one = stage("depthwise_statistics")([torch.full((1, 3, 1, 1), 5.0)], torch.ones(3, 1, 3, 3))[0]
    assert torch.equal(one, torch.tensor([[5.0] * 3, [0.0] * 3]))
    x = torch.randn(2, 4, 5, 5)
    x[:, 1] = 0
    moments = stage("depthwise_statistics")([x], torch.ones(4, 1, 3, 3))[0]
    assert moments[0, 1] == 0
    assert moments[1, 1] == 0
    assert (moments[1, [0, 2, 3]] > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_place(value):
    torch.use_deterministic_algorithms(False)
    case = Case((4, 3), 2, 5, 6, layout="mixed")
    for name, _, plain, given in calls(case):
        spoilt = [*plain], [*given]
        for arguments in spoilt:
            first = arguments[0][0].clone() if isinstance(arguments[0], list) else arguments[0].clone()
            first.view(-1)[0] = value
            arguments[0] = [first, *arguments[0][1:]] if isinstance(arguments[0], list) else first
        want, got = as_list(fusion_reference.STAGES[name](*spoilt[0])), as_list(stage(name)(*spoilt[1]))
        for w, g in zip(want, got, strict=True):
            assert torch.equal(w.isfinite(), g.isfinite()), name
            if name in ("pool", "backward_pool") or math.isnan(value):
                assert torch.equal(w.isnan(), g.isnan()), name


def test_counts_on_the_device_and_running_statistics():
    case = Case((5,), 2, 4, 3)
    p = problem_of(case)
    y, norm = p.cast(p.y, p.norm2)
    there = norm._replace(count=norm.count.view(1))
    assert same(bits([stage("pool")(y, norm)]), bits([stage("pool")(y, there)]))
    moments, counts, tensors, batches = running(Case((300,), 1, 1, 1, out=1100))
    for momentum in (0.25, -1.0):
        ours, theirs = [t.clone() for t in tensors], [t.clone() for t in tensors]
        counters = [[b.clone() for b in batches] for _ in range(2)]
        stage("update_running")(moments, counts, ours, counters[0], [momentum] * 2)
        scalars = [c.view(()) for c in counts]
        fusion_reference.update_running(moments, scalars, theirs, counters[1], [momentum] * 2)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
        assert counters[0] == counters[1] == [4, 4]


# ---- launches


def test_each_stage_is_one_launch(library):
    emulate(library, Case((70, 9), 9, 7, 7, sm_count=132))
    moments, counts, tensors, batches = running(Case((3,), 1, 1, 1))
    stage("update_running")(moments, counts, tensors, [b.clone() for b in batches], [0.1, 0.1])
    kernels = ["depthwise_statistics", "pool", "backward_pool", "backward_inputs", "update_running"]
    assert [launch.kernel for launch in library.launches()] == kernels


def test_tiles_of_wide_rows_fit_every_device_or_say_so(library):
    for capability in (80, 90):
        case = Case((64,), 1, 2, 64, dtype=BFLOAT, capability=capability)
        assert_right(case, emulate(library, case))
    library.device(shared_per_block=99 * 1024)
    with pytest.raises(RuntimeError, match=r"fit the shared memory of a block, got a width of 2000"):
        stage("depthwise_statistics")([torch.zeros(1, 1, 1, 2000)], torch.zeros(1, 1, 3, 3))


def test_captured_launches_have_counters_of_their_own_and_work_without_one_too(library):
    library.device(sm_count=1)
    x, weight = torch.randn(24, 3, 8, 8), torch.randn(3, 1, 3, 3)
    want = stage("depthwise_statistics")([x], weight)[0]
    assert library.launches()[0].grid > 1
    library.capturing(True)
    for _ in range(2048):
        stage("depthwise_statistics")([x[:1, :, :1, :1]], weight)
    for _ in range(2):
        assert torch.equal(stage("depthwise_statistics")([x], weight)[0], want)


# ---- order of threads, memory, barriers

CASES = {
    "tiles": Case((40, 8), 30, 4, 4, out=70),
    "splits": Case((8,), 40, 8, 8, out=16, layout="channels_last"),
    "splits-16": Case((9, 8), 20, 8, 8, out=16, dtype=BFLOAT, layout="mixed", sm_count=2),
    "rows": Case((4,), 2, 40, 9, dtype=HALF, float_weights=False),
    "counters": Case((32,) * 7 + (33 * 10,), 3, 8, 8, out=2, sm_count=40),
    "counters-16": Case((64,) * 7 + (65 * 10,), 3, 8, 8, out=2, dtype=BFLOAT, sm_count=40),
    "frozen": Case((6,), 30, 5, 5, training=(False, False)),
    "maps-alone": Case((6,), 30, 5, 5, needs=1),
}
EQUIVALENT: dict[tuple[str, int], str] = {}


def everything(library, case, seed=0, place=lambda tensor: tensor):
    """The stages' results and running statistics after two updates."""
    results = emulate(library, case, seed, place)
    moments, counts, tensors, batches = (placed(v, lambda t: place(t.clone())) for v in running(case))
    batches = [b.clone() for b in batches]
    stage("update_running")(moments, counts, tensors, batches, [-1.0, 0.1])
    return [*results, tensors, batches]


@pytest.fixture(scope="module")
def right(library):
    """Case -> (its bits in one order of threads, the (kernel, site) pairs that it visits)."""
    torch.use_deterministic_algorithms(True)
    results = {}
    for name, case in CASES.items():
        library.reset()
        results[name] = (bits(everything(library, case)), library.visited())
    torch.use_deterministic_algorithms(False)
    return results


@pytest.mark.parametrize("name", CASES)
def test_right_and_the_same_in_every_order(library, right, name):
    assert_right(CASES[name], emulate(library, CASES[name]))
    for seed in SEEDS:
        assert same(bits(everything(library, CASES[name], seed)), right[name][0]), seed


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(8, 16), (5, 3)], ids=str)
def test_reads_nothing_outside_its_inputs(library, channels, layout, at_end):
    def compute():
        for size in ((4, 4), (3, 5), (20, 20)):
            case = Case(channels, 2, *size, dtype=BFLOAT, layout=layout, out=8)
            everything(library, case, place=lambda t: between_guards(t, at_end))

    assert not died(compute)


def test_cases_visit_every_site(library, right):
    visited = set().union(*(pairs for _, pairs in right.values()))
    assert {site for _, site in visited} == {site for site in library.sites() if site < FIRST_PRODUCT_SITE}


@pytest.mark.parametrize(
    "kernel", ["depthwise_statistics", "pool", "backward_pool", "backward_inputs", "update_running"]
)
def test_no_site_is_there_for_nothing(library, right, kernel):
    def is_right(name, seed):
        return same(bits(everything(library, CASES[name], seed)), right[name][0])

    visits = {name: {site for visitor, site in pairs if visitor == kernel} for name, (_, pairs) in right.items()}
    missed = simt_build.unnoticed(library, kernel, "fusion_tickets", visits, is_right, lambda site: MUTATION_SEEDS)
    assert {(kernel, site) for site in missed} == {pair for pair in EQUIVALENT if pair[0] == kernel}
