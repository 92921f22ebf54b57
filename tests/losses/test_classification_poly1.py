"""Poly-1 cross-entropy beside its definition, and where its terms are small or cancel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import every_dtype

from fastloss.functional import cross_entropy, poly1_cross_entropy

EPSILONS = (-1.0, -0.5, 0.0, 1.0, 6.0)


def step(logits, target, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = poly1_cross_entropy(logits, target, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


def drawn(device, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(6, 11, generator=g, dtype=torch.float64)
    return x.to(device, dtype), torch.randint(11, (6,), generator=g).to(device)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
def test_value_and_gradient_are_the_papers(epsilon, weighted, device):
    x, y = drawn(device)
    weight = torch.linspace(0.5, 2.0, 11, dtype=x.dtype, device=device) if weighted else None
    w = weight[y, None] if weighted else torch.ones_like(x[:, :1])
    p = x.softmax(1)
    py = p.gather(1, y[:, None])
    rows = w * (-py.log() + epsilon * (1 - py))
    gradient = w * (1 + epsilon * py) * (p - F.one_hot(y, 11))
    for reduction, norm in (("sum", 1), ("mean", w.sum())):
        loss, grad = step(x, y, weight=weight, epsilon=epsilon, reduction=reduction)
        torch.testing.assert_close(loss, rows.sum() / norm)
        torch.testing.assert_close(grad, gradient / norm)
    loss, grad = step(x, y, weight=weight, epsilon=epsilon, reduction="none")
    torch.testing.assert_close(loss, rows.squeeze(1))
    torch.testing.assert_close(grad, gradient)


def test_epsilon_zero_is_cross_entropy(device):
    x, y = drawn(device, torch.float32)
    y[0] = -100
    weight = torch.linspace(0.5, 2.0, 11, device=device)
    for w in (None, weight):
        loss, grad = step(x, y, weight=w, epsilon=0.0)
        leaf = x.clone().requires_grad_()
        wanted = cross_entropy(leaf, y, w)
        torch.testing.assert_close(loss, wanted.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(wanted, leaf)[0])


def exact(margin, epsilon):
    """-log(1 - q) + epsilon q in float64, where the target is `margin` above two other classes; and q = 1 - p."""
    others = 2 * torch.exp(-margin.double().cpu())
    q = 1 / (1 + 1 / others)
    series = (1 + epsilon) * q + sum(q**k / k for k in range(2, 12))
    high = torch.log1p(others) + epsilon * q
    low = math.log(2) - margin.double().cpu() + epsilon  # the target as good as impossible
    return torch.where(q < 0.01, series, torch.where(others < 1e100, high, low)), q


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("margin", [10.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_rows_keep_their_relative_precision(dtype, margin, epsilon, device):
    """By up to 80 nats; with epsilon = -1 by 40, for the loss is q^2 / 2 there, which float32 still holds."""
    margin = margin / 2 if epsilon == -1 else margin
    x = torch.tensor([[margin, 0.0, 0.0]], dtype=dtype, device=device)
    loss, grad = step(x, torch.zeros(1, dtype=torch.int64, device=device), epsilon=epsilon, reduction="none")
    wanted, q = exact(x[:, 0], epsilon)
    of_others = ((1 + epsilon) - epsilon * q) * q / 2
    close = {"rtol": 1e-6 if dtype == torch.float32 else 1e-14, "atol": 0.0}
    torch.testing.assert_close(loss.double().cpu(), wanted, **close)
    gradient = torch.stack([-2 * of_others, of_others, of_others], 1)
    torch.testing.assert_close(grad.double().cpu(), gradient, **close)


@every_dtype
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_finite_at_every_margin(epsilon, dtype, device):
    """The target far above and far below the rest, ties, and where the series for small 1 - p takes over."""
    sizes = torch.tensor([0.0, 1e-3, 1.0, 1.75, 1.8, 1.85, 16.0, 40.0, 80.0, 110.0, 800.0, 1e4])
    margins = torch.cat([sizes, -sizes])
    x = torch.zeros(len(margins), 3)
    x[:, 1] = margins
    x = x.to(device, dtype)
    y = torch.ones(len(margins), dtype=torch.int64, device=device)
    loss, grad = step(x, y, epsilon=epsilon, reduction="none")
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    wanted, _ = exact(x[:, 1], epsilon)
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    close = {"rtol": max(8 * eps, 1e-13), "atol": least * (1 if dtype != torch.float16 else eps)}
    torch.testing.assert_close(loss.double().cpu(), wanted, **close)


def test_infinite_logits_and_a_lone_class(device):
    x = torch.tensor([[1.0, -torch.inf], [-torch.inf, 2.0]], device=device)
    y = torch.tensor([0, 0], device=device)
    loss, grad = step(x, y, reduction="none")
    assert loss.tolist() == [0.0, torch.inf]
    assert grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]
    loss, grad = step(torch.randn(3, 1, device=device), torch.zeros(3, dtype=torch.int64, device=device))
    assert loss == 0
    assert not grad.any()
    x[0, 0] = torch.nan
    assert step(x, y)[0].isnan()


def test_ignored_rows_and_what_is_refused(device):
    x, y = drawn(device, torch.float32)
    y[2] = 7
    loss, grad = step(x, y, ignore_index=7)
    kept = y != 7
    torch.testing.assert_close(loss, poly1_cross_entropy(x[kept], y[kept]))
    assert not grad[~kept].any()
    assert poly1_cross_entropy(x, torch.full_like(y, -100)).isnan()
    for epsilon in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="epsilon"):
            poly1_cross_entropy(x, y, epsilon=epsilon)
    with pytest.raises(TypeError, match="epsilon"):
        poly1_cross_entropy(x, y, epsilon="1")
    with pytest.raises(RuntimeError, match="target: expected classes"):
        poly1_cross_entropy(x, x.softmax(1))
    with pytest.raises(RuntimeError, match="weight"):
        poly1_cross_entropy(x, y, torch.ones(3, device=device))


def test_gradient_into_the_memory_of_the_logits(device):
    x, y = drawn(device, torch.float32)
    wanted = step(x, y)[1]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    poly1_cross_entropy(logits, y, inplace_backward=True).backward()
    assert torch.equal(logits.detach(), wanted)
    torch.testing.assert_close(leaf.grad, wanted)
