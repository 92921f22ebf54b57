"""Pointwise losses: extremes, known values, conventions of other libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import every_dtype, same_bits

from fastloss.functional import sigmoid_focal_loss

EXTREMES = [1e4, -1e4, 88.0, -88.0, 0.0, 20.0, -20.0, 1e-3]


@every_dtype
@pytest.mark.parametrize("gamma", [0, 0.01, 0.1, 0.5, 0.9, 1, 1.5, 2, 3, 5])
def test_sigmoid_focal_loss_is_finite(gamma, dtype, device):
    for y in (0.0, 0.5, 1.0):
        x = torch.tensor(EXTREMES).to(dtype).detach().clone().requires_grad_()
        t = torch.full_like(x, y).requires_grad_()
        value = sigmoid_focal_loss(x, t, gamma=gamma)
        value.sum().backward()
        for part in (value, x.grad, t.grad):
            assert part.isfinite().all(), f"target {y}: {part}"


def torchvision_focal(x, y, alpha, gamma):
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    loss = ce * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    return (alpha * y + (1 - alpha) * (1 - y)) * loss if alpha >= 0 else loss


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 3.5])
@pytest.mark.parametrize("alpha", [0.25, -1])
def test_sigmoid_focal_loss_is_torchvisions(alpha, gamma, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=g, dtype=torch.float64)
    y = torch.rand(5, 7, generator=g, dtype=torch.float64)
    got = sigmoid_focal_loss(x, y, alpha, gamma)
    torch.testing.assert_close(got, torchvision_focal(x, y, alpha, gamma))


def test_sigmoid_focal_loss_of_classes(device):
    """Classes are their one-hot encoding; background is no column, ignored rows count nothing, even NaN ones."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 3, 1, -100, 3])
    x[4] = torch.nan
    one_hot = F.one_hot(classes.clamp_min(0), 4)[:, :3].float()
    kept = [0, 1, 2, 3, 5]
    expected = sigmoid_focal_loss(x[kept], one_hot[kept])
    got = sigmoid_focal_loss(x, classes)
    assert same_bits(got[kept], expected)
    assert not got[4].any()
    mean = sigmoid_focal_loss(x, classes, reduction="mean")
    torch.testing.assert_close(mean, expected.sum() / 5)
    apex = torch.where(classes == 3, -1, torch.where(classes == -100, -2, classes))
    both = sigmoid_focal_loss(
        x, apex, background_index=-1, ignore_index=-2, num_positives=3.0, reduction="mean"
    )
    torch.testing.assert_close(both, expected.sum() / 3)


@every_dtype
def test_gradient_of_forward_and_of_backward_have_the_same_bits(dtype, device):
    """A mean's gradient is written in the forward pass; with a kept graph the second is computed again."""
    x = torch.linspace(-9, 9, 3001).to(dtype).requires_grad_()
    y = (torch.arange(3001) % 2).to(dtype)
    for gamma in (0, 0.5, 1, 2, 3.5):
        value = sigmoid_focal_loss(x, y, gamma=gamma, reduction="mean")
        (first,) = torch.autograd.grad(value, x, retain_graph=True)
        (second,) = torch.autograd.grad(value, x)
        assert same_bits(first, second)
        with torch.no_grad():
            assert same_bits(sigmoid_focal_loss(x, y, gamma=gamma, reduction="mean"), value)
