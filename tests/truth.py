"""Independent evaluations that the operators are compared with: torch.nn.functional, one op at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fflfast import DistillGraph

EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def plain_terms(logits, target, graph, *, temperature=1.0, label_smoothing=0.0, ignore_index=-100, target_eps=0.0):
    """Per-row CE and T²·KL of finite logits (rows flattened), with autograd; each of shape (rows,)."""
    z = [t.reshape(-1, t.shape[-1]) for t in logits]
    u = z + [sum(a * z[j] for j, a in enumerate(row)) for row in graph.mixtures]
    keep = torch.ones(len(z[0]), dtype=torch.bool)
    terms = []
    if target is not None:
        y = target.reshape(z[0].shape) if target.is_floating_point() else target.reshape(-1)
        if y.is_floating_point():
            y = y.to(z[0].dtype)
        else:
            keep = y != ignore_index
        for i, w in enumerate(graph.ce_weights):
            if w != 0:
                terms.append(
                    F.cross_entropy(
                        z[i], y, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="none"
                    )
                )
    for teacher, student, _, detach in graph.edges:
        t = u[teacher].detach() if detach else u[teacher]
        p = F.softmax(t / temperature, 1) + target_eps
        log_p = p.log() if target_eps else F.log_softmax(t / temperature, 1)
        kl = p * (log_p - F.log_softmax(z[student] / temperature, 1))
        terms.append(temperature**2 * kl.sum(1) * keep)
    return terms, keep


def plain_loss(logits, target, graph, *, kl_weight=1.0, ce_weight=1.0, reduction="mean", **kwargs):
    """(loss, terms) of finite logits, differentiable."""
    terms, keep = plain_terms(logits, target, graph, **kwargs)
    weights = [ce_weight * w for w in graph.ce_weights if w != 0] + [kl_weight * e.weight for e in graph.edges]
    rows = sum(w * t for w, t in zip(weights, terms, strict=True))
    count = keep.sum().clamp(min=1)
    totals = torch.stack([t.sum() for t in terms])
    if reduction == "none":
        return rows.reshape(logits[0].shape[:-1]), totals / count
    if reduction == "sum":
        return rows.sum(), totals
    return rows.sum() / count, totals / count


def gradient_scale(logits, target, graph, *, temperature, kl_weight=1.0, ce_weight=1.0, ignore_index=-100):
    """s of the tolerance rule, one tensor a logits tensor: [μ ce (p+y) + λT Σ_e w (p_s+p_t)] / n, in float64."""
    z = [t.detach().double() for t in logits]
    u = z + [sum(a * z[j] for j, a in enumerate(row)) for row in graph.mixtures]
    num_classes = z[0].shape[-1]
    count = 1 if target is None or target.is_floating_point() else max(int((target != ignore_index).sum()), 1)
    if target is None or target.is_floating_point():
        count = max(z[0][..., 0].numel(), 1)
    scales = [torch.zeros_like(t) for t in z]
    if target is not None:
        y = target.double() if target.is_floating_point() else F.one_hot(target.clamp(min=0), num_classes).double()
        for i, w in enumerate(graph.ce_weights):
            scales[i] += abs(ce_weight * w) * (F.softmax(z[i], -1) + y)
    for teacher, student, w, detach in graph.edges:
        both = F.softmax(z[student] / temperature, -1) + F.softmax(u[teacher] / temperature, -1)
        share = abs(kl_weight * w) * temperature * both
        scales[student] += share
        if not detach:
            row = [float(j == teacher) for j in range(len(z))] if teacher < len(z) else graph.mixtures[teacher - len(z)]
            for j, a in enumerate(row):
                scales[j] += a * share
    return [s / count for s in scales]


def run(loss_fn, logits, target, graph, **kwargs):
    """(loss, terms, gradients) of a loss function on fresh leaves of the same layout."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in logits]
    loss, terms = loss_fn(leaves, target, graph, **kwargs)
    loss.sum().backward()
    return loss.detach(), terms.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def assert_contract(ours, logits, target, graph, *, temperature=1.0, kl_weight=1.0, ce_weight=1.0, **kwargs):
    """The tolerance rule of the contract: at most 4 × the error of the same formula in PyTorch's ops, plus a floor."""
    settings = {"temperature": temperature, "kl_weight": kl_weight, "ce_weight": ce_weight, **kwargs}
    dtype = logits[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = run(plain_loss, [t.double() for t in logits], target, graph, **settings)
    plain = run(plain_loss, [t.to(wide) for t in logits], target, graph, **settings)
    got = run(ours, logits, target, graph, **settings)
    floor = 1e-6 if wide == torch.float32 else 1e-14
    for name, g, p, e in (("loss", got[0], plain[0], exact[0]), ("terms", got[1], plain[1], exact[1])):
        assert g.dtype == wide
        assert g.shape == e.shape, name
        allowed = 4 * (p.double() - e).abs().max() + floor * e.abs()
        assert ((g.double() - e).abs() <= allowed).all(), (name, g, e)
    scales = gradient_scale(
        logits, target, graph, temperature=temperature, kl_weight=kl_weight, ce_weight=ce_weight,
        ignore_index=kwargs.get("ignore_index", -100),
    )  # fmt: skip
    for g, p, e, s in zip(got[2], plain[2], exact[2], scales, strict=True):
        assert g.dtype == dtype
        s = s.clamp(min=1e-300)
        ratio = ((g.double() - e).abs() - EPS[dtype] * e.abs()) / s
        baseline = ((p.double() - e).abs() / s).max()
        # float64 is measured against itself, so its baseline is zero; subnormals of a 16-bit type have an absolute
        # floor.
        small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        excess = (ratio > 4 * baseline + 4e-15) & ((g.double() - e).abs() > small)
        assert not excess.any(), (float(ratio.max()), float(baseline))


def random_logits(count: int, shape: tuple[int, ...], dtype=torch.float32, scale=3.0, seed=0) -> list[Tensor]:
    """`count` tensors of normal logits."""
    generator = torch.Generator().manual_seed(seed)
    wide = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    return [(torch.randn(shape, **wide) * scale).to(torch.get_default_device(), dtype) for _ in range(count)]


def target_for(graph, shape, seed=1):
    """Random class indices for logits of `shape`, None where the graph has no CE term."""
    if not graph.needs_target:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape[-1], shape[:-1], generator=generator, device="cpu").to(torch.get_default_device())


GRAPHS = {
    "ffl2": DistillGraph.ffl(2),
    "ffl4": DistillGraph.ffl(4),
    "dml3": DistillGraph.dml(3),
    "cl3": DistillGraph.cl(3),
    "one3": DistillGraph.one(3),
    "pcl3": DistillGraph.pcl(3),
    "okddip2": DistillGraph.okddip(2),
    "mcl_okd3": DistillGraph.mcl_okd(3),
    "oem2": DistillGraph.oem(2),
    "afd3": DistillGraph.afd(3),
    "kdcl2": DistillGraph.kdcl(2),
    "okdhp2": DistillGraph.okdhp(2),
    "kd": DistillGraph.kd(),
    "single": DistillGraph.single(),
    "trainable": DistillGraph(
        3, (1, 0.5, 0), ((0.25, 0.5, 0.75),), ((2, 0, 0.7, False), (3, 1, 1.3, False), (3, 2, 0.2), (0, 1, 2.0, False))
    ),
}
