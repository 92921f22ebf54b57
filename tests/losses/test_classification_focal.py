"""Softmax focal loss against its definition in high precision, and where the usual form breaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastloss import reference
from fastloss.functional import softmax_focal_loss

GAMMAS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 5.0)


def step(logits, target, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = softmax_focal_loss(logits, target, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_is_the_papers(gamma, device):
    torch.manual_seed(0)
    x = torch.randn(6, 11, dtype=torch.float64, device=device) * 3
    y = torch.randint(11, (6,), device=device)
    logp = x.log_softmax(1)
    p = logp.exp()
    py, ly = p.gather(1, y[:, None]), logp.gather(1, y[:, None])
    c = gamma * (1 - py) ** (gamma - 1) * py * ly - (1 - py) ** gamma
    loss, grad = step(x, y, gamma=gamma, reduction="sum")
    torch.testing.assert_close(loss, -((1 - py) ** gamma * ly).sum())
    torch.testing.assert_close(grad, c * (F.one_hot(y, 11) - p))


def test_gamma_zero_is_cross_entropy(device):
    x, y = torch.randn(5, 7, device=device), torch.randint(7, (5,), device=device)
    torch.testing.assert_close(softmax_focal_loss(x, y, gamma=0.0), F.cross_entropy(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_finite_at_every_margin(gamma, dtype, device):
    """The target far above and far below the rest, ties, and one class alone."""
    sizes = torch.tensor([0.0, 1e-3, 1.0, 16.0, 17.0, 40.0, 80.0, 110.0, 800.0, 1e4])
    margins = torch.cat([sizes, -sizes])
    x = torch.zeros(len(margins), 3)
    x[:, 1] = margins
    x = x.to(device, dtype)
    y = torch.ones(len(margins), dtype=torch.int64, device=device)
    loss, grad = step(x, y, gamma=gamma, reduction="none")
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    exact = reference.softmax_focal_loss(x.double(), y, gamma, reduction="none").to(loss.dtype)
    tiny = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).tiny
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, exact, rtol=max(8 * eps, 1e-13), atol=tiny)


@pytest.mark.parametrize("margin", [20.0, 40.0, 80.0])
def test_confident_rows_keep_their_relative_precision(margin, device):
    """(1 - p)^2 * -log p with p = 1 - 2 exp(-margin), nearly: 4 exp(-2 margin) * 2 exp(-margin)."""
    x = torch.tensor([[margin, 0.0, 0.0]], dtype=torch.float64, device=device)
    loss, _ = step(x, torch.zeros(1, dtype=torch.int64, device=device), reduction="none")
    expected = 8 * torch.exp(torch.tensor([-3 * margin], dtype=torch.float64, device=device))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0.0)


def test_mean_divides_by_the_rows_that_are_not_ignored(device):
    x, y = torch.randn(4, 3, device=device), torch.tensor([0, -100, 2, 2], device=device)
    alpha = torch.tensor([5.0, 1.0, 0.5], device=device)
    rows = softmax_focal_loss(x, y, alpha=alpha, reduction="none")
    torch.testing.assert_close(softmax_focal_loss(x, y, alpha=alpha), rows.sum() / 3)
    assert softmax_focal_loss(x, torch.full_like(y, -100)).isnan()


def test_alpha_and_background(device):
    x, y = torch.randn(4, 3, device=device), torch.tensor([0, 1, 0, 2], device=device)
    plain = softmax_focal_loss(x, y, reduction="none")
    torch.testing.assert_close(softmax_focal_loss(x, y, alpha=0.25, reduction="none"), 0.25 * plain)
    kornia = softmax_focal_loss(x, y, alpha=0.25, background_class=0, reduction="none")
    torch.testing.assert_close(kornia, torch.where(y == 0, 0.75, 0.25) * plain)
    with pytest.raises(ValueError, match="background_class"):
        softmax_focal_loss(x, y, background_class=0)
    with pytest.raises(ValueError, match="gamma"):
        softmax_focal_loss(x, y, gamma=-1.0)


@pytest.mark.parametrize("gamma", [2.0, 5.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_powers_do_not_multiply_an_error(classes, gamma, device):
    """Of an improbable target 1 - p is as exact as torch has it: the power multiplies its error by gamma."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2000, classes, generator=generator) * 3).to(device)
    y = torch.randint(classes, (2000,), generator=generator).to(device)
    loss, grad = step(x, y, gamma=gamma, reduction="none")
    wide = x.cpu().double().requires_grad_()
    exact = reference.softmax_focal_loss(wide, y.cpu(), gamma, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), wide)
    logp = x.log_softmax(1).gather(1, y[:, None]).squeeze(1).cpu()
    naive = -((1 - logp.exp()) ** gamma) * logp
    improbable = wide.detach().softmax(1).gather(1, y.cpu()[:, None]).squeeze(1) < 0.5
    eps = torch.finfo(torch.float32).eps
    of_naive, ours = (((v.cpu() - exact.detach()).abs() / exact.detach())[improbable] for v in (naive, loss))
    assert ours.mean() < 1.2 * of_naive.mean()
    assert ours.max() < (gamma + 3) * eps, ours.max() / eps
    error = ((grad.cpu() - exact_grad).abs().amax(1) / exact_grad.abs().amax(1))[improbable]
    assert error.mean() < 2.5 * eps
    assert error.max() < (gamma + 4) * eps, error.max() / eps
