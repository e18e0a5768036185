"""Fitting MBRM: the windows that it reads against the full axis, and what the fit finds on masks with known edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rdsnet.model.mbrm import MBRM, PUBLISHED, reach
from rdsnet.model.mbrm_fit import LEFT_OUT, Pairs, collect_edges, fit, fit_edges

W, H = 90, 70


def soft_profile(length: int, low: Tensor, high: Tensor, blur: float, shift: float) -> Tensor:
    """(N, length) profiles that reach 1/2 at the object's edges, or `shift` pixels outside of them."""
    centre = torch.arange(length) + 0.5
    rise, fall = centre - low[:, None] + shift, high[:, None] - centre + shift
    return (rise / blur).sigmoid() * (fall / blur).sigmoid()


def noisy_sample(seed: int, *, blur: float = 0.7, noise: float = 2.0, shift: float = 0.0, n: int = 12) -> Pairs:
    """Objects with integer edges, soft masks of them, and boxes that are off by about `noise` pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 40, (n, 2), generator=generator)
    extent = torch.randint(20, 31, (n, 2), generator=generator)
    true = torch.cat([corner, corner + extent], dim=1).float()
    regressed = true + noise * torch.randn(n, 4, generator=generator)
    columns = soft_profile(W, true[:, 0], true[:, 2], blur, shift)
    rows = soft_profile(H, true[:, 1], true[:, 3], blur, shift)
    return Pairs(regressed, true, (columns, rows))


def samples(count: int = 4, **settings: float) -> list[Pairs]:
    return [noisy_sample(seed, **settings) for seed in range(count)]  # type: ignore[arg-type]


def plain_loss(mbrm: MBRM, sample: Pairs) -> Tensor:
    """Sum of -log posterior of the true edges, over the whole axes."""
    boxes, true, axes = sample
    sigma = mbrm.sigma(boxes)
    total = torch.zeros((), dtype=torch.float64)
    for axis, profiles in enumerate(axes):
        posterior = mbrm.posterior(profiles.double(), boxes[:, axis::2].double(), sigma[:, axis].double())
        near, far = true[:, axis].long(), true[:, axis + 2].long() - 1  # entry i stands for the far edge i + 1
        for target, one in ((near, posterior[:, 0]), (far, posterior[:, 1])):
            total = total - one.gather(1, target[:, None]).log().sum()
    return total


# --- windows (DESIGN.md 6.6) ---


@pytest.mark.parametrize("gamma", [0.02, 0.05, 0.2])
def test_the_loss_is_the_cross_entropy_of_the_posterior(gamma: float) -> None:
    mbrm, sample = MBRM(replace(PUBLISHED, gamma=gamma)), noisy_sample(0, noise=1.0)
    expected = plain_loss(mbrm.double(), sample).item()
    report = fit(mbrm.float(), [sample])
    assert (report.edges, report.skipped) == (4 * 12, 0)
    assert report.before * report.edges == pytest.approx(expected, rel=1e-5)


def test_windows_at_the_images_border_are_those_of_the_full_axis() -> None:
    """Objects that fill the image: far edges are W and H, and half of each window lies outside."""
    true = torch.tensor([[0.0, 0, W, H], [0, 10, 30, H], [50, 0, W, 33]])
    regressed = true + torch.tensor([[1.3, -0.8, -2.2, 0.6], [0.2, 1.1, 0.7, -1.9], [-0.4, 0.9, 1.5, -1]])
    generator = torch.Generator().manual_seed(0)
    profiles = (torch.rand(3, W, generator=generator), torch.rand(3, H, generator=generator))
    sample = Pairs(regressed, true, profiles)
    mbrm = MBRM(replace(PUBLISHED, gamma=0.05))
    expected = plain_loss(mbrm.double(), sample).item()
    report = fit(mbrm.float(), [sample])
    assert (report.edges, report.skipped) == (12, 0)
    assert report.before * report.edges == pytest.approx(expected, rel=1e-5)


def test_an_edge_where_the_posterior_is_negligible_is_left_out() -> None:
    # the published numbers reach 6.8 sigmas of 1.5 pixels: 10.2; the left edges are 9.9 and 10.5 off
    true = torch.tensor([[30.0, 20, 65, 50]]).repeat(2, 1)
    regressed = torch.tensor([[20.1, 20, 65.1, 50], [19.5, 20, 64.5, 50]])
    mbrm = MBRM(replace(PUBLISHED, gamma=1.5 / 45))
    assert 9.9 < 1.5 * reach(mbrm.weight, mbrm.bias) < 10.5
    horizontal, vertical = collect_edges(mbrm, Pairs(regressed, true, (torch.rand(2, W), torch.rand(2, H))))
    assert (horizontal.target >= 0).tolist() == [[True, True], [False, True]]
    assert (vertical.target >= 0).all()


# --- the fit ---


def edge_error(mbrm: MBRM, tests: list[Pairs]) -> float:
    """Mean distance of the refined edges from the true ones, pixels."""
    errors = []
    for regressed, true, profiles in tests:
        errors.append((mbrm(*profiles, regressed).boxes - true).abs())
    return torch.cat(errors).mean().item()


UNSEEN = [noisy_sample(seed) for seed in (100, 101)]


def test_the_fit_finds_the_edges_of_masks_that_it_has_not_seen() -> None:
    mbrm = MBRM(replace(PUBLISHED, gamma=0.1))
    report = fit(mbrm, samples())
    assert report.edges + report.skipped == 4 * 4 * 12
    assert report.after < 0.5 * report.before
    regressed = torch.cat([(regressed - true).abs() for regressed, true, _ in UNSEEN]).mean().item()
    assert regressed > 1.3
    assert edge_error(mbrm, UNSEEN) < 0.02


def test_the_fit_learns_where_masks_that_are_too_large_end() -> None:
    """Masks 2 pixels larger than their objects on each side: no fixed threshold would find the edges."""
    mbrm = MBRM(replace(PUBLISHED, gamma=0.1))
    fit(mbrm, samples(shift=2.0))
    assert edge_error(mbrm, [noisy_sample(100, shift=2.0)]) < 0.1
    assert edge_error(mbrm, UNSEEN) > 1  # it has learned these masks, not others


def test_the_report_says_what_the_posterior_gives() -> None:
    mbrm, data = MBRM(replace(PUBLISHED, gamma=0.1)), samples(noise=1.0)
    before = sum(plain_loss(mbrm.double(), sample).item() for sample in data)
    mbrm.float()
    report = fit(mbrm, data)
    assert report.skipped == 0
    after = sum(plain_loss(mbrm.double(), sample).item() for sample in data)
    assert report.before == pytest.approx(before / report.edges, rel=1e-4)
    assert report.after == pytest.approx(after / report.edges, rel=1e-3)


def test_at_the_fitted_numbers_the_posteriors_loss_has_no_slope() -> None:
    # noise on the masks keeps the best weights finite
    generator = torch.Generator().manual_seed(0)
    data = []
    for sample in samples():
        noisy = [(0.6 * p + 0.4 * torch.rand(p.shape, generator=generator)) for p in sample.profiles]
        data.append(sample._replace(profiles=(noisy[0], noisy[1])))
    mbrm = MBRM(replace(PUBLISHED, gamma=0.1))
    fit(mbrm, data)
    mbrm.double().requires_grad_()
    loss = torch.stack([plain_loss(mbrm, sample) for sample in data]).sum() / (4 * 4 * 12)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [mbrm.weight, mbrm.bias])])
    assert gradient.norm() < 1e-4


def test_the_fitted_numbers_are_kept_and_are_not_trained() -> None:
    mbrm = MBRM(replace(PUBLISHED, gamma=0.1))
    before = mbrm.weight.clone()
    fit(mbrm, samples(1))
    assert not torch.equal(mbrm.weight, before)
    assert mbrm.weight.dtype == torch.float32
    assert not mbrm.weight.requires_grad
    assert mbrm.weight.grad is None


def test_the_same_detections_give_the_same_fit() -> None:
    first, second = MBRM(), MBRM()
    assert fit(first, samples(2)) == fit(second, samples(2))
    assert torch.equal(first.weight, second.weight)


def test_of_several_gammas_the_likeliest_is_chosen() -> None:
    """Boxes of 20 to 30 pixels, off by 2, and masks that say nothing: the prior should be 2 pixels wide."""
    flat = (torch.full((12, W), 0.5), torch.full((12, H), 0.5))
    data = [sample._replace(profiles=flat) for sample in samples()]
    mbrm = MBRM()
    report = fit(mbrm, data, gammas=(0.01, 0.08, 0.5))
    assert report.gamma == mbrm.gamma == 0.08
    alone = {gamma: fit(MBRM(replace(PUBLISHED, gamma=gamma)), data).after for gamma in (0.01, 0.08, 0.5)}
    assert report.after == pytest.approx(alone[0.08])
    assert min(alone, key=alone.__getitem__) == 0.08


def test_a_prior_that_skips_the_hard_edges_does_not_win() -> None:
    """Three boxes are right and one is moved by 6.5 px: a prior of 1 px would not even look at that one."""
    true = torch.tensor([[20.0, 20, 60, 60]]).repeat(4, 1)
    regressed = true + torch.tensor([[0.0] * 4, [0] * 4, [0] * 4, [6.5] * 4])
    flat = (torch.full((4, W), 0.5), torch.full((4, H), 0.5))
    report = fit(MBRM(), [Pairs(regressed, true, flat)], gammas=(0.025, 0.1))
    assert report.gamma == 0.1
    assert report.skipped == 0


def test_nothing_matched_is_refused() -> None:
    nothing = Pairs(torch.zeros(0, 4), torch.zeros(0, 4), (torch.zeros(0, W), torch.zeros(0, H)))
    mbrm = MBRM(replace(PUBLISHED, gamma=0.05))
    with pytest.raises(ValueError, match="MBRM cannot be fitted: no detection of 1 images finds an object"):
        fit(mbrm, [nothing], gammas=(0.1, 0.2))
    with pytest.raises(ValueError, match="no detection of 0 images"):
        fit(mbrm, [])
    assert mbrm.gamma == 0.05
    assert torch.equal(mbrm.weight, MBRM().weight)


def test_the_loss_of_an_edge_that_a_person_can_work_out() -> None:
    """Without weights only the prior speaks: edge on a column, sigma 1, the true edge one column on."""
    mbrm = MBRM(replace(PUBLISHED, gamma=0.01))
    mbrm.weight.data.zero_()
    profiles = (torch.zeros(1, W), torch.zeros(1, H))
    sample = Pairs(torch.tensor([[30.0, 20, 60, 50]]), torch.tensor([[31.0, 20, 60, 50]]), profiles)
    across = collect_edges(mbrm, sample)[0]
    left = across._replace(target=torch.tensor([[across.target[0, 0], LEFT_OUT]]))
    weights = torch.exp(-0.5 * torch.arange(-20.0, 21) ** 2)
    report = fit_edges(mbrm, [left], 1, [mbrm.gamma])
    assert (report.edges, report.skipped) == (1, 1)
    assert report.before == pytest.approx(0.5 + weights.sum().log().item(), rel=1e-6)
