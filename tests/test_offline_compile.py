"""Every kernel compiles for every GPU it is meant for, and keeps its numbers in registers."""

from __future__ import annotations

import offline_compile
import pytest
from offline_compile import CUDA_TARGETS, PTX_TARGET, TRITON_TARGETS, Missing

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* in, float* out) {
  float held[128];
  for (int i = 0; i < 128; ++i) held[i] = in[128 * threadIdx.x + i];
  __syncthreads();
  for (int i = 0; i < 128; ++i) out[128 * threadIdx.x + i] = held[i] * held[127 - i];
}
"""
LOG = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function 'wide' for 'sm_90a'
ptxas info    : Function properties for wide
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'narrow' for 'sm_80'
ptxas info    : Function properties for narrow
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 400 bytes cmem[0]
"""
SASS = """
arch = sm_90a
        Function : wide
        /*0100*/                   LDG.E.EF.128 R8, desc[UR12][R4.64] ;
        /*0110*/                   LDG.E.LTC128B.64 R8, desc[UR12][R4.64] ;
        /*0120*/                   STG.E.U16 desc[UR12][R2.64], R4 ;
arch = sm_80
        Function : narrow
        /*0100*/                   LDG.E.CONSTANT R8, [R4.64] ;
        /*0110*/                   LDGSTS.E.BYPASS.64 [R7], [R4.64] ;
"""


@pytest.fixture(scope="module")
def compiled():
    """Source -> resources of its kernels; all are compiled at once, on two cores."""
    try:
        sources = [*offline_compile.cuda_sources(), offline_compile.ROOT / "tests" / "simt" / "toys.cu"]
        results = offline_compile.compile_cuda(sources)
    except Missing as reason:
        pytest.skip(str(reason))
    return {source.name: [r for r in results if r.source == source.name] for source in sources}


@pytest.fixture(scope="module")
def triton_compiled():
    """Each variant on one of the targets, in turn; the report of `offline_compile.py` takes all of them."""
    try:
        return offline_compile.compile_triton(every_target=False)
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("source", [source.name for source in offline_compile.cuda_sources()] + ["toys.cu"])
def test_cuda_kernels_do_not_spill(compiled, source):
    results = compiled[source]
    kernels = {r.kernel for r in results}
    assert {(r.kernel, r.target) for r in results} == {(k, t) for k in kernels for t in CUDA_TARGETS}
    assert [r for r in results if r.spills or r.stack] == []


def test_cuda_kernels_move_sixteen_bytes_at_a_time(compiled):
    loads, both = {}, {}
    for r in (r for results in compiled.values() for r in results):
        name = r.kernel.split("<")[0].split("::")[-1]
        loads[name] = max(loads.get(name, 0), r.widest_load)
        both[name] = max(both.get(name, 0), min(r.widest_load, r.widest_store))
    for name in ("pipeline", "scale_gradients", "distill_rows", "backward_inputs"):
        assert both[name] == 128, name
    for name in ("depthwise_statistics", "pool"):  # which write a few sums
        assert loads[name] == 128, name


def test_a_spill_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_compile, "CACHE", tmp_path)
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    try:
        results = offline_compile.compile_cuda([source])
    except Missing as reason:
        pytest.skip(str(reason))
    assert [r.target for r in results] == sorted(CUDA_TARGETS)
    assert all(r.spills > 0 and r.stack > 0 and r.registers <= 64 for r in results)


def test_what_does_not_compile_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_compile, "CACHE", tmp_path)
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { undeclared(); }\n")
    try:
        with pytest.raises(RuntimeError, match="undeclared"):
            offline_compile.compile_cuda([source])
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("target", TRITON_TARGETS)
def test_triton_kernels_compile_and_do_not_spill(triton_compiled, target):
    results = [r for r in triton_compiled if r.target == str(target)]
    assert len(results) > 10
    assert offline_compile.spilled(results) == []


def test_triton_fusion_kernels_are_compiled_and_load_sixteen_bytes(triton_compiled):
    widest: dict[str, int] = {}
    for r in triton_compiled:
        name = r.kernel.split()[0]
        widest[name] = max(widest.get(name, 0), r.widest_load)
    for name in ("depthwise_statistics", "pointwise", "pool", "inference", "backward_product", "weight_gradient"):
        assert widest[f"{name}_kernel"] == 128, name
    assert {"backward_pool_kernel", "backward_inputs_kernel", "update_running_kernel"} <= widest.keys()


def test_triton_augmentation_writes_sixteen_bytes_and_spills_nothing(triton_compiled):
    results = [r for r in triton_compiled if r.kernel.startswith("augment ")]
    assert {r.target for r in results} == {str(t) for t in TRITON_TARGETS}
    assert {(r.spills, r.stack, r.shared, r.widest_store) for r in results} == {(0, 0, 0, 128)}


def test_reads_the_compilers_reports():
    assert offline_compile._ptxas_properties(LOG) == {
        ("wide", "90a"): (40, 128, 16, 56),
        ("narrow", "80"): (12, 0, 8, 0),
    }
    widest = offline_compile._widest_accesses(SASS)
    assert (widest["wide", "90a"], widest["narrow", "80"], widest["other", "80"]) == ((128, 16), (64, 0), (0, 0))


def test_table_puts_targets_side_by_side():
    rows = [offline_compile.Resources("a.cu", "k", t, 10 + i, 0, 0, 0, 128, 64) for i, t in enumerate(CUDA_TARGETS)]
    text = offline_compile.table(rows)
    assert "| a.cu | k | 80/90a/100 | 10/11/12 | 0 | 0 | 0 | 128 | 64 |" in text
    assert PTX_TARGET not in CUDA_TARGETS  # PTX is checked for its presence; its machine code is the driver's to make
