"""Mixup and cutmix: what comes out is a mix of what went in, in the shares that the targets state."""

from __future__ import annotations

import math

import pytest
import torch

from fflfast.ops.augment import mix
from tests.test_augment import NoWaiting

IMAGES = torch.rand(6, 3, 16, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 2, 3, 4, 1])
ONE_HOT = torch.nn.functional.one_hot(TARGET, 5).float()


def mixed(step=0, images=IMAGES, target=TARGET, **options):
    return mix(images, target, 5, seed=3, epoch=1, step=step, **options)


def own_share(probs: torch.Tensor) -> float:
    return float(probs[0, 0])  # image 0 meets image 5, of another class


@pytest.mark.parametrize("step", range(8))
def test_mixup_blends_images_and_targets_by_one_ratio(step):
    images, probs = mixed(step, mixup_alpha=1.0)
    ratio = own_share(probs)
    assert 0 < ratio < 1
    assert torch.equal(images, ratio * IMAGES + (1 - ratio) * IMAGES.roll(1, 0))
    assert torch.equal(probs, ratio * ONE_HOT + (1 - ratio) * ONE_HOT.roll(1, 0))


@pytest.mark.parametrize("step", range(8))
def test_cutmix_pastes_one_box_and_counts_its_pixels(step):
    images, probs = mixed(step, cutmix_alpha=1.0)
    pasted = (images != IMAGES).any(1)
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted, (rows[:, None] & columns).expand(6, -1, -1))
    assert torch.equal(images, torch.where(pasted[:, None], IMAGES.roll(1, 0), IMAGES))
    for line in (rows, columns):  # a box: one run of places
        assert int(line.int().diff().abs().sum()) + int(line[0]) + int(line[-1]) in (0, 2)
    torch.testing.assert_close(own_share(probs), 1 - pasted[0].float().mean().item())
    torch.testing.assert_close(probs.sum(1), torch.ones(6))


def test_cutmix_pastes_in_every_part_of_the_image_alike():
    image, target = torch.stack([torch.zeros(1, 9, 9), torch.ones(1, 9, 9)]), torch.tensor([0, 1])
    pasted = [mix(image, target, 2, seed=1, epoch=0, step=s, cutmix_alpha=1.0)[0][0, 0] for s in range(1000)]
    often = torch.stack(pasted).mean(0)
    centre = often[4, 4].item()
    assert centre > 1.5 * often[0, 0].item() > 0.1
    for turned in (often.flip(0), often.flip(1), often.T):
        assert (often - turned).abs().max() < 0.08


def ratios(alpha: float, count: int = 1500) -> torch.Tensor:
    image, target = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    shares = [mix(image, target, 2, seed=3, epoch=0, step=s, mixup_alpha=alpha)[1][0, 0] for s in range(count)]
    return torch.stack(shares).double()


CDF = {
    0.5: lambda x: math.asin(math.sqrt(x)) * 2 / math.pi,
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
}


@pytest.mark.parametrize("alpha", CDF)
def test_ratios_follow_the_beta_distribution(alpha):
    drawn = ratios(alpha).sort().values
    wanted = torch.tensor([CDF[alpha](x) for x in drawn.tolist()], dtype=torch.float64)
    distance = (wanted - (torch.arange(len(drawn)) + 0.5) / len(drawn)).abs().max().item()
    assert distance < 2.2 / math.sqrt(len(drawn))  # Kolmogorov: passed with probability 1 − 10⁻⁴


@pytest.mark.parametrize("alpha", [0.01, 0.2, 30.0, 100.0])
def test_ratio_has_the_mean_and_variance_of_its_distribution(alpha):
    drawn = ratios(alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert abs(drawn.mean().item() - 0.5) < 4 * math.sqrt(variance / 1500)
    assert drawn.var().item() == pytest.approx(variance, rel=0.15)


def test_with_both_half_of_the_batches_take_each():
    cut = 0
    for step in range(200):
        images, probs = mixed(step, mixup_alpha=1.0, cutmix_alpha=1.0)
        by_mixup = mixed(step, mixup_alpha=1.0)
        by_cutmix = mixed(step, cutmix_alpha=1.0)
        is_cut = torch.equal(images, by_cutmix[0])
        cut += is_cut
        assert torch.equal(images, (by_cutmix if is_cut else by_mixup)[0])
        assert torch.equal(probs, (by_cutmix if is_cut else by_mixup)[1])
    assert 70 < cut < 130


def test_a_pure_function_of_seed_epoch_and_step():
    options = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
    torch.manual_seed(1)
    first = mixed(7, **options)
    torch.manual_seed(2)
    second = mix(
        IMAGES,
        TARGET,
        5,
        seed=torch.tensor(3),
        epoch=torch.tensor(1, dtype=torch.int32),
        step=torch.tensor(7),
        **options,
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], mixed(8, **options)[0])
    assert not torch.equal(first[0], mix(IMAGES, TARGET, 5, seed=3, epoch=2, step=7, **options)[0])


def test_off_leaves_images_and_gives_probabilities():
    images, probs = mixed()
    assert images is IMAGES
    assert torch.equal(probs, ONE_HOT)


def test_soft_targets_are_mixed_in_their_dtype():
    soft = torch.softmax(torch.randn(6, 5, dtype=torch.float64), 1)
    _, probs = mixed(2, target=soft, mixup_alpha=1.0)
    ratio = own_share(mixed(2, mixup_alpha=1.0)[1])
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, ratio * soft + (1 - ratio) * soft.roll(1, 0))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("option", ["mixup_alpha", "cutmix_alpha"])
def test_batches_without_a_neighbour(size, option):
    images, probs = mixed(3, images=IMAGES[:size], target=TARGET[:size], **{option: 1.0})
    torch.testing.assert_close(images, IMAGES[:size])
    torch.testing.assert_close(probs, ONE_HOT[:size])


def test_nothing_waits_for_the_device():
    with NoWaiting():
        mixed(target=ONE_HOT, mixup_alpha=0.3, cutmix_alpha=0.7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES.mul(255).byte()}, "images: expected float .* got uint8 .* normalize uint8 images first"),
        ({"images": IMAGES[0]}, "images: expected float"),
        ({"target": TARGET[:3]}, r"target: expected int64 \(6,\) or probabilities \(6, 5\), got int64 \(3,\)"),
        ({"target": TARGET.int()}, "target: expected int64"),
        ({"target": ONE_HOT[:, :4]}, "target: expected int64"),
        ({"target": TARGET.to("meta")}, "target: expected a tensor on cpu"),
        ({"target": TARGET - 1}, "target: expected classes 0 … 4, got -1"),
        ({"target": TARGET + 1}, "target: expected classes 0 … 4, got 5"),
        ({"mixup_alpha": -0.1}, r"mixup_alpha: expected 0 \(off\) to 100, got -0.1"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha: expected"),
        ({"cutmix_alpha": 1e3}, "cutmix_alpha: expected"),
        ({"step": -1}, "step: expected 0 ≤ step"),
    ],
)
def test_errors(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mixed(**changes)
    with pytest.raises(ValueError, match="num_classes: expected an int ≥ 1, got 0"):
        mix(IMAGES, TARGET, 0, seed=0, epoch=0, step=0)
