"""fuse_features under what else looks at an operator: opcheck, torch.compile, FakeTensor, export, hooks, transforms."""

from __future__ import annotations

import pytest
import torch
from fusion_pairs import assert_near, float_pair, functional_case, once_where_slow, steps
from test_fuse_features import assert_same, step
from torch._subclasses.fake_tensor import FakeTensorMode

from fflfast.functional import NormParams, fuse_features


def detached(arguments):
    flat = [detached(a) if isinstance(a, (list, tuple)) else a for a in arguments]
    return [a.detach() if isinstance(a, torch.Tensor) else a for a in flat]


def test_opcheck(fusion_backend):
    once_where_slow(fusion_backend, fusion_backend == "emulated")
    leaves, (depthwise, one, pointwise, two) = functional_case()
    for training in ((True, True), (True, False), (False, False)):
        norms = [
            (n.weight, n.bias, *((None, None) if t else n[2:4]), n.eps, t, None)
            for n, t in zip((one, two), training, strict=True)
        ]
        arguments = (leaves, depthwise, *norms[0], pointwise, *norms[1])
        torch.library.opcheck(torch.ops.fflfast.fuse_features.default, arguments)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.fflfast.fuse_features_inference.default, detached(arguments))
    moments, counts = [torch.rand(2, 4), torch.rand(2, 3)], [torch.tensor(5.0), torch.tensor(5.0)]
    running = [torch.rand(c) for c in (4, 4, 3, 3)]
    batches = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    torch.library.opcheck(torch.ops.fflfast.update_running.default, (moments, counts, running, batches, [0.1, -1.0]))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiles_without_a_graph_break(fusion_backend, mode):
    ours, plain, exact, features = float_pair("unequal_channels")
    torch._dynamo.reset()
    for module in (ours, plain, exact):
        module.train(mode == "train")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_near(*steps(compiled, plain, exact, features))
        for module in (ours, plain, exact):
            module.zero_grad()
    assert_near(ours.buffers(), plain.buffers(), exact.buffers())
    with torch.no_grad():
        assert_near(
            [compiled([f.float() for f in features])], [plain([f.float() for f in features])], [exact(features)]
        )


def test_compiles_through_inductor_and_under_autocast():
    ours, plain, _, features = float_pair("two_equal")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    maps = [f.float() for f in features]
    assert_same(step(compiled, maps), step(plain, maps), rtol=1e-3, atol=1e-4)
    assert_same(ours.buffers(), plain.buffers(), rtol=1e-5, atol=1e-6)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert compiled(maps).dtype == torch.bfloat16


def test_fake_tensors(fusion_backend):
    leaves, rest = functional_case(requires_grad=False)
    real = fuse_features(leaves, *rest)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(x) for x in leaves]
        weights = [mode.from_tensor(w) for w in (rest[0], rest[2])]
        norms = [NormParams(*(mode.from_tensor(t) for t in n[:4]), n.eps, True) for n in (rest[1], rest[3])]
        output = fuse_features(fake, weights[0], norms[0], weights[1], norms[1])
    assert output.pooled.shape == real.pooled.shape
    assert [t.shape for t in output.statistics] == [t.shape for t in real.statistics]


def test_exports_in_reference_arithmetic(fusion_backend):
    ours, _, _, features = float_pair("two_equal")
    maps = [f.float() for f in features]
    program = torch.export.export(ours.eval(), (maps,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fflfast" in target for target in targets), targets
    torch.testing.assert_close(program.module()(maps), ours(maps), rtol=1e-4, atol=1e-5)


def test_saved_tensors_are_unpacked_once(fusion_backend, route):
    """Each look at them runs the hooks of whoever holds them: save_on_cpu would copy twice, checkpoint refuses."""
    leaves, rest = functional_case()
    packed, unpacked = [], []

    def pack(t):
        packed.append(t)
        return t

    def unpack(t):
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        pooled = fuse_features(leaves, *rest).pooled
    pooled.sum().backward()
    assert len(unpacked) <= len(packed)


def test_forward_mode_and_transforms_are_refused(fusion_backend):
    if fusion_backend == "reference":
        pytest.skip("PyTorch's own operators have both")
    leaves, rest = functional_case(requires_grad=False)
    with pytest.raises(RuntimeError, match="forward mode or a transform"):
        torch.func.grad(lambda x: fuse_features([x, *leaves[1:]], *rest).pooled.sum())(leaves[0])
    with pytest.raises(RuntimeError, match="forward mode or a transform"):
        torch.func.jvp(lambda x: fuse_features([x, *leaves[1:]], *rest).pooled, (leaves[0],), (leaves[0],))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms_are_refused(backend):
    leaves, rest = functional_case(requires_grad=False)
    torch._dynamo.reset()

    def tangent(x, t):
        return torch.func.jvp(lambda x: fuse_features([x, *leaves[1:]], *rest).pooled, (x,), (t,))[1]

    with pytest.raises(RuntimeError, match="forward mode or a transform"):
        torch.compile(tangent, backend=backend)(leaves[0], leaves[0])
