"""The fusion module beside its composition in float32 and float64, and how they are compared."""

from __future__ import annotations

import pytest
import torch
from test_fuse_features import CASES, Composition, pair, step

from fflfast.functional import NormParams

SLOW = ("triton", "emulated")  # interpreted and emulated, a hundred times slower


def once_where_slow(backend, first):
    """Leave out what repeats, for the slow backends, that the way to the stages does not depend on them."""
    if backend in SLOW and not first:
        pytest.skip("the slow backends run one of these")


def float_pair(case, dtype=torch.float32):
    """Ours and the composition in float32, the composition in float64, and feature maps that float32 holds."""
    ours, plain, features = pair(CASES[case], torch.float32)
    exact = Composition([f.shape[1] for f in features], 6, 7).double()
    exact.load_state_dict(ours.state_dict())
    return ours, plain, exact, [f.to(dtype).double() for f in features]


def assert_near(got, plain, exact, extra=0.0):
    """At most 4 × the error of PyTorch's operators, plus a floor.

    The floor is 3e-6 of the largest value: what a sum leaves after cancelling is a chance of the order, and two norms
    lie between a loss and its gradients.
    """
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if not e.is_floating_point():
            assert torch.equal(g, e), i
            continue
        allowed = 4 * (p.double() - e).abs().max() + (3e-6 + extra) * e.abs().max()
        assert (g.double() - e).abs().max() <= allowed, (i, (g.double() - e).abs().max(), allowed)


def steps(ours, plain, exact, features):
    """A step of ours and of the composition in float32, and of the composition in float64.

    The layout decides which of PyTorch's kernels run, and so how they round: the one that errs more is the baseline.
    """
    truth = step(exact, features)
    narrow = [f.float() for f in features]
    buffers = [b.clone() for b in plain.buffers()]
    baseline = step(plain, narrow)
    for buffer, before in zip(plain.buffers(), buffers, strict=True):
        buffer.copy_(before)
    plain.zero_grad()
    if len({f.shape[2:] for f in features}) == 1:
        whole = torch.cat(narrow, 1).contiguous(memory_format=torch.channels_last)
        out, gradient, *rest = step(plain, [whole])
        other = [out, *gradient.split([f.shape[1] for f in features], 1), *rest]
        errors = [[(r - t).abs().max() for r, t in zip(run, truth, strict=True)] for run in (baseline, other)]
        baseline = [o if e2 > e1 else b for b, o, e1, e2 in zip(baseline, other, *errors, strict=True)]
    return step(ours, narrow), baseline, truth


def functional_case(dtype=torch.float32, requires_grad=True):
    ours, _, features = pair(CASES["unequal_channels"], torch.float32)
    norms = [NormParams(n.weight, n.bias, n.running_mean, n.running_var, n.eps, True) for n in
             (ours.depthwise_norm, ours.pointwise_norm)]  # fmt: skip
    leaves = [f.to(dtype).requires_grad_(requires_grad) for f in features]
    return leaves, (ours.depthwise.weight, norms[0], ours.pointwise.weight, norms[1])
