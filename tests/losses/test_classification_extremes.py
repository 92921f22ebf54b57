"""Where cross entropies lose their accuracy: sure predictions, huge logits, masked classes, long rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fastloss
from fastloss import reference
from fastloss.functional import cross_entropy

EPS = {torch.float32: 2**-23, torch.float64: 2**-52, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def run(function, x, *args, **kwargs):
    leaf = x.detach().requires_grad_()
    value = function(leaf, *args, **kwargs)
    (grad,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), grad


def collapse_safe(x, t):
    """Loss and gradient of each row in float64 from the margin, which cancels nothing.

    loss = softplus(d), d = logsumexp of the others - x_t; at the target the gradient is -sigmoid(d).
    """
    x = x.double().cpu()
    others = x.scatter(1, t.cpu()[:, None], -math.inf)
    d = others.logsumexp(1) - x.gather(1, t.cpu()[:, None]).squeeze(1)
    q = d.sigmoid()
    grad = others.softmax(1) * q[:, None]
    return F.softplus(d, threshold=math.inf), grad.scatter(1, t.cpu()[:, None], -q[:, None])


def sure_rows(margins, classes, dtype, device):
    """One row per margin: the target lies that many nats above the log-sum of all others."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(margins), classes, generator=g, dtype=torch.float64)
    t = torch.randint(classes, (len(margins),), generator=g)
    others = x.scatter(1, t[:, None], -math.inf).logsumexp(1)
    x.scatter_(1, t[:, None], (others + torch.tensor(margins, dtype=torch.float64))[:, None])
    return x.to(device, dtype), t.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 33, 1000, 4099])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_target_wins(dtype, classes, reduction, device):
    """The loss is relatively accurate from 0 to 80 nats; in plain PyTorch it becomes 0 at 17."""
    for margin in (0.0, 1.0, 5.0, 10.0, 16.0, 16.6, 17.0, 20.0, 25.0, 37.0, 50.0, 65.0, 80.0):
        x, t = sure_rows([margin] * 3, classes, dtype, device)
        loss, grad = collapse_safe(x, t)
        loss = loss if reduction == "none" else loss.sum()
        got, got_grad = run(cross_entropy, x, t, reduction=reduction)
        # A difference of two logits near `margin` is off by eps / 2 * margin before it is exponentiated.
        working = EPS[torch.float64 if dtype == torch.float64 else torch.float32]
        rtol = max(EPS[dtype], (8 + 4 * margin) * working)
        torch.testing.assert_close(got.double().cpu(), loss, rtol=rtol, atol=0)
        kept = grad.abs() > 1e-36
        torch.testing.assert_close(got_grad.double().cpu()[kept], grad[kept], rtol=2 * rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_target_wins_with_extras(dtype, device):
    """The extras that keep the loss near zero keep it accurate too."""
    x, t = sure_rows([17.0, 30.0, 60.0, 80.0], 333, dtype, device)
    loss, _ = collapse_safe(x, t)
    sample = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=dtype, device=device)
    weight = torch.linspace(0.5, 2, 333, dtype=dtype, device=device)
    got = cross_entropy(x * 2, t, weight, reduction="none", logit_scale=0.5, sample_weight=sample)
    expected = loss * (weight[t] * sample).double().cpu()
    rtol = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.double().cpu(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_target_wins_with_a_one_hot_distribution(dtype, device):
    x, t = sure_rows([17.0, 30.0, 60.0, 80.0], 333, dtype, device)
    loss, _ = collapse_safe(x, t)
    one_hot = F.one_hot(t, 333).to(dtype)
    got, plain = (f(x, one_hot, reduction="none").double().cpu() for f in (cross_entropy, F.cross_entropy))
    rounding = 4 * EPS[dtype]  # of sums near 1, in which both round
    assert ((got - loss).abs() <= torch.maximum((plain - loss).abs(), 1e-4 * loss) + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "option", [("reduction", "sum"), ("label_smoothing", 0.1), ("z_loss", 1e-4)], ids=str
)
def test_huge_logits(dtype, option, device):
    """Plus and minus ten thousand: nothing overflows, and the winner takes all."""
    options = dict([option])
    g = torch.Generator().manual_seed(0)
    x = ((torch.rand(8, 1000, generator=g, dtype=torch.float64) * 2 - 1) * 1e4).to(device, dtype)
    t = torch.cat([x.argmax(1)[:4].cpu(), torch.randint(1000, (4,), generator=g)]).to(device)
    value, grad = run(fastloss.reference.cross_entropy, x.double().cpu(), t.cpu(), **options)
    got, got_grad = run(cross_entropy, x, t, **options)
    if value.item() > torch.finfo(dtype).max:
        assert got.isinf()
    else:
        torch.testing.assert_close(got.double().cpu(), value, rtol=2 * EPS[dtype], atol=0)
    assert got_grad.isfinite().all()
    torch.testing.assert_close(got_grad.double().cpu(), grad, rtol=4 * EPS[dtype], atol=4 * EPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [1, 15, 16, 17, 4096, 20000, 32002])
def test_leading_classes_masked(dtype, masked, device):
    """A row that starts with a block of -inf: the running maximum is -inf until the block ends."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 32003, generator=g, dtype=torch.float64)
    x[:, :masked] = -math.inf
    x, t = x.to(device, dtype), torch.tensor([32002, masked], device=device)
    value, grad = run(F.cross_entropy, x.double().cpu(), t.cpu())
    got, got_grad = run(cross_entropy, x, t)
    torch.testing.assert_close(got.double().cpu(), value, rtol=4 * EPS[dtype], atol=1e-7)
    torch.testing.assert_close(got_grad.double().cpu(), grad, rtol=0.0, atol=2 * EPS[dtype])
    assert (got_grad[:, :masked] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 33, 1000])
def test_infinities_and_nan(dtype, classes, device):
    """The same NaN, infinities and zeros as torch: target masked, all masked, +inf, NaN, one left."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, classes, generator=g, dtype=torch.float64)
    x[0, 0] = -math.inf
    x[1, :] = -math.inf
    x[2, classes // 2] = math.inf
    x[3, -1] = math.nan
    x[4, 1:] = -math.inf
    x[5, :-1] = -math.inf
    x, t = x.to(device, dtype), torch.tensor([0, 0, classes // 2, 0, 0, 0, classes - 1], device=device)
    for reduction in ("none", "sum", "mean"):
        value, grad = run(F.cross_entropy, x.double().cpu(), t.cpu(), reduction=reduction)
        got, got_grad = run(cross_entropy, x, t, reduction=reduction)
        tolerance = dict(rtol=4 * EPS[dtype], atol=4 * EPS[dtype], equal_nan=True)
        torch.testing.assert_close(got.double().cpu(), value, **tolerance)
        torch.testing.assert_close(got_grad.double().cpu(), grad, **tolerance)


def test_ignored_rows_may_hold_anything(device):
    """NaN in a row that is ignored: torch's value, and a gradient of zero where torch's is NaN."""
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    x[1] = math.nan
    x[2, 3] = math.inf
    t = torch.tensor([1, -100, -100, 2])
    for reduction in ("none", "sum", "mean"):
        value, grad = run(F.cross_entropy, x, t, reduction=reduction)
        got, got_grad = run(cross_entropy, x.to(device), t.to(device), reduction=reduction)
        torch.testing.assert_close(got.cpu(), value, equal_nan=True)
        torch.testing.assert_close(got_grad.cpu()[[0, 3]], grad[[0, 3]])
        assert got.isfinite().all()
        assert (got_grad[1:3] == 0).all(), "an ignored row has no gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_overflow_in_the_sum_of_a_half_type(dtype, device):
    """Sums over rows and classes are taken in float32: the mean of many large losses is finite."""
    x = torch.zeros(3000, 8, dtype=dtype)
    x[:, 0] = 200
    t = torch.ones(3000, dtype=torch.long)
    assert cross_entropy(x.to(device), t.to(device)).item() == 200
    q = torch.full((3000, 8), 1 / 8, dtype=dtype)
    torch.testing.assert_close(cross_entropy(x.to(device), q.to(device)).float().item(), 175.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mean_over_many_rows(dtype, device):
    """A long sum in float32 drifts unless it is taken in pieces."""
    rows = 200_000 if device == "cuda" else 20_000
    x = torch.full((rows, 3), 0.1, dtype=dtype)
    x[:, 1] = 1.1
    t = torch.zeros(rows, dtype=torch.long)
    exact = F.cross_entropy(x[:1].double(), t[:1]).item()
    got = cross_entropy(x.to(device), t.to(device)).item()
    assert got == pytest.approx(exact, rel=max(EPS[dtype] / 2, 4 * EPS[torch.float32]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_classes_without_probability_and_without_logit(dtype, device):
    """A masked class of which the target distribution has nothing adds nothing."""
    g = torch.Generator().manual_seed(0)
    x, q = torch.randn(3, 40, generator=g), torch.rand(3, 40, generator=g)
    x[:, 20:], q[:, 20:] = -math.inf, 0
    q = q / q.sum(1, keepdim=True)
    x, q = x.to(device, dtype), q.to(device, dtype)
    value, grad = run(cross_entropy, x, q)
    kept, kept_grad = run(cross_entropy, x[:, :20], q[:, :20])
    torch.testing.assert_close(value, kept)
    torch.testing.assert_close(grad[:, :20], kept_grad)
    assert not grad[:, 20:].any()
    wide = x.double().cpu().requires_grad_()
    of_reference = reference.cross_entropy(wide, q.double().cpu())
    torch.testing.assert_close(value.double().cpu(), of_reference.detach(), rtol=4 * EPS[dtype], atol=0)
    (first,) = torch.autograd.grad(of_reference, wide, create_graph=True)
    assert torch.autograd.grad(first.sin().sum(), wide)[0].isfinite().all()


@pytest.mark.parametrize(
    "option", [{}, {"softcap": 30.0}, {"z_loss": 0.0}, {"label_smoothing": 0.0}], ids=str
)
def test_gradient_scaler_meets_infinity(option, device):
    """The gradients that overflow are infinite; none is NaN for the sake of a term that is switched off."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(device).half().requires_grad_()
    (cross_entropy(x, torch.arange(3, device=device), **option) * 65536).backward()
    assert x.grad.isinf().all()
    assert (x.grad.diagonal() < 0).all()
