"""Operators on tensors of any size, held against the definitions a part at a time; what is wrong in one row is found.

`test_gpu_large.py` runs them with more than 2³¹ elements, `test_large.py` with few, and with wrong results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from truth import gradient_scale, plain_loss

from fflfast import distill_loss
from fflfast.ops import fusion_reference
from fflfast.ops.augment import augment
from fflfast.ops.augment_reference import augment as reference_augment
from fflfast.ops.fusion_reference import Norm

BF16 = torch.bfloat16
EPS = 2.0**-7  # of bfloat16; numbers that were rounded to it are off by half of that at most


def parts(count: int, size: int) -> list[slice]:
    """0 … count cut into parts of `size` or fewer."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# ---- the loss


class Losses(NamedTuple):
    """What a call of the loss gave, and the factor of each row's gradient."""

    loss: Tensor
    terms: Tensor
    gradients: list[Tensor]
    weights: Tensor


OPTIONS = {"temperature": 3.0, "kl_weight": 0.5}


def draw_logits(count, rows, num_classes, device, dtype=BF16):
    """Logits made where they lie, and classes, of which every seventh is to be ignored."""
    torch.manual_seed(0)
    logits = [torch.randn(rows, num_classes, dtype=dtype, device=device).mul_(3) for _ in range(count)]
    target = torch.randint(num_classes, (rows,), device=device)
    target[3::7] = -100
    return logits, target


def run_loss(logits, target, graph, reduction) -> Losses:
    """Forward and backward; a mean from a grad_output of 2, so that written gradients are scaled too."""
    leaves = [z.detach().requires_grad_() for z in logits]
    loss, terms = distill_loss(leaves, target, graph, reduction=reduction, **OPTIONS)
    if reduction == "mean":
        grad, counted = torch.full_like(loss, 2.0), int((target != -100).sum())
        weights = torch.full((len(target),), 2.0 / counted, dtype=torch.float64, device=loss.device)
    else:
        grad = torch.linspace(0.5, 2.0, len(target), device=loss.device)
        weights = grad.double()
    return Losses(loss.detach(), terms, list(torch.autograd.grad(loss, leaves, grad)), weights)


def assert_loss(found: Losses, logits, target, graph, reduction, *, chunk):
    """Loss, terms and every row of every gradient, `chunk` rows at a time in float64."""
    total, terms, counted = 0.0, torch.zeros_like(found.terms, dtype=torch.float64), 0
    for part in parts(len(target), chunk):
        leaves, y = [z[part].double().requires_grad_() for z in logits], target[part]
        rows, means = plain_loss(leaves, y, graph, reduction="none", **OPTIONS)
        here = int((y != -100).sum())
        gradients = torch.autograd.grad(rows.sum(), leaves)
        scales = gradient_scale(leaves, y, graph, **OPTIONS)  # of a mean over those that count here
        factor = found.weights[part, None]
        for k, (own, exact, scale) in enumerate(zip(found.gradients, gradients, scales, strict=True)):
            error = (own[part].double() - factor * exact).abs()
            allowed = factor * (EPS * exact.abs() + 1e-4 * max(here, 1) * scale)
            wrong = (~(error <= allowed)).any(1).nonzero().flatten()
            assert not len(wrong), f"gradient {k}, row {part.start + int(wrong[0])} of {len(target)}"
        if reduction == "none":
            torch.testing.assert_close(found.loss[part].double(), rows.detach(), rtol=1e-4, atol=1e-5)
        total, terms, counted = total + float(rows.detach().sum()), terms + means.detach() * here, counted + here
    if reduction == "mean":
        assert abs(float(found.loss) - total / counted) <= 2e-5 * total / counted
    torch.testing.assert_close(found.terms.double(), terms / counted, rtol=2e-5, atol=1e-7)


# ---- the fusion, one stage after the other


class Fusion(NamedTuple):
    """Feature maps, weights that bfloat16 holds, affine norms and a gradient."""

    maps: list[Tensor]
    depthwise: Tensor
    pointwise: Tensor
    affine: list[Tensor]
    grad: Tensor

    @property
    def values(self) -> int:
        x = self.maps[0]
        return x.shape[0] * x.shape[2] * x.shape[3]

    def norm(self, moments: Tensor, which: int) -> Norm:
        return Norm(*moments, torch.tensor(float(self.values)), *self.affine[2 * which :][:2], 1e-5, True)


class Stages(NamedTuple):
    """The results of the stages of one training step, each of which was given those before."""

    moments1: Tensor
    y: Tensor
    moments2: Tensor
    pooled: Tensor
    active: Tensor
    sums2: Tensor
    sums1: Tensor
    pointwise_gradient: Tensor
    gradients: list[Tensor]
    depthwise_gradient: Tensor
    inferred: Tensor


def draw_fusion(batch, channels, outputs, size, device, layout=torch.contiguous_format) -> Fusion:
    torch.manual_seed(0)
    maps = []
    for count in channels:
        x = torch.empty(batch, count, size, size, dtype=BF16, device=device, memory_format=layout)
        maps.append(x.normal_().relu_())
    total = sum(channels)
    weights = [torch.randn(total, 1, 3, 3) * 0.4, torch.randn(outputs, total, 1, 1) * total**-0.5]
    affine = [f(c) for c in (total, outputs) for f in (lambda c: torch.rand(c) + 0.5, lambda c: torch.randn(c) * 0.3)]
    grad = torch.empty(batch, outputs, dtype=BF16, device=device).normal_()
    return Fusion(maps, *(w.to(BF16).float().to(device) for w in weights), [t.to(device) for t in affine], grad)


def run_fusion(stages, f: Fusion) -> Stages:
    pixels = f.maps[0].shape[2] * f.maps[0].shape[3]
    moments1, *kept = stages["depthwise_statistics"](f.maps, f.depthwise)
    norm1 = f.norm(moments1, 0)
    y, moments2 = stages["pointwise"](f.maps, f.depthwise, norm1, f.pointwise, kept, True, False)
    del kept
    norm2 = f.norm(moments2, 1)
    pooled, active = stages["pool"](y, norm2)
    sums2 = stages["backward_pool"](f.grad, active, pixels)
    sums1, pointwise_gradient, *kept = stages["backward_sums"](
        f.grad, f.maps, f.depthwise, norm1, f.pointwise, y, norm2, sums2, True, False
    )
    *gradients, depthwise_gradient = stages["backward_inputs"](
        f.maps, f.depthwise, norm1, sums1, kept, (2 << len(f.maps)) - 1
    )
    inferred = stages["inference"](f.maps, f.depthwise, norm1, f.pointwise, norm2, False)
    return Stages(
        moments1, y, moments2, pooled, active, sums2, sums1, pointwise_gradient, gradients, depthwise_gradient, inferred
    )  # fmt: skip


def combined(moments: list[Tensor], counts: list[int]) -> Tensor:
    """Mean and M2 of all from those of parts, in float64."""
    n = torch.tensor(counts, dtype=torch.float64, device=moments[0].device)[:, None]
    means, m2s = torch.stack(moments).double().unbind(1)
    mean = (n * means).sum(0) / n.sum()
    return torch.stack([mean, m2s.sum(0) + (n * (means - mean).square()).sum(0)])


def assert_near(what, got, exact, share, size=None, few=0.0):
    """Off by at most `share` of the size of the exact values, of the largest unless said; a part `few` may be more."""
    size = exact.double().abs().max() if size is None else size
    error = (got.double() - exact.double()).abs()
    wrong = int((~(error <= share * size + EPS * exact.double().abs())).sum())
    assert wrong <= few * error.numel(), (what, wrong, float(error.max()), float(size))


def assert_fusion(found: Stages, f: Fusion, *, chunk, spots):
    """Sums over all images, `chunk` at a time; of the images `spots` all that belongs to one image, in float64."""
    stages, batch = fusion_reference.STAGES, len(f.grad)
    pixels = f.values // batch
    norm1, norm2 = f.norm(found.moments1, 0), f.norm(found.moments2, 1)
    every = (1 << len(f.maps)) - 1
    statistics: list[list[Tensor]] = [[], []]
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (found.sums1, f.pointwise, f.depthwise)]
    counts = []
    for part in parts(batch, chunk):
        maps, y = [x[part] for x in f.maps], found.y[part]
        counts.append(len(y) * pixels)
        statistics[0].append(stages["depthwise_statistics"](maps, f.depthwise)[0])
        statistics[1].append(fusion_reference._moments(y.float().mT[:, :, :, None]))
        sums1, pointwise, dz = stages["backward_sums"](
            f.grad[part], maps, f.depthwise, norm1, f.pointwise, y, norm2, found.sums2, True, False
        )
        depthwise = stages["backward_inputs"](maps, f.depthwise, norm1, found.sums1, [dz], every + 1)[-1]
        for total, new in zip(sums, (sums1, pointwise, depthwise), strict=True):
            total += new
    for name, got, truth in (
        ("moments1", found.moments1, combined(statistics[0], counts)),
        ("moments2", found.moments2, combined(statistics[1], counts)),
    ):
        deviation = (truth[1] / f.values).sqrt().max()
        assert_near(f"{name}, mean", got[0], truth[0], 1e-3, deviation)
        assert_near(f"{name}, M2", got[1], truth[1], 1e-3)
    assert_near("sums2", found.sums2, stages["backward_pool"](f.grad.double(), found.active.double(), pixels), 1e-4)
    assert_near("sums1", found.sums1, sums[0], 2e-2)
    assert_near("pointwise gradient", found.pointwise_gradient, sums[1], 2e-2)
    assert_near("depthwise gradient", found.depthwise_gradient, sums[2], 2e-2)

    at = torch.tensor(list(spots), device=f.grad.device)

    def wide(value):
        """In float64 on the CPU; of what has images, those at the spots."""
        if isinstance(value, Norm):
            return Norm(*(wide(v) if isinstance(v, Tensor) else v for v in value))
        return (value.index_select(0, at) if value.dim() and len(value) == batch else value).cpu().double()

    maps, dw, pw, one, two = [wide(x) for x in f.maps], wide(f.depthwise), wide(f.pointwise), wide(norm1), wide(norm2)
    y, grad = wide(found.y), wide(f.grad)
    truth = stages["pointwise"](maps, dw, one, pw, [], False, False)[0]
    assert_near("y", y, truth, 0.05, truth.std())
    pooled, active = stages["pool"](y, two)
    assert_near("pooled", wide(found.pooled), pooled, 0.01)
    for k in range(2):  # of 64 pixels one may be active on one side of a rounding only
        assert_near("active", wide(found.active[k]), active[k], 0.03)
    dz = stages["backward_sums"](grad, maps, dw, one, pw, y, two, wide(found.sums2), False, False)[-1]
    gradients = stages["backward_inputs"](maps, dw, one, wide(found.sums1), [dz], every)
    for k, (own, exact) in enumerate(zip(found.gradients, gradients, strict=False)):
        # Where z is as good as 0, one side hands a gradient on that the other does not.
        assert_near(f"gradient of map {k}", wide(own), exact, 0.3, exact.std(), few=1e-3)
    inferred = stages["inference"](maps, dw, one, pw, two, False)
    assert_near("inferred", wide(found.inferred), inferred, 0.05)


def images_around(places, sizes, batch):
    """The first two images and the last, and those about the given elements of tensors with so many an image."""
    found = {0, 1, batch - 2, batch - 1}
    found |= {place // size + step for place in places for size in sizes for step in (-1, 0, 1)}
    return sorted(image for image in found if 0 <= image < batch)


# ---- the augmentation


def run_augment(batch, size, device, *, channels_last, dtype=BF16):
    """Images, what `augment` takes beside them, and what it made of them."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device, generator=generator)
    options = {"seed": 3, "epoch": 2, "view": 1, "pad": 2, "flip": True, "channels_last": channels_last}
    index = torch.arange(batch, device=device) * 1_234_567_891
    table = torch.linspace(-2, 2, 768).view(3, 256).t().to(device, dtype)
    return images, index, {**options, "table": table}, augment(images, index, table=table, **options)


def assert_augment(images, index, options, got, *, chunk):
    """Every image has the bytes of the definition."""
    for part in parts(len(images), chunk):
        wanted = reference_augment(images[part], index[part], **options)
        equal = (got[part] == wanted).flatten(1).all(1)
        assert bool(equal.all()), f"image {part.start + int((~equal).nonzero()[0])} of {len(images)}"
