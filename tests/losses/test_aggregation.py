"""Reductions of losses of samples against their definitions, and at the edges of these."""

from __future__ import annotations

import math

import pytest
import torch
from support import DTYPES, dtype_id, same_bits
from torch.autograd import grad

import fastloss.functional as FL
from fastloss import reference
from fastloss._registry import InputSampler

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
WHOLE = {
    "cvar": lambda x, **k: FL.cvar_loss(x, 0.8, **k),
    "cvar_at": lambda x, **k: FL.cvar_loss(x, 0.8, 0.5, **k),
    "chi2": lambda x, **k: FL.chi2_dro_loss(x, 0.3, **k),
    "chi2_at": lambda x, **k: FL.chi2_dro_loss(x, 0.3, 0.5, **k),
    "flooding": lambda x, **k: FL.flooding_loss(x, 0.1, **k),
    "soft_ad": lambda x, **k: FL.soft_ad_loss(x, 0.5, **k),
    "tilted": lambda x, **k: FL.tilted_loss(x, 2.0, **k),
}
every_loss = pytest.mark.parametrize("loss", WHOLE.values(), ids=WHOLE)


def value_and_gradient(function, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), *grad(value, leaves)


def worst_mean(losses, q):
    """Return the mean of the largest losses, the last of them in part, from Python numbers."""
    left = tail = (1 - q) * len(losses)
    total = 0.0
    for x in sorted(losses, reverse=True):
        take = min(1.0, left)
        total, left = total + take * x, left - take
    return total / tail


# ---- cvar


@pytest.mark.parametrize("q", [0.0, 1e-12, 0.1, 0.5, 0.85, 0.9, 0.99, 1 - 1e-12])
@every_dtype
def test_cvar_is_the_mean_of_the_worst(q, dtype, device):
    for n in (1, 2, 10, 97, 5000):
        x = InputSampler(dtype, device).normal(n, scale=3.0)
        got, dx = value_and_gradient(lambda y, q=q: FL.cvar_loss(y, q), x)
        rel = {2: 1e-2, 4: 2e-6, 8: 1e-12}[dtype.itemsize]
        assert got.item() == pytest.approx(worst_mean(x.double().tolist(), q), rel=rel, abs=rel)
        assert (dx >= 0).all()
        assert dx.double().sum().item() == pytest.approx(1.0, rel=rel if dtype.itemsize > 2 else 0.02)


def test_cvar_is_the_least_over_theta(device):
    x = InputSampler(torch.float64, device).normal(101)
    for q in (0.3, 0.85, 0.96):
        minimum = min(FL.cvar_loss(x, q, theta).item() for theta in x.tolist())
        assert FL.cvar_loss(x, q).item() == pytest.approx(minimum, rel=1e-12)


def test_cvar_shares_ties(device):
    """Losses at the edge of the tail have the same weight in any order."""
    x = torch.tensor([2.0, 1.0, 2.0, 5.0, 0.0, 2.0, -1.0, -0.0], device=device)
    value, dx = value_and_gradient(
        lambda y: FL.cvar_loss(y, 0.75), x
    )  # two of eight: the 5 and one of the 2s
    assert value.item() == 3.5
    torch.testing.assert_close(dx.cpu(), torch.tensor([1, 0, 1, 3, 0, 1, 0, 0]) / 6)
    zeros = torch.tensor([-1.0, -0.0, 0.0, -2.0], device=device)
    value, dx = value_and_gradient(lambda y: FL.cvar_loss(y, 0.75), zeros)
    torch.testing.assert_close(dx.cpu(), torch.tensor([0, 0.5, 0.5, 0]))


def test_cvar_of_negative_and_tiny_losses(device):
    x = torch.tensor([-3.0, -1e-40, -1e30, -2.0, 1e-42, -7.0], device=device)
    assert FL.cvar_loss(x, 0.5).item() == pytest.approx(-2 / 3)
    assert FL.cvar_loss(-x.abs(), 0.1).item() == pytest.approx(worst_mean((-x.abs()).tolist(), 0.1))


def test_weights_repeat_samples(device):
    x, times = InputSampler(torch.float64, device).normal(50), torch.arange(50, device=device) % 4
    repeated = x.repeat_interleave(times)
    for loss in WHOLE.values():
        got = loss(x, sample_weight=times)
        torch.testing.assert_close(got, loss(repeated))
        torch.testing.assert_close(loss(x, mask=times == 2), loss(x[times == 2]))


# ---- chi2


def ball(x, rho):
    """The best distribution, by bisection on theta in float64."""
    x = x.double()
    low, high = x.min() - (x.max() - x.min() + 1) / min(rho, 1), x.max()
    for _ in range(200):
        theta = (low + high) / 2
        p = (x - theta).relu() / (x - theta).relu().sum()
        low, high = (low, theta) if 0.5 * (len(x) * p - 1).square().mean() > rho else (theta, high)
    p = (x - low).relu()
    return p / p.sum()


@pytest.mark.parametrize("rho", [1e-4, 0.01, 0.3, 2.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_chi2_is_the_worst_of_a_ball(rho, dtype, device):
    for n in (20, 300, 5000):
        x = InputSampler(dtype, device).normal(n).square()
        value, dx = value_and_gradient(lambda y: FL.chi2_dro_loss(y, rho), x)
        p = ball(x, rho)
        tight = {"rtol": 1e-5, "atol": 1e-6 / n} if dtype == torch.float32 else {"rtol": 1e-8, "atol": 1e-10}
        torch.testing.assert_close(dx.double(), p, **tight)
        torch.testing.assert_close(value.double(), (p * x.double()).sum(), rtol=tight["rtol"], atol=0)


def test_chi2_from_the_mean_to_the_largest(device):
    x = InputSampler(torch.float32, device).normal(100)
    mean, dx = value_and_gradient(lambda y: FL.chi2_dro_loss(y, 0.0), x)
    torch.testing.assert_close(mean, x.mean())
    torch.testing.assert_close(dx, torch.full_like(x, 0.01))
    # of a small ball the mean and a deviation: no digits are lost to a theta far below
    for rho in (1e-6, 1e-10):
        wanted = x.double().mean() + math.sqrt(2 * rho) * x.double().std(correction=0)
        torch.testing.assert_close(FL.chi2_dro_loss(x, rho).double(), wanted, rtol=0, atol=1e-7)
    for rho in (49.5, 1e6):
        largest, dx = value_and_gradient(lambda y, rho=rho: FL.chi2_dro_loss(y, rho), x)
        assert largest == x.max()
        torch.testing.assert_close(dx, (x == x.max()).float())


def test_chi2_keeps_a_small_spread(device):
    """The deviation of losses that are close together, next to one that is far below."""
    x = (5 + 1e-3 * InputSampler(torch.float64, device).normal(2000)).float()
    x[7] = 0.0
    wide = x.double()
    wanted = wide.mean() + math.sqrt(2e-9) * wide.std(correction=0)
    torch.testing.assert_close(FL.chi2_dro_loss(x, 1e-9).double(), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_chi2_is_blind_to_scale(dtype, device):
    """Squares of the losses may overflow or vanish."""
    x = InputSampler(dtype, device).normal(64).square()
    one = value_and_gradient(lambda y: FL.chi2_dro_loss(y, 0.5), x)
    far = {torch.float32: 100, torch.float64: 900}[dtype]
    for size in (2.0**-far, 2.0**far):
        value, dx = value_and_gradient(lambda y: FL.chi2_dro_loss(y, 0.5), x * size)
        torch.testing.assert_close(value / size, one[0])
        torch.testing.assert_close(dx, one[1])


# ---- theta


@every_dtype
def test_gradient_of_theta(dtype, device):
    x = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=dtype, device=device)
    theta = torch.tensor(1.0, dtype=dtype, device=device)
    value, dx, dtheta = value_and_gradient(lambda y, t: FL.cvar_loss(y, 0.5, t), x, theta)
    assert (value, dtheta) == (3.0, 0.0)
    assert dx.tolist() == [0.0, 0.0, 0.5, 0.5]  # relu has no slope at 0
    value, dx, dtheta = value_and_gradient(lambda y, t: FL.chi2_dro_loss(y, 1.5, t), x, theta)
    root = math.sqrt(10 / 4)
    rel = 1e-2 if dtype.itemsize == 2 else 1e-6
    assert value.item() == pytest.approx(1 + 2 * root, rel=rel)
    assert dtheta.item() == pytest.approx(1 - 2 / root, rel=rel)
    _, dx, dtheta = value_and_gradient(lambda y, t: FL.soft_ad_loss(y, t, 0.5, 0.3), x, theta)
    assert dtheta.item() == pytest.approx(0.3 - dx.double().sum().item(), rel=rel)


def test_theta_of_another_type_and_as_a_number(device):
    x = InputSampler(torch.bfloat16, device).normal(30)
    theta = torch.tensor(0.25, device=device, requires_grad=True)
    for loss in (lambda t: FL.cvar_loss(x, 0.7, t), lambda t: FL.soft_ad_loss(x, t)):
        assert same_bits(loss(theta), loss(0.25))
        assert grad(loss(theta), theta)[0].dtype == torch.float32


def test_nothing_above_theta(device):
    """The root of 0 has no slope that is not finite."""
    x, theta = torch.zeros(5, device=device), torch.tensor(1.0, device=device)
    value, dx, dtheta = value_and_gradient(lambda y, t: FL.chi2_dro_loss(y, 0.5, t), x, theta)
    assert (value, dtheta) == (1.0, 1.0)
    assert not dx.any()


# ---- flooding


def test_flooding_turns_the_gradient_round(device):
    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    for level, value, slope in ((0.5, 2.0, 1.0), (2.0, 2.0, 0.0), (3.0, 4.0, -1.0)):
        got, dx = value_and_gradient(lambda y, level=level: FL.flooding_loss(y, level), x)
        assert got == value
        torch.testing.assert_close(dx, torch.full_like(x, slope / 3))
    plain = value_and_gradient(WHOLE["cvar"], x)
    flooded = value_and_gradient(lambda y: WHOLE["cvar"](y, flood=4.0), x)
    assert flooded[0] == 8 - plain[0]
    torch.testing.assert_close(flooded[1], -plain[1])


# ---- tilted


@pytest.mark.parametrize("t", [1e-30, 1e-12, 1e-7, 1e-4, 1e-2, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_tilted_is_continuous_in_t(t, sign, device):
    x = InputSampler(torch.float32, device).uniform(1000)
    wide, tilt = x.double(), sign * t
    d = wide - wide.mean()
    # the first cumulants where these suffice
    expected = wide.mean() + tilt * d.square().mean() / 2 + tilt**2 * d.pow(3).mean() / 6
    if t >= 1e-2:
        expected = ((tilt * wide).logsumexp(0) - math.log(1000)) / tilt
    torch.testing.assert_close(FL.tilted_loss(x, tilt).double(), expected, rtol=3e-7, atol=0)


def test_tilted_zero_is_the_mean(device):
    x = InputSampler(torch.float64, device).normal(321)
    value, dx = value_and_gradient(lambda y: FL.tilted_loss(y, 0.0), x)
    torch.testing.assert_close(value, x.mean())
    torch.testing.assert_close(dx, torch.full_like(x, 1 / 321))


@every_dtype
def test_tilted_does_not_overflow(dtype, device):
    x = torch.tensor([100.0, 0.0, 99.0, -1e4], dtype=dtype, device=device)
    for t in (1.0, 50.0, -1.0, -50.0):
        value, dx = value_and_gradient(lambda y, t=t: FL.tilted_loss(y, t), x)
        wide = x.double()
        expected = ((t * wide).logsumexp(0) - math.log(4)) / t
        torch.testing.assert_close(value, expected.to(dtype))
        close = {"rtol": 2e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(dx.double(), (t * wide).softmax(0), **close)


# ---- what no sample or a strange one does


@every_loss
def test_of_nothing(loss, device):
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    value = loss(x)
    assert value.isnan()
    assert grad(value, x)[0].shape == (0, 3)
    y = torch.ones(4, device=device, requires_grad=True)
    value = loss(y, mask=torch.zeros(4, device=device))
    assert value.isnan()
    assert not grad(value, y)[0].any()


@every_loss
@every_dtype
def test_of_one_and_of_equals(loss, dtype, device):
    """All samples weigh the same where their losses do."""
    one = torch.full((1,), 0.75, dtype=dtype, device=device)
    alone = value_and_gradient(loss, one.reshape(()))
    for n in (1, 13, 4500):
        value, dx = value_and_gradient(loss, one.expand(n))
        torch.testing.assert_close(value, alone[0])
        assert (dx == dx[0]).all()
        torch.testing.assert_close(
            dx[0], (alone[1].double() / n).to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0
        )


@every_loss
def test_weight_zero_hides_everything(loss, device):
    x = InputSampler(torch.float32, device).normal(40).square()
    flags = torch.arange(40, device=device) % 3 > 0
    for strange in (math.nan, math.inf, -math.inf):
        value, dx = value_and_gradient(lambda y: loss(y, mask=flags), x.masked_fill(~flags, strange))
        plain = value_and_gradient(loss, x[flags])
        torch.testing.assert_close(value, plain[0])
        torch.testing.assert_close(dx[flags], plain[1])
        assert not dx[~flags].any()


@every_loss
def test_nan_and_infinity(loss, device):
    x = InputSampler(torch.float32, device).normal(40).square()
    x[3] = math.nan
    assert loss(x).isnan()
    x[3] = math.inf
    assert loss(x) == math.inf
    x[3] = -math.inf
    value = loss(x)
    assert value == (math.inf if loss in (WHOLE["flooding"], WHOLE["soft_ad"]) else value)
    assert FL.cvar_loss(torch.full((4,), -math.inf, device=device), 0.5) == -math.inf
    assert FL.tilted_loss(torch.tensor([1.0, -math.inf], device=device), -1.0) == -math.inf


@every_loss
def test_order_of_samples_and_shape(loss, device):
    x = InputSampler(torch.float64, device).normal(4, 5, 6)
    shuffled = torch.randperm(120, generator=torch.Generator().manual_seed(0)).to(x.device)
    value, dx = value_and_gradient(loss, x)
    assert same_bits(value, loss(x.flatten()))
    other = value_and_gradient(loss, x.flatten()[shuffled])
    torch.testing.assert_close(other[0], value)
    torch.testing.assert_close(other[1], dx.flatten()[shuffled])


def test_gradient_of_weights(device):
    draw = InputSampler(torch.float64, device)
    x, w = draw.normal(6), draw.uniform(6, low=0.5).requires_grad_()
    for loss in WHOLE.values():
        assert torch.autograd.gradcheck(lambda v, loss=loss: loss(x, sample_weight=v), w)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: FL.cvar_loss(x, 1.0), "q"),
        (lambda x: FL.cvar_loss(x, -0.1), "q"),
        (lambda x: FL.cvar_loss(x, theta=torch.zeros(1)), "theta"),
        (lambda x: FL.cvar_loss(x, flood=math.nan), "flood"),
        (lambda x: FL.chi2_dro_loss(x, -1.0), "rho"),
        (lambda x: FL.flooding_loss(x, math.inf), "level"),
        (lambda x: FL.soft_ad_loss(x, 0.0, 0.0), "sigma"),
        (lambda x: FL.soft_ad_loss(x, None), "theta"),
        (lambda x: FL.tilted_loss(x, math.nan), "t: "),
        (lambda x: FL.tilted_loss(x, 1.0, sample_weight=torch.ones(2)), "sample_weight"),
        (lambda x: FL.tilted_loss(x, 1.0, mask=torch.ones(2)), "mask"),
        (lambda x: FL.tilted_loss(x.long(), 1.0), "losses"),
    ],
)
def test_refuses(call, match):
    with pytest.raises((ValueError, RuntimeError, TypeError), match=match):
        call(torch.zeros(3))


# ---- padding of a vector, and samples that are left out, far from all that count


@pytest.mark.parametrize("t", [-10.0, -0.5, 1.0, 30.0])
@every_dtype
def test_tilted_far_from_zero(t, dtype, device):
    """Whatever the number of losses is a multiple of, and whichever of them are left out."""
    for offset in (9.0, -100.0, 3e4, -3e4):
        for n in (1, 2, 3, 15, 16, 17, 33, 70):
            x = (torch.rand(n, generator=torch.Generator().manual_seed(n)) + offset).to(device, dtype)
            wide = x.double()
            value, dx = value_and_gradient(lambda y: FL.tilted_loss(y, t), x)
            expected = ((t * wide).logsumexp(0) - math.log(n)) / t
            torch.testing.assert_close(value, expected.to(dtype))
            close = {"rtol": 2e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(dx.double(), (t * wide).softmax(0), **close)
            flags = torch.arange(n, device=device) % 2 == 0
            masked, dx = value_and_gradient(lambda y, flags=flags: FL.tilted_loss(y, t, mask=flags), x)
            alone = value_and_gradient(lambda y: FL.tilted_loss(y, t), x[flags])
            torch.testing.assert_close(masked, alone[0])
            torch.testing.assert_close(dx[flags], alone[1])
            assert not dx[~flags].any()


@every_loss
def test_left_out_next_to_losses_far_from_zero(loss, device):
    """A sample of weight 0 is no extreme, in the reference and its second derivatives neither."""
    for offset in (-1e4, 1e4):
        x = InputSampler(torch.float64, "cpu").normal(9) + offset
        flags = torch.arange(9) % 3 > 0
        twice = []
        for call in (lambda y, flags=flags: loss(y, mask=flags), lambda y, flags=flags: loss(y[flags])):
            leaf = x.clone().requires_grad_()
            value = call(leaf)
            (first,) = grad(value, leaf, create_graph=True)
            second = grad(first.sin().sum(), leaf)[0] if first.requires_grad else torch.zeros_like(x)
            twice.append((value.detach(), first.detach(), second))
        for masked, alone in zip(*twice, strict=True):
            torch.testing.assert_close(masked, alone, rtol=1e-9, atol=1e-12)


def test_reference_of_tilted_where_the_least_is_left_out():
    x = torch.tensor([-134.0, 68.0], requires_grad=True)
    value = reference.tilted_loss(x, -50.0, sample_weight=torch.tensor([0.0, 1.0]))
    assert value == 68
    assert grad(value, x)[0].tolist() == [0, 1]
