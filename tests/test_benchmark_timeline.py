"""`python -m benchmarks.train.timeline`: from a trace to figures, parts and a picture, on traces made by hand."""

from __future__ import annotations

import dataclasses
import functools
import sys

import pytest
import torch
from bench_runs import CPU, resolved
from test_benchmarks import module, on_path  # noqa: F401 (a fixture)

from fflfast.bench import Variant
from fflfast.bench.subject import Job
from fflfast.training import ConfigError
from fflfast.training.build import build_learner


@pytest.fixture
def trace():
    return module("train.trace")


@pytest.fixture
def timeline():
    return module("train.timeline")


def event(category, start, length, name="k", *, tid=1, **arguments):
    """An event as the profiler exports it, in microseconds."""
    return {
        "ph": "X", "cat": category, "name": name, "pid": 0, "tid": tid, "ts": start, "dur": length, "args": arguments,
    }  # fmt: skip


def kernel(start, length, stream=7, name="k", category="kernel", **arguments):
    return event(category, start, length, name, tid=stream, stream=stream, **arguments)


def figures(trace, *events):
    return dataclasses.asdict(trace.figures_of(trace.kernels_of(events)))


# ---- figures --------------------------------------------------------------------------------------------------


def test_two_streams_that_overlap_by_half(trace):
    found = figures(trace, kernel(100, 10), kernel(105, 10, stream=20))
    assert found == {
        "span_ms": 0.015, "kernel_ms": 0.02, "busy_ms": 0.015, "overlap": pytest.approx(4 / 3),
        "two_streams": pytest.approx(1 / 3), "two_kernels": pytest.approx(1 / 3), "kernels": 2, "streams": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], {"span_ms": 0, "overlap": 0, "two_streams": 0, "two_kernels": 0, "kernels": 0, "streams": 0}),
        ([kernel(5, 0)], {"span_ms": 0, "kernel_ms": 0, "overlap": 0, "two_streams": 0, "kernels": 1, "streams": 1}),
        # Touching, on one stream and on two, where a sum of floats would make them overlap.
        ([kernel(0.1, 0.2), kernel(0.3, 0.1)], {"span_ms": 0.0003, "overlap": 1, "two_kernels": 0}),
        ([kernel(4548838457546.766, 0.2), kernel(4548838457546.966, 1, 9)], {"overlap": 1, "two_streams": 0}),
        # A gap is in the span and in nothing else.
        ([kernel(0, 1), kernel(9, 1, 9)], {"span_ms": 0.01, "busy_ms": 0.002, "overlap": 1, "two_streams": 0}),
        # Nested and unordered.
        ([kernel(4, 2, 9), kernel(0, 10)], {"span_ms": 0.01, "overlap": 1.2, "two_streams": 0.2, "two_kernels": 0.2}),
        # One stream alone, as a graph may be shown: two kernels at once, never two streams.
        ([kernel(5, 5), kernel(0, 10)], {"overlap": 1.5, "two_streams": 0, "two_kernels": 0.5, "streams": 1}),
        # Three streams at once count once; two kernels at once on a stream are one stream.
        ([kernel(0, 4, s) for s in (1, 2, 3)], {"overlap": 3, "two_streams": 1, "two_kernels": 1, "streams": 3}),
        ([kernel(0, 4, 1), kernel(1, 4, 1), kernel(4, 4, 2)], {"two_streams": 0.125, "two_kernels": 0.5}),
        # Copies and fills are work too; ranges, operators and events without a length are none.
        (
            [kernel(0, 2, category="gpu_memcpy"), kernel(1, 2, 9, category="gpu_memset"),
             kernel(0, 99, category="gpu_user_annotation"), event("cpu_op", 0, 99), event("cuda_runtime", 0, 99),
             {"ph": "M", "name": "process_name", "args": {}}, {"ph": "i", "cat": "kernel", "name": "k", "ts": 0},
             {"ph": "s", "cat": "ac2g", "id": 1, "ts": 0, "name": "ac2g"}],
            {"span_ms": 0.003, "kernel_ms": 0.004, "kernels": 2, "streams": 2, "two_streams": 1 / 3},
        ),
        # Zero length inside another, and where two touch.
        ([kernel(0, 4), kernel(2, 0, 9), kernel(4, 0, 8)], {"overlap": 1, "two_streams": 0, "kernels": 3}),
    ],
)  # fmt: skip
def test_nasty_traces(trace, events, wanted):
    found = figures(trace, *events)
    assert {key: found[key] for key in wanted} == {key: pytest.approx(value) for key, value in wanted.items()}


def test_a_kernel_without_a_stream_is_on_its_row_of_the_trace_or_on_none(trace):
    events = [
        event("kernel", 0, 1, tid=20),
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 2, "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "no length", "ts": 1, "tid": 20, "args": {}},
    ]
    found = trace.kernels_of(events)
    assert [(k.name, k.stream, k.start, k.end, k.launch) for k in found] == [
        ("k", "20", 0, 1000, None), ("no length", "20", 1000, 1000, None), ("Memset", "?", 2000, 3000, None)
    ]  # fmt: skip
    assert trace.figures_of(found).streams == 2


def test_lanes(trace):
    kernels = [trace.Kernel("k", "kernel", "7", *span) for span in ((5, 9), (0, 5), (2, 7), (6, 6), (7, 8), (9, 9))]
    # (0, 5) and (5, 9) touch and share a lane; (6, 6) and (7, 8) lie in others than what they lie in.
    assert trace.lanes(kernels) == [0, 0, 1, 2, 1, 0]
    assert trace.lanes([]) == []


# ---- parts and kinds ------------------------------------------------------------------------------------------


def host_events():
    """A sub-network inside the trunk's range, its backward on another thread, and an optimizer."""
    backward = "autograd::engine::evaluate_function: ConvolutionBackward0"
    return [
        event("user_annotation", 0, 100, "timeline: trunk"),
        event("user_annotation", 40, 20, "timeline: sub-network 0"),
        event("user_annotation", 300, 10, "Optimizer.step#SGD.step"),
        event("user_annotation", 0, 999, "somebody else's"),
        event("cpu_op", 38, 1, "aten::view", **{"Sequence number": 5, "Fwd thread id": 0}),
        event("cpu_op", 41, 1, "aten::convolution", **{"Sequence number": 5, "Fwd thread id": 0}),
        event("cpu_op", 200, 10, backward, tid=2, **{"Sequence number": 5, "Fwd thread id": 1}),
        event("cpu_op", 220, 10, backward, tid=2, **{"Sequence number": 77, "Fwd thread id": 1}),
    ]


@pytest.mark.parametrize(
    ("launch", "thread", "part"),
    [
        (10, 1, "trunk"),
        (42, 1, "sub-network 0"),  # the innermost range
        (80, 1, "trunk"),
        (305, 1, "optimizer"),
        (150, 1, "rest"),
        (205, 2, "sub-network 0"),  # the last operator of its number made the node
        (225, 2, "rest"),  # a node that nobody's forward made
        (215, 2, "rest"),  # between nodes
        (10, 2, "rest"),  # ranges of another thread
        (205, 3, "rest"),
    ],
)
@pytest.mark.parametrize("category", ["cuda_runtime", "cuda_driver"])
def test_the_part_is_that_of_the_launch(trace, launch, thread, part, category):
    events = [
        event(category, launch, 1, "cudaLaunchKernel", tid=thread, correlation=9),
        kernel(900, 5, correlation=9),
        *host_events(),
    ]
    assert list(trace.parts_of(events, trace.kernels_of(events))) == [part]


def test_kernels_of_a_graph_and_without_a_launch_are_nobodys(trace, timeline):
    events = [
        *host_events(),
        event("cuda_runtime", 10, 1, "cudaGraphLaunch", correlation=9),
        event("cuda_runtime", 20, 1, "cudaLaunchKernel", correlation=10),
        kernel(900, 5, correlation=9, name="sm90_xmma_fprop"),
        kernel(906, 5, correlation=10, name="void at::native::reduce_kernel<512>()"),
        kernel(912, 5, name="Memset (Device)", category="gpu_memset"),
    ]
    kernels = trace.kernels_of(events)
    assert list(trace.parts_of(events, kernels)) == ["unknown", "trunk", "unknown"]
    panel = timeline.panel_of("graph", events)
    assert (panel.coloured_by, panel.labels) == ("kind", ["convolution, product", "reduction", "fill"])
    known = timeline.panel_of("serial", [*events, kernel(920, 1, correlation=10), kernel(921, 1, correlation=10)])
    assert (known.coloured_by, known.labels) == ("part", ["unknown", "trunk", "unknown", "trunk", "trunk"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("augment_kernel", "ours"),
        ("void fflfast::cuda::(anonymous namespace)::rows_kernel<float, 3>(Parameters)", "ours"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimizer"),
        ("void cudnn::bn_fw_tr_1C11_singleread<float, 512>", "norm"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", "change of layout"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16", "convolution, product"),
        ("nvjet_hsh_128x64_TNN", "convolution, product"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "elementwise"),
        ("void at::native::(anonymous namespace)::max_pool_forward_nhwc<float>", "other"),
    ],
)
def test_kinds(trace, name, kind):
    assert trace.kind_of(trace.Kernel(name, "kernel", "7", 0, 1)) == kind
    assert trace.kind_of(trace.Kernel(name, "gpu_memcpy", "7", 0, 1)) == "copy"


@functools.cache
def recording():
    """A step of a small cohort, profiled on the CPU."""
    return module("train.timeline").recorded(Job(Variant("ours", "streams"), resolved(), None, 1))


def test_a_real_step_says_whose_each_convolution_is(trace):
    times, events = recording()
    assert 0 < times.least <= times.median
    assert times.repetitions == module("train.timeline").BLOCKS
    made_up = [
        made
        for k, op in enumerate(e for e in events if e.get("cat") == "cpu_op" and "conv" in e["name"])
        if op["name"] in ("aten::convolution", "aten::convolution_backward")
        for made in (
            event("cuda_runtime", op["ts"] + op["dur"] / 2, 0, "cudaLaunchKernel", tid=op["tid"], correlation=k),
            kernel(op["ts"], 1, name=op["name"], correlation=k),
        )
    ]
    kernels = trace.kernels_of(made_up)
    owned = sorted(zip(trace.parts_of([*events, *made_up], kernels), (k.name for k in kernels), strict=True))
    counts = {pair: owned.count(pair) for pair in owned}
    forward, backward = "aten::convolution", "aten::convolution_backward"
    assert {part for part, _ in counts} == {"trunk", "sub-network 0", "sub-network 1"}
    for part in ("trunk", "sub-network 0", "sub-network 1"):
        assert counts[part, forward] == counts[part, backward] > 0
    assert counts["sub-network 0", forward] == counts["sub-network 1", forward] < counts["trunk", forward]


def test_a_real_step_names_fusion_loss_and_optimizer():
    names = [e["name"] for e in recording()[1] if e.get("cat") == "user_annotation"]
    assert names.count("timeline: fusion and loss") == 1
    assert any(name.startswith("Optimizer.step") for name in names)


def test_marks_are_taken_off_again(timeline):
    learner = build_learner(resolved(), 10)
    found = learner.cohort.runner
    with timeline.marked(learner):
        assert "forward" in vars(learner.method)
        assert learner.cohort.runner([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]
    assert learner.cohort.runner is found
    assert "forward" not in {**vars(learner.method), **vars(learner.cohort)}


# ---- picture and command --------------------------------------------------------------------------------------


def test_rows_are_streams_in_order_and_packed_where_there_are_many(trace):
    picture = module("train.timeline_picture")
    few = trace.kernels_of([kernel(5, 9, 7), kernel(0, 9, 20), kernel(30, 1, 7)])
    assert picture.rows_of(few) == {"stream 20": [0], "stream 7": [1, 2]}
    many = trace.kernels_of([kernel(10 * k, 12, stream=k) for k in range(picture.MOST_ROWS + 1)])
    assert picture.rows_of(many) == {"1 at once": [0, 2, 4, 6, 8], "2 at once": [1, 3, 5, 7]}
    assert picture.rows_of([]) == {"no kernel": []}


def test_the_picture(trace, tmp_path):
    pytest.importorskip("matplotlib")
    picture = module("train.timeline_picture")
    kernels = trace.kernels_of([kernel(0, 9), kernel(2, 0), kernel(3, 4), kernel(5, 9, 20, category="gpu_memcpy")])
    panels = [
        picture.Panel("serial", kernels, ["trunk", "rest", "unknown", "sub-network 0"], "part", "a line of figures"),
        picture.Panel("graph", kernels, ["norm", "other", "norm", "copy"], "kind"),
        picture.Panel("streams", [], [], "part"),
    ]
    picture.draw(tmp_path / "timeline.svg", "title", panels)
    text = (tmp_path / "timeline.svg").read_text(encoding="utf-8")
    for words in ("title", "a line of figures", "stream 20", "stream 7", "no kernel", "sub-network 0"):
        assert f"<!-- {words} -->" in text, words
    colours = picture._colours(panels, "part")
    assert colours["rest"] != colours["trunk"] != colours["sub-network 0"] != colours["unknown"]
    picture.draw(tmp_path / "timeline.png", "title", panels)
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("device", "reason"), [("cuda", "no CUDA device"), ("cpu", "cpu has no streams")])
def test_without_a_gpu(timeline, monkeypatch, capsys, tmp_path, device, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["timeline", "--device", device, "--out", str(tmp_path / "out")])
    assert timeline.main() == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def as_if_there_were_a_gpu(timeline, monkeypatch, tmp_path):
    made = module("report").provenance(CPU, "benchmarks.train.timeline")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timeline.report, "provenance", lambda device, command: made)
    # The real function, on a CPU and on traces that are made up.
    real = timeline._measured
    monkeypatch.setattr(timeline, "_measured", lambda case, plan, device: real(case, plan, CPU))
    monkeypatch.setattr(timeline, "recorded", fake_recording)
    case = module("train.cases").Case("2 × tiny", ("tiny", "tiny"), 10, "synthetic", 8, 24, "bf16")
    fast = dataclasses.replace(case, compile=True)
    other = dataclasses.replace(case, batch_size=48)
    monkeypatch.setattr(timeline, "cases", lambda device: (case, fast, other, dataclasses.replace(case, amp="off")))
    return lambda *arguments: monkeypatch.setattr(sys, "argv", ["timeline", "--out", str(tmp_path), *arguments])


def fake_recording(job):
    times = module("measure").Times.of([0.001, 0.002, 0.003])
    if job.variant.plan == "streams":
        raise ConfigError("no such plan\nhere")
    if job.variant.plan == "graph" and job.config.batch_size == 48:
        return times, host_events()
    name = "cudaGraphLaunch" if job.variant.plan == "graph" else "cudaLaunchKernel"
    events = [
        *host_events(),
        event("cuda_runtime", 10, 1, name, correlation=1),
        kernel(1000, 400, 7, correlation=1),
        kernel(1200, 400, 20, correlation=1),
    ]
    return times, events


def test_the_command(as_if_there_were_a_gpu, timeline, tmp_path, capsys):
    as_if_there_were_a_gpu()
    assert timeline.main() == 0
    rows = module("report").read(tmp_path / "timeline.csv")
    assert [(row["batch"], row["plan"]) for row in rows] == [("24", plan) for plan in timeline.PLANS]
    serial, streams, graph = rows
    assert (serial["step_ms"], serial["p20_ms"], serial["span_ms"], serial["kernel_ms"]) == ("2", "1", "0.6", "0.8")
    assert (float(serial["overlap"]), float(serial["two_streams"])) == pytest.approx((4 / 3, 1 / 3), rel=1e-4)
    assert (serial["coloured_by"], graph["coloured_by"]) == ("part", "kind")
    assert (streams["not_measured"], streams["step_ms"]) == ("ConfigError: no such plan", "")
    assert all(row["torch"] and row["command"] for row in rows)
    text = (tmp_path / "timeline.md").read_text(encoding="utf-8")
    assert "| serial | 2 (1 … 3) | 0.6 | 0.8 | 1.33 | 33 % | 33 % | 2 | 2 | part |" in text
    assert "- streams not measured: ConfigError: no such plan" in text
    assert text.strip() in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert serial["picture"] == "timeline-2-tiny-batch-24-bf16-channels-last.png"
    assert f"]({serial['picture']})" in text
    assert (tmp_path / serial["picture"]).read_bytes().startswith(b"\x89PNG")


def test_cases_by_name_and_a_profiler_that_sees_nothing(
    as_if_there_were_a_gpu, timeline, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(timeline, "draw", lambda *arguments: None)
    as_if_there_were_a_gpu("--case", "batch 48")
    assert timeline.main() == 0
    rows = module("report").read(tmp_path / "timeline.csv")
    assert [row["batch"] for row in rows] == ["48"] * 3
    assert "saw no kernel" in rows[-1]["not_measured"]
    as_if_there_were_a_gpu("--case", "no such case")
    assert timeline.main() == 1
    assert "no case of that name" in capsys.readouterr().err


def test_a_trace_has_the_fields_that_are_read(timeline):
    events = timeline.traced(lambda: torch.ones(3).sum(), CPU)
    found = next(e for e in events if e["name"] == "aten::sum")
    assert {"ph", "cat", "tid", "ts", "dur", "args"} <= set(found)
