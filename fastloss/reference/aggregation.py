"""Reductions of the losses of samples to one number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss.reference.elementwise import safe_sqrt
from fastloss.reference.options import accumulation_dtype, select

__all__ = ["chi2_dro_loss", "cvar_loss", "flooding_loss", "soft_ad_loss", "tilted_loss"]


def _mean(x: Tensor, w: Tensor | None) -> Tensor:
    return x.mean() if w is None else (w * x).sum() / w.sum()


def _running_sums(x: Tensor) -> Tensor:
    """Return `cumsum`, whose order of additions is not fixed on CUDA; here each adds what is twice as far away."""
    reach = 1
    while reach < len(x):
        x = torch.cat([x[:reach], x[reach:] + x[:-reach]])
        reach *= 2
    return x


def _tail(x: Tensor, w: Tensor | None, q: float) -> Tensor:
    """Return the mean of the largest losses, of a weight of (1 - q) in all; ties at its edge share what is left."""
    w = torch.ones_like(x) if w is None else w
    down, order = x.detach().sort(descending=True)
    cumulated = _running_sums(w.detach().gather(0, order).double())
    at = (cumulated < (1 - q) * w.detach().double().sum()).sum().clamp(max=len(x) - 1)
    edge = torch.where(x.detach().isnan().any(), math.nan, down.gather(0, at.reshape(1)))
    tied, above = w * (x == edge), w * (x > edge)
    tail_weight = (1 - q) * w.double().sum()  # of which the edge takes what is left: a small difference
    left = (tail_weight - above.double().sum()).to(x.dtype)
    at_edge = edge + (tied * torch.where((tied > 0) | edge.isnan(), x - edge, 0.0)).sum() / tied.sum()
    total = torch.where(above > 0, above * x, 0.0).sum() + left * at_edge
    return (total / tail_weight.to(x.dtype)).reshape(())


def _ball(x: Tensor, w: Tensor | None, rho: float) -> Tensor:
    """Return m + sqrt(((1 + 2 rho) p - 1) v): mean, variance and fraction of the losses above the best theta."""
    w = torch.ones_like(x) if w is None else w
    down, order = x.detach().double().sort(descending=True)
    part, below = w.detach().gather(0, order).double(), down - down[0]
    count, first, second = map(_running_sums, (part, part * below, part * below * below))
    # sums of excesses over each loss, and of their squares: the objective still falls there?
    squares, excess = second - 2 * below * first + below * below * count, first - below * count
    falls = (excess > 0) & (count[-1] * squares <= (1 + 2 * rho) * excess * excess)
    inside = w * torch.where(falls, x.detach().gather(0, order), -math.inf).amax().lt(x)
    fraction = inside.sum() / w.sum()
    mean = (inside * x).sum() / inside.sum()
    variance = (inside * (x - mean).square()).sum() / inside.sum()
    return mean + safe_sqrt(variance * (2 * rho * fraction + (fraction - 1)).clamp(min=0))


def _tilted(x: Tensor, w: Tensor | None, t: float) -> Tensor:
    if t == 0:
        return _mean(x, w)
    inside = x if w is None else x.masked_fill(w == 0, -math.copysign(math.inf, t))
    top = (t * inside.detach()).amax()
    tx = t * x - top
    # all close to each other: exact however small t is
    is_small = torch.where(inside.isinf(), 0.0, tx).abs().amax() < 1
    small = torch.log1p(_mean(torch.expm1(torch.where(is_small, tx, 0.0)), w))
    if w is None:
        large = (t * x).logsumexp(0) - math.log(len(x))
    else:
        large = (t * inside + torch.where(w == 0, 1.0, w).log()).logsumexp(0) - w.sum().log()
    return torch.where(is_small, (top + small) / t, large / t)


def _read(x: Tensor, w: Tensor) -> Tensor:
    """Return the losses, with one that counts in place of those that do not: no sum then meets another extreme."""
    counts, found = w != 0, x.detach()
    one = torch.where(counts & found.isfinite(), found, -math.inf).amax() if len(x) else found.sum()
    return torch.where(counts, x, torch.where(one.isfinite(), one, 0.0))


def aggregated(
    losses: Tensor,
    theta: Tensor | None,
    weight: Tensor | None,
    kind: str,
    number: float,
    eta: float,
    flood: float,
) -> Tensor:
    """Aggregate losses [n]; `number` is q, rho, sigma or t."""
    x = losses.to(accumulation_dtype(losses.dtype))
    if weight is not None:
        x = _read(x, weight)

    def excess() -> Tensor:
        return torch.where(x <= theta, 0.0, x - theta)  # NaN stays

    def chi2_at() -> Tensor:
        return theta + math.sqrt(1 + 2 * number) * safe_sqrt(_mean(excess().square(), weight))

    def soft_ad() -> Tensor:
        u = (x - theta) / number
        return eta * theta + number**2 * _mean(u * (u / (1 + torch.hypot(u, torch.ones_like(u)))), weight)

    formula = select("kind", kind, {
        "mean": lambda: _mean(x, weight),
        "cvar": lambda: _tail(x, weight, number),
        "cvar_at": lambda: theta + _mean(excess(), weight) / (1 - number),
        "chi2": lambda: _ball(x, weight, number),
        "chi2_at": chi2_at,
        "soft_ad": soft_ad,
        "tilted": lambda: _tilted(x, weight, number),
    })  # fmt: skip
    value = _mean(x, weight) if len(x) == 0 and theta is None else formula()
    if math.isnan(flood):
        return value
    e = value - flood
    return e * e.detach().sgn() + flood


def _whole(
    losses: Tensor,
    kind: str,
    theta: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
    number: float = 0.0,
    eta: float = 0.0,
    flood: float | None = None,
) -> Tensor:
    if not losses.is_floating_point():
        raise NotImplementedError(f"losses: expected a floating point type, got {losses.dtype}")
    acc_dtype = accumulation_dtype(losses.dtype)
    if theta is not None:
        theta = (
            theta.to(acc_dtype) if isinstance(theta, Tensor) else losses.new_full((), theta, dtype=acc_dtype)
        )
    weight = None if sample_weight is None else sample_weight.to(acc_dtype)
    if mask is not None:
        weight = losses.new_ones((), dtype=acc_dtype) if weight is None else weight
        weight = torch.where(mask != 0, weight, 0.0)
    for name, t in (("sample_weight", sample_weight), ("mask", mask)):
        if t is not None and t.shape != losses.shape:
            raise RuntimeError(f"{name}: expected the shape of losses")
    flat = None if weight is None else weight.reshape(-1)
    level = math.nan if flood is None else flood
    value = aggregated(losses.reshape(-1), theta, flat, kind, number, eta, level)
    return value.to(losses.dtype)


def cvar_loss(
    losses: Tensor,
    q: float = 0.9,
    theta: float | Tensor | None = None,
    *,
    flood: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.cvar_loss`."""
    kind = "cvar" if theta is None else "cvar_at"
    return _whole(losses, kind, theta, sample_weight, mask, number=q, flood=flood)


def chi2_dro_loss(
    losses: Tensor,
    rho: float,
    theta: float | Tensor | None = None,
    *,
    flood: float | None = None,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.chi2_dro_loss`."""
    kind = "chi2" if theta is None else "chi2_at"
    return _whole(losses, kind, theta, sample_weight, mask, number=rho, flood=flood)


def flooding_loss(
    losses: Tensor,
    level: float,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.flooding_loss`."""
    return _whole(losses, "mean", None, sample_weight, mask, flood=level)


def soft_ad_loss(
    losses: Tensor,
    theta: float | Tensor,
    sigma: float = 1.0,
    eta: float = 1.0,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.soft_ad_loss`."""
    return _whole(losses, "soft_ad", theta, sample_weight, mask, number=sigma, eta=eta)


def tilted_loss(
    losses: Tensor,
    t: float,
    *,
    sample_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.tilted_loss`."""
    return _whole(losses, "tilted", None, sample_weight, mask, number=t)
