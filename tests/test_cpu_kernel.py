"""The CPU library by itself: each instruction set, bits, memory layouts, the power form. What a loss must be is
tested for every backend in test_distill_loss*.py."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import cpu_isas
import pytest
import torch
from truth import GRAPHS, assert_contract, gradient_scale, plain_loss, random_logits, run, target_for

from fflfast import DistillGraph, distill_loss
from fflfast.ops import native, reference

if (reason := native.load("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

isa = cpu_isas.isa
FUNCTIONS = native.distill_loss_functions(lambda: native.operators("fflfast_cpu"), native.table)
FFL = DistillGraph.ffl(2)


@pytest.fixture(autouse=True)
def _cpu_alone(monkeypatch):
    monkeypatch.setenv("FFLFAST_BACKEND", "cpu")


def arguments(
    logits, graph, *, temperature=3.0, kl_weight=1.0, ce_weight=1.0, smoothing=0.0, eps=0.0, reduction="mean"
):
    dtype = reference.accumulation_dtype(logits[0].dtype)
    scalars = (torch.tensor(v, dtype=dtype) for v in (temperature, kl_weight, ce_weight))
    return tuple(scalars), (graph, smoothing, -100, eps, reduction)


def fast(logits, target, graph, **settings):
    """(loss, terms, gradients) of the form that writes gradients at once."""
    options = arguments(logits, graph, **settings)
    return FUNCTIONS["forward_with_gradients"](logits, target, *options, (True,) * len(logits))


def base(logits, target, graph, **settings):
    """The same by statistics and a backward of its own."""
    options = arguments(logits, graph, **settings)
    loss, terms, statistics = FUNCTIONS["forward"](logits, target, *options)
    grads = FUNCTIONS["backward"](torch.ones_like(loss), logits, target, statistics, *options, (True,) * len(logits))
    return loss, terms, grads


def same_bits(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and all(map(torch.equal, a[2], b[2]))


# ---- every instruction set


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_instruction_set_keeps_the_contract(isa, name, dtype):
    graph = GRAPHS[name]
    logits = random_logits(graph.num_logits, (5, 101), dtype)
    target = target_for(graph, (5, 101))
    for temperature in (1.0, 2.5, 4.0):
        assert_contract(distill_loss, logits, target, graph, temperature=temperature, kl_weight=0.7)


@pytest.mark.parametrize("name", GRAPHS)
def test_float64_is_exact_to_its_last_digits(isa, name):
    graph = GRAPHS[name]
    logits, target = random_logits(graph.num_logits, (5, 101), torch.float64), target_for(graph, (5, 101))
    for temperature in (1.0, 2.5):
        loss, terms, grads = run(distill_loss, logits, target, graph, temperature=temperature)
        expected = run(plain_loss, logits, target, graph, temperature=temperature)
        torch.testing.assert_close(loss, expected[0], rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(terms, expected[1], rtol=1e-13, atol=1e-14)
        scales = gradient_scale(logits, target, graph, temperature=temperature)
        for g, e, s in zip(grads, expected[2], scales, strict=True):
            # Both have an error; a trainable teacher's is as much larger as its log-ratio.
            assert ((g - e).abs() <= 5e-14 * s).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 511, 513, 1003])
def test_tails_of_vectors_and_blocks(isa, classes):
    logits = random_logits(3, (3, classes))
    target = target_for(FFL, (3, classes))
    for temperature in (2.5, 3.0):
        assert_contract(distill_loss, logits, target, FFL, temperature=temperature)
    if classes == 1:
        return  # y − y: nothing is left that an error could be measured by
    soft = torch.softmax(random_logits(1, (3, classes), seed=5)[0], -1)
    assert_contract(distill_loss, logits, soft, FFL, temperature=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("seed", range(120))
def test_random_graphs_and_nasty_rows(isa, seed):
    """Against the reference in float64: masks, NaN, ignored and bad targets, strides, every option."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    m, rows, classes = rng.randint(1, 5), rng.randint(1, 6), rng.choice([1, 2, 5, 16, 17, 100, 256, 300, 1003])
    mixtures = [[rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(m)] for _ in range(rng.randint(0, 3))]
    mixtures = [row for row in mixtures if any(row)]
    ends = [(t, s) for t in range(m + len(mixtures)) for s in range(m) if t != s]
    edges = [(t, s, rng.choice([-0.5, 0.25, 1.0]), rng.random() < 0.6) for t, s in rng.sample(ends, min(len(ends), 5))]
    graph = DistillGraph(m, [rng.choice([0.0, 0.5, 1.0]) for _ in range(m)], mixtures, edges)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    logits = []
    for _ in range(m):
        z = torch.randn(rows, classes, generator=generator) * rng.choice([1.0, 3.0, 20.0])
        if rng.random() < 0.25:
            z[torch.rand(rows, classes, generator=generator) < 0.3] = -math.inf
        if rng.random() < 0.15:
            z[:, : min(classes, 64)] = -math.inf
        if rng.random() < 0.1:
            z[rng.randrange(rows), rng.randrange(classes)] = math.nan
        z = z.to(dtype)
        layout = rng.choice(["plain", "plain", "apart", "same"])
        if layout == "apart":
            z = torch.cat([z, z], 1)[:, :classes]
        logits.append(z[:1].expand(rows, classes) if layout == "same" else z)
    if rng.random() < 0.3:
        target = torch.rand(rows, classes, generator=generator).to(reference.accumulation_dtype(dtype))
        target[torch.rand(rows, classes, generator=generator) < 0.4] = 0
    else:
        target = torch.randint(classes, (rows,), generator=generator)
        target[rng.randrange(rows)] = rng.choice([0, -100, classes + 3])
    settings = {
        "temperature": rng.choice([1.0, 2.0, 3.0, 0.7, 4.5]),
        "kl_weight": rng.choice([1.0, 0.3]),
        "smoothing": rng.choice([0.0, 0.0, 0.1]),
        "eps": rng.choice([0.0, 0.0, 1e-7, 0.01]),
        "reduction": rng.choice(["mean", "sum"]),
    }
    wide = [z.double() for z in logits]
    options = arguments(wide, graph, **settings)
    wide_target = target.double() if target.is_floating_point() else target
    loss, terms, statistics = reference.distill_loss(wide, wide_target, *options[0], *options[1])
    grads = reference.distill_loss_backward(
        torch.ones_like(loss), wide, wide_target, statistics, *options[0], *options[1], [True] * m
    )
    sharp, blunt = {torch.float64: (1e-10, 1e-10), torch.bfloat16: (3e-5, 2e-2), torch.float16: (3e-5, 3e-3)}.get(
        dtype, (3e-5, 3e-5)
    )
    for form in (base, fast):
        got = form(logits, target, graph, **settings)
        close = {"rtol": sharp, "atol": sharp, "equal_nan": True, "check_dtype": False}
        torch.testing.assert_close(got[0], loss, **close)
        torch.testing.assert_close(got[1], terms, **close)
        for g, expected in zip(got[2], grads, strict=True):
            torch.testing.assert_close(
                g, expected, rtol=blunt, atol=blunt, equal_nan=True, check_dtype=False, check_stride=False
            )


def test_an_environment_variable_bounds_the_instruction_set():
    code = "from fflfast.ops import native; import torch; native.load('cpu'); print(torch.ops.fflfast_cpu.isa(-1))"
    for level, name in enumerate(cpu_isas.ISAS):
        run_ = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "FFLFAST_CPU_ISA": name}, capture_output=True, text=True
        )
        assert int(run_.stdout) <= level, run_.stderr
        if name == "baseline":
            assert int(run_.stdout) == 0


# ---- bits


@pytest.mark.parametrize("shape", [(300, 100), (7, 20001), (1, 5000)])
def test_bits_do_not_depend_on_threads(shape):
    logits, target = random_logits(3, shape), target_for(FFL, shape)
    threads = torch.get_num_threads()
    try:
        for temperature in (2.5, 3.0):
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append([f(logits, target, FFL, temperature=temperature) for f in (fast, base)])
            assert all(same_bits(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_both_forms_give_the_same_bits_where_no_powers_are_taken(isa, name, dtype):
    graph = GRAPHS[name]
    logits, target = random_logits(graph.num_logits, (4, 600), dtype), target_for(graph, (4, 600))
    for settings in ({"temperature": 2.5}, {"temperature": 1.5, "eps": 1e-4, "smoothing": 0.1}):
        assert same_bits(fast(logits, target, graph, **settings), base(logits, target, graph, **settings))


# ---- the power form

POWERS = ("ffl2", "ffl4", "dml3", "cl3", "one3", "mcl_okd3", "kd", "single")


@pytest.mark.parametrize("temperature", range(1, 9))
@pytest.mark.parametrize("name", POWERS)
@pytest.mark.parametrize("spread", [3.0, 12.0])
def test_powers_keep_the_contract(isa, temperature, name, spread):
    graph = GRAPHS[name]
    logits, target = random_logits(graph.num_logits, (6, 700), scale=spread), target_for(graph, (6, 700))
    assert_contract(distill_loss, logits, target, graph, temperature=float(temperature))


@pytest.mark.parametrize("apart", [10.0, 60.0, 150.0, 400.0, 1000.0])
@pytest.mark.parametrize("name", ["ffl2", "ffl4"])
def test_sub_networks_whose_maxima_disagree(isa, apart, name):
    """The product of the roots sinks below every maximum, at last to nothing: such a row is computed directly."""
    graph = GRAPHS[name]
    logits, target = random_logits(graph.num_logits, (4, 300)), target_for(graph, (4, 300))
    for i, z in enumerate(logits[:-1]):
        z[:, 7 * i] += apart
    assert_contract(distill_loss, logits, target, graph, temperature=3.0)


def test_tails_are_rounded_not_flushed(isa):
    """Teacher and student far down in the subnormal numbers still pull on each other."""
    depth = torch.tensor([0.0, 50.0, 80.0, 87.0, 89.0, 92.0, 95.0, 99.0])
    target = torch.tensor([0, 3])
    for temperature in (1.0, 1.5):
        logits = [(-depth * slope * temperature).repeat(2, 3) for slope in (1.0, 1.03, 0.98)]
        settings = {"temperature": temperature, "ce_weight": 0.0}
        grads = run(distill_loss, logits, target, FFL, **settings)[2]
        exact = run(distill_loss, [z.double() for z in logits], target, FFL, **settings)[2]
        for g, e, s in zip(grads, exact, gradient_scale(logits, target, FFL, **settings), strict=True):
            assert ((g - e).abs() <= 2e-5 * s + 3 * 2.0**-149).all()
            assert ((e.abs() < 2.0**-126) & (e.abs() > 2.0**-146) & (g != 0)).any()


def test_masked_classes_keep_the_power_form_exact(isa):
    logits, target = random_logits(3, (4, 700)), torch.tensor([600, 601, 602, 603])
    for z in logits:
        z[:, :500] = -math.inf
    kept = [z[:, 500:].contiguous() for z in logits]
    assert_contract(distill_loss, kept, target - 500, FFL, temperature=3.0)
    whole, part = fast(logits, target, FFL), fast(kept, target - 500, FFL)
    torch.testing.assert_close(whole[0], part[0], rtol=1e-6, atol=0)
    for g, k in zip(whole[2], part[2], strict=True):
        assert (g[:, :500] == 0).all()
        torch.testing.assert_close(g[:, 500:], k, rtol=2e-6, atol=1e-8)


# ---- memory


@pytest.mark.parametrize("classes", [300_001, 131_072])
def test_many_classes(classes):
    logits, target = random_logits(3, (2, classes)), target_for(FFL, (2, classes))
    for temperature in (2.5, 3.0):
        assert_contract(distill_loss, logits, target, FFL, temperature=temperature)


def test_rows_at_odd_addresses_and_strides(isa):
    plain, target = random_logits(3, (4, 37)), target_for(FFL, (4, 37))
    expected = fast(plain, target, FFL)
    for offset, stride in ((1, 37), (3, 41), (5, 100)):
        logits = []
        for z in plain:
            memory = torch.full((offset + 4 * stride,), math.nan)
            view = memory.as_strided((4, 37), (stride, 1), offset)
            view.copy_(z)
            logits.append(view)
        assert same_bits(fast(logits, target, FFL), expected)
    one_row = [z[:1].expand(4, 37) for z in plain]
    copies = [z.contiguous() for z in one_row]
    assert same_bits(fast(one_row, target, FFL), fast(copies, target, FFL))
    assert same_bits(base(one_row, target, FFL), base(copies, target, FFL))


def test_rows_two_billion_elements_apart():
    try:
        memory = torch.empty(2**31 + 50, dtype=torch.bfloat16)  # never touched but for two rows
    except RuntimeError:
        pytest.skip("this machine does not lend 4 GB of address space")
    far = memory.as_strided((2, 50), (2**31, 1))
    near = random_logits(3, (2, 50), torch.bfloat16)
    far.copy_(near[0])
    target = torch.tensor([3, 49])
    for form in (fast, base):
        assert same_bits(form([far, *near[1:]], target, FFL), form(near, target, FFL))


def test_gradients_only_where_wanted_and_inputs_untouched():
    logits, target = random_logits(3, (4, 300)), target_for(FFL, (4, 300))
    before = [z.clone() for z in logits]
    everything = fast(logits, target, FFL)[2]
    for mask in range(1, 8):
        wanted = [bool(mask >> i & 1) for i in range(3)]
        _, _, grads = FUNCTIONS["forward_with_gradients"](logits, target, *arguments(logits, FFL), tuple(wanted))
        for g, full, want in zip(grads, everything, wanted, strict=True):
            assert g.shape == ((4, 300) if want else (0,))
            if want:
                torch.testing.assert_close(g, full, rtol=1e-6, atol=1e-9)
    assert all(map(torch.equal, logits, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scaling_rounds_once_and_skips_what_is_empty(isa, dtype):
    gradients = [*random_logits(2, (3, 171), dtype), torch.empty(0, dtype=dtype)]
    factor = torch.tensor(0.37, dtype=reference.accumulation_dtype(dtype))
    expected = [(g.to(factor.dtype) * factor).to(dtype) for g in gradients]
    torch.ops.fflfast_cpu.scale_gradients(factor, gradients)
    assert all(map(torch.equal, gradients, expected))
    torch.ops.fflfast_cpu.scale_gradients(torch.ones_like(factor), gradients)
    assert all(map(torch.equal, gradients, expected))


def test_messages_of_the_operator():
    logits, target = random_logits(3, (2, 5)), torch.tensor([0, 1])
    (t, kl, ce), (_, *rest) = arguments(logits, FFL)
    operator, table = torch.ops.fflfast_cpu.distill_loss, native.table(FFL)
    call = {"target": target, "temperature": t, "table": table}

    def distill(logits, **changes):
        now = {**call, **changes}
        return operator(logits, now["target"], now["temperature"], kl, ce, now["table"], *rest[:3], 1, 0)

    distill(logits)
    with pytest.raises(RuntimeError, match="expected 3 logits tensors, got 2"):
        distill(logits[:2])
    with pytest.raises(RuntimeError, match="logits 1 of shape"):
        distill([logits[0], logits[1][:, :4], logits[2]])
    with pytest.raises(RuntimeError, match="expected logits of float32, got float64"):
        distill([logits[0], logits[1].double(), logits[2]])
    with pytest.raises(RuntimeError, match="adjacent classes in logits 2"):
        distill([*logits[:2], torch.zeros(5, 2).t()])
    with pytest.raises(RuntimeError, match="expected temperature of float32, got float64"):
        distill(logits, temperature=t.double())
    with pytest.raises(RuntimeError, match="expected a target"):
        distill(logits, target=None)
    with pytest.raises(RuntimeError, match="expected a table of"):
        distill(logits, table=table[:-1])
