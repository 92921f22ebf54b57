"""Pointwise losses: extremes, known values, conventions of other libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import every_dtype, same_bits

import fastloss.functional
from fastloss import reference
from fastloss.functional import log_cosh_loss, sigmoid_focal_loss

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
    """Classes are their one-hot encoding; background is no column, ignored rows have no effect, even if NaN."""
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


# ---- against torch's functions --------------------------------------------------------------------------

TORCHS = {
    "mse_loss": {},
    "l1_loss": {},
    "smooth_l1_loss": {"beta": 0.7},
    "huber_loss": {"delta": 0.7},
    "binary_cross_entropy": {},
    "binary_cross_entropy_with_logits": {},
    "kl_div": {"log_target": True},
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:Using a target size")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", TORCHS)
def test_as_torch(name, reduction, device):
    """Values and both gradients, at and next to the places where the formulas change."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 30, generator=g, dtype=torch.float64)
    y = torch.rand(40, 30, generator=g, dtype=torch.float64)
    if name != "binary_cross_entropy":
        x = 6 * x - 3
    x[0], y[0] = 0.5, torch.linspace(0, 1, 30)
    answers = []
    for function in (getattr(fastloss.functional, name), getattr(F, name)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = function(a, b, reduction=reduction, **TORCHS[name])
        value.sum().backward()
        answers.append((value.detach(), a.grad, b.grad))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_binary_cross_entropy_of_saturated_logits(device):
    """The sum's product of 1 + e^-|x| keeps terms far below 1, and does not overflow."""
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        x = torch.full((5000,), 30.0, dtype=dtype)
        got = fastloss.functional.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="sum")
        expected = 5000 * torch.tensor(-30.0, dtype=torch.float64).exp().log1p()
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=0)
        zero = torch.zeros(5000, dtype=dtype)
        got = fastloss.functional.binary_cross_entropy_with_logits(zero, zero, reduction="sum")
        torch.testing.assert_close(got.double(), 5000 * torch.tensor(2.0).double().log(), rtol=rtol, atol=0)


def test_hinge_by_hand(device):
    s = torch.tensor([0.5, 2.0, 1.0, -1.0], requires_grad=True)
    y = torch.tensor([1.0, 1.0, 1.0, -1.0])
    value = fastloss.functional.hinge_loss(s, y, reduction="none")
    assert value.tolist() == [0.5, 0.0, 0.0, 0.0]
    value.sum().backward()
    assert s.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_kl_div_of_a_certain_target(device):
    q = torch.tensor([[0.0, 1.0, 0.0]])
    logp = torch.tensor([[0.2, 0.5, 0.3]]).log()
    got = fastloss.functional.kl_div(logp, q, reduction="batchmean")
    torch.testing.assert_close(got, torch.tensor(0.5).log().neg())


def test_broadcast_inputs_are_read_where_they_lie(device):
    x = torch.randn(7, 130, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for y in (torch.randn(130), torch.randn(7, 1), torch.randn(()), torch.randn(1, 130)):
        got = fastloss.functional.huber_loss(x, y)
        (grad,) = torch.autograd.grad(got, x)
        expected = fastloss.functional.huber_loss(x, y.expand(7, 130).contiguous())
        assert same_bits(got, expected)
        assert same_bits(grad, torch.autograd.grad(expected, x)[0])


@every_dtype
def test_rmse_at_and_near_a_perfect_fit(dtype, device):
    """The gradient of the root is 0 where nothing is wrong, and a unit vector's elsewhere."""
    x = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=dtype, device=device, requires_grad=True)
    for eps, value in ((0.0, 0.0), (0.25, 0.5)):
        loss = fastloss.functional.rmse_loss(x, x.detach(), eps)
        assert loss.dtype == dtype
        assert loss.item() == value
        assert not torch.autograd.grad(loss, x)[0].any()
    loss = fastloss.functional.rmse_loss(x, x.detach() + 2**-6)
    assert loss.item() == 2**-6
    assert torch.autograd.grad(loss, x)[0].tolist() == [-0.25] * 4
    with pytest.raises(ValueError, match="eps"):
        fastloss.functional.rmse_loss(x, x, -1.0)


# ---- log-cosh -------------------------------------------------------------------------------------------


def log_cosh(e):
    """In float64, by series where nothing else is exact: errors below 1e-2 and above 30."""
    e = e.abs()
    series = e**2 / 2 - e**4 / 12 + e**6 / 45 - 17 * e**8 / 2520
    middle = torch.log(torch.cosh(e.clamp(1e-2, 30.0)))
    return torch.where(e < 1e-2, series, torch.where(e > 30, e - math.log(2), middle))


SIZES = [
    0.0,
    1e-18,
    1e-12,
    1e-6,
    1e-3,
    9e-3,
    0.1,
    0.5,
    0.7,
    0.999,
    1.0,
    1.001,
    2.0,
    5.0,
    15.0,
    29.0,
    90.0,
    1e4,
    6e4,
]


@every_dtype
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_log_cosh_keeps_its_relative_precision(reduction, dtype, device):
    """Of errors of every size, either sign and both inputs; a sum of one element is a logarithm of its own."""
    eps = torch.finfo(dtype).eps
    rtol = max(4 * eps, 1e-11) if dtype in (torch.float32, torch.float64) else eps
    atol = torch.finfo(dtype).tiny * (1 if dtype == torch.float64 else 8)
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    for e in torch.cat([sizes, -sizes]).to(dtype):
        e = e.to(device).reshape(1)
        x, y = e.clone().requires_grad_(), torch.zeros_like(e, requires_grad=True)
        loss = log_cosh_loss(x, y, reduction)
        dx, dy = torch.autograd.grad(loss.sum(), (x, y))
        exact = e.double().cpu()
        wanted = log_cosh(exact)
        torch.testing.assert_close(
            loss.double().cpu().reshape(1), wanted.to(dtype).double(), rtol=rtol, atol=atol
        )
        torch.testing.assert_close(dx.double().cpu(), exact.tanh().to(dtype).double(), rtol=rtol, atol=atol)
        assert torch.equal(dy, -dx)


def test_log_cosh_sums_of_small_errors(device):
    """What is summed as the logarithm of a product does not lose the terms that 1 + u would."""
    x = torch.full((5000,), 1e-5, device=device)
    loss = log_cosh_loss(x, torch.zeros_like(x), "sum")
    torch.testing.assert_close(loss.double().cpu(), 5000 * log_cosh(x[0].double().cpu()), rtol=1e-6, atol=0.0)
    x = torch.full((5000,), 300.0, device=device)
    loss = log_cosh_loss(x, torch.zeros_like(x))
    torch.testing.assert_close(loss.item(), 300 - math.log(2), rtol=1e-6, atol=0.0)


@every_dtype
def test_log_cosh_of_infinities_and_nan(dtype, device):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.inf, 0.0], dtype=dtype, device=device)
    y = torch.tensor([0.0, 0.0, 0.0, torch.inf, torch.inf], dtype=dtype, device=device)
    x.requires_grad_()
    loss = log_cosh_loss(x, y, "none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    nan = torch.nan
    for got, wanted in (
        (loss, [torch.inf, torch.inf, nan, nan, torch.inf]),
        (grad, [1.0, -1.0, nan, nan, -1.0]),
    ):
        wanted = torch.tensor(wanted, dtype=dtype, device=device)
        torch.testing.assert_close(got.detach(), wanted, rtol=0.0, atol=0.0, equal_nan=True)
    finite = torch.zeros_like(x, requires_grad=True)
    weight = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0], dtype=dtype, device=device)
    assert log_cosh_loss(finite, torch.where(weight == 0, x, 0.0).detach(), weight=weight) == 0


def test_log_cosh_second_derivative(device):
    """1 - tanh^2, also where it underflows and at 0."""
    e = torch.tensor(
        [0.0, 1e-9, 0.5, -0.5, 1.5, 2.0, -3.0, 20.0, 400.0, -1e5], dtype=torch.float64, device=device
    )
    x = e.clone().requires_grad_()
    (first,) = torch.autograd.grad(log_cosh_loss(x, torch.zeros_like(e), "sum"), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    u = torch.exp(-e.abs())
    torch.testing.assert_close(second, (2 * u / (1 + u * u)) ** 2, rtol=1e-12, atol=1e-300)


def test_log_cosh_weight_and_broadcasting(device):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 13, generator=g).to(device), torch.randn(13, generator=g).to(device)
    weight = torch.rand(7, 13, generator=g).to(device)
    weight[2] = 0
    rows = log_cosh_loss(x, y, "none")
    torch.testing.assert_close(rows, torch.log(torch.cosh(x - y)))
    torch.testing.assert_close(log_cosh_loss(x, y, weight=weight), (weight * rows).sum() / weight.sum())
    with pytest.raises(ValueError, match="weight"):
        log_cosh_loss(x, y, weight=weight[0])
    assert same_bits(log_cosh_loss(x, (5 * y).long()), log_cosh_loss(x, (5 * y).trunc()))
    with pytest.raises(NotImplementedError, match="target"):
        log_cosh_loss(x, y > 0)


@pytest.mark.parametrize("background", [0, 1, 2])
def test_sigmoid_focal_loss_of_a_background_among_the_columns(background, real_device):
    """It is negative in every column, its own too, whichever way the loss is computed."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=draw, dtype=torch.float64).to(real_device).requires_grad_()
    classes = torch.tensor([0, 1, 2, 2, 1, 0, -100], device=real_device)
    found = classes.masked_fill(classes == background, 3)
    one_hot = F.one_hot(found.clamp(min=0), 4)[:, :3].double()
    counts = (classes != -100).double().unsqueeze(1).expand_as(x)
    expected = sigmoid_focal_loss(x, one_hot, weight=counts)
    for function in (sigmoid_focal_loss, reference.sigmoid_focal_loss):
        got = function(x, classes, background_index=background)
        torch.testing.assert_close(got, expected)
    first = [torch.autograd.grad(loss.square().sum(), x, create_graph=True)[0] for loss in (got, expected)]
    second = [torch.autograd.grad(g.sin().sum(), x)[0] for g in first]
    torch.testing.assert_close(first[0], first[1])
    torch.testing.assert_close(second[0], second[1])
    fused = sigmoid_focal_loss(x, classes, background_index=background)
    (first,) = torch.autograd.grad(fused.square().sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first.sin().sum(), x)[0], second[1])


@every_dtype
def test_infinite_logits_that_are_right_cost_nothing(dtype, device):
    """No 0 * infinity: the loss of a hard target is 0 or infinite, its gradient finite."""
    inf = torch.inf
    x = torch.tensor([inf, -inf, inf, -inf], dtype=dtype).requires_grad_()
    y = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype)
    for gamma in (0, 0.5, 1, 2, 3.5):
        value = sigmoid_focal_loss(x, y, alpha=-1, gamma=gamma)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.tolist() == [0, 0, inf, inf]
        assert grad.tolist() == [0, 0, 1, -1]
    for more in ({}, {"pos_weight": torch.tensor(2.0, dtype=dtype)}):
        w = more.get("pos_weight", 1)
        value = fastloss.functional.binary_cross_entropy_with_logits(x, y, reduction="none", **more)
        (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        assert value.tolist() == [0, 0, inf, inf]
        assert grad.tolist() == [0, 0, 1, -w]
        assert torch.autograd.grad(grad.sum(), x)[0].tolist() == [0, 0, 0, 0]


@every_dtype
def test_kl_div_of_classes_without_probability(dtype, device):
    """They add nothing, given as 0 or as the logarithm of it."""
    log_q = torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=dtype)
    x = torch.tensor([-torch.inf, -2.0, 0.0], dtype=dtype).requires_grad_()
    for target, log_target in ((log_q, True), (log_q.exp(), False)):
        value = fastloss.functional.kl_div(x, target, reduction="sum", log_target=log_target)
        assert value == 0
        assert torch.autograd.grad(value, x)[0].tolist() == [0, 0, -1]
    x = torch.full((3,), torch.nan, dtype=dtype)
    for target, log_target in ((log_q, True), (log_q.exp(), False)):
        each = fastloss.functional.kl_div(x, target, reduction="none", log_target=log_target)
        assert each.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_errors_as_large_as_the_type(dtype, device):
    """1 / n comes before the 2 of the derivative, and beta divides before the second factor."""
    top = torch.finfo(dtype).max
    e = torch.tensor([0.75 * top, 1.0], dtype=dtype).requires_grad_()
    y = torch.zeros(2, dtype=dtype).requires_grad_()
    for weight in (None, torch.ones(2, dtype=dtype)):
        grads = torch.autograd.grad(fastloss.functional.mse_loss(e, y, weight=weight), (e, y))
        torch.testing.assert_close(grads[0], e.detach())
        torch.testing.assert_close(grads[1], -e.detach())
    e = torch.tensor([1e30, 3.0], dtype=dtype)
    got = fastloss.functional.smooth_l1_loss(e, torch.zeros_like(e), beta=1e31, reduction="none")
    torch.testing.assert_close(got, (0.5 * e.double() * e.double() / 1e31).to(dtype))
    x = torch.full((3,), 0.9 * top, dtype=dtype).requires_grad_()
    value = sigmoid_focal_loss(x, torch.tensor([1.0, 0.0, 1.0], dtype=dtype), alpha=-1, reduction="none")
    assert torch.autograd.grad(value.sum(), x)[0].tolist() == [0, 1, 0]
