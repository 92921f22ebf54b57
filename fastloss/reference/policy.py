"""Policy and value heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, one_of, select, unknown

__all__ = ["policy_loss", "value_loss"]

KL_TYPES = {
    "none": "none", "k1": "k1", "k2": "k2", "k3": "k3", "abs": "absolute", "k1+": "k1_straight", "k3+": "k3_straight",
}  # fmt: skip
"""The estimators of the divergence, and the formula of each."""


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """Return the value of one with the derivative of the other."""
    return gradient + (value - gradient).detach()


def within_bounds(type: str, lp, old, a, low, high) -> Tensor:
    """Return whether a token's probability has not moved too far the way that its advantage points to."""
    lp, old = lp.detach(), old.detach()
    if type == "bounded_change":
        change = lp.exp() - old.exp()
        return torch.where(a > 0, change <= high, change >= -low)
    one_of("type", type, ("bounded_change", "bounded_kl"))
    other, was = -torch.expm1(lp), -torch.expm1(old)
    of_others = torch.where(was > 0, was * (was.log() - other.log()), 0.0)
    kl = old.exp() * (old - lp) + of_others
    return torch.where(a > 0, (kl <= high) | (lp <= old), (kl <= low) | (lp >= old))


def policy_element(
    lp, old, a, ref, h, type, low, high, dual, two_sided, kl_coef, kl_type, top, entropy_coef
) -> Tensor:
    raw = old + (lp - lp.detach()) if type == "sequence_clip" else lp - old
    x = torch.where(raw.abs() > top, raw.detach().clamp(-top, top), raw)
    rho = x.exp()
    if type in (
        "clip",
        "sequence_clip",
    ):  # at a tie, as for every ratio inside the bounds, the free branch moves
        free = -a * torch.where(rho > two_sided, torch.full_like(rho, two_sided), rho)
        inside = -a * torch.where(
            (rho < 1 - low) | (rho > 1 + high), rho.detach().clamp(1 - low, 1 + high), rho
        )
        loss = torch.where(free >= inside, free, inside)
        if math.isfinite(dual):
            loss = torch.where((a < 0) & (loss > -a * dual), -a * dual, loss)
    elif type == "cispo":
        loss = -a * rho.clamp(1 - low, 1 + high).detach() * lp
    elif type == "sapo":
        t = torch.where(a > 0, torch.full_like(a, high), torch.full_like(a, low))
        loss = -a * (4 / t) * torch.sigmoid(t * (rho - 1))
    elif type == "gradient":
        loss = -a * lp
    elif type == "dro":
        loss = 0.5 * low * raw.square() - a * lp
    elif type == "geometric":
        moves = torch.where(a > 0, raw <= high, raw >= -low)
        loss = -a * torch.where(moves, lp - lp.detach(), 0.0).exp()
    elif type in ("bounded_change", "bounded_kl"):
        kept = within_bounds(type, lp, old, a, low, high)
        loss = torch.where(kept, -a * rho.clamp(max=two_sided).detach() * lp, 0.0)
    else:
        raise unknown("type", type, FORMULA.values())
    if kl_type != "none" and kl_coef:
        y = ref - lp
        k2 = 0.5 * y.square()
        estimates = {"k1": lambda: -y, "k2": lambda: k2, "k3": lambda: torch.expm1(y) - y, "absolute": y.abs}
        value = select("kl_type", kl_type.removesuffix("_straight"), estimates)()
        loss = loss + kl_coef * (straight_through(value, k2) if kl_type.endswith("_straight") else value)
    return loss - entropy_coef * h if entropy_coef else loss


def counted(mask, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors [..., T] or [..., 1] with 0 at tokens of weight 0: what stands there has no derivative."""
    if mask is None:
        return list(tensors)
    kept = torch.as_tensor(mask) != 0
    places = {True: kept, False: kept.any(-1, keepdim=True)}
    return [
        None if t is None else torch.where(places[t.shape[-1] == kept.shape[-1]], t, 0.0) for t in tensors
    ]


def aggregate(
    loss: Tensor, mask, loss_agg_mode: str, horizon: float | None = None, normalizer=None
) -> Tensor:
    """Reduce losses of tokens [..., T] to one number; tokens of weight 0 are ignored, even if NaN."""
    acc_dtype = accumulation_dtype(loss.dtype)
    m = torch.ones(loss.shape, device=loss.device) if mask is None else torch.as_tensor(mask)
    m = m.to(acc_dtype).expand(loss.shape)
    loss = torch.where(m != 0, m.to(loss.dtype) * loss, 0.0)
    if loss_agg_mode == "none":
        return loss
    length = m.sum(-1)
    answers = (length > 0).sum().clamp(min=1)
    divisor = {
        "token-mean": m.sum().clamp(min=1),
        "token-sum": m.new_ones(()),
        "seq-mean-token-mean": answers,
        "seq-mean-token-sum": answers,
        "seq-mean-token-sum-norm": answers * m.new_full((), loss.shape[-1] if horizon is None else horizon),
    }
    n = divisor[one_of("loss_agg_mode", loss_agg_mode, ("none", *divisor))]
    if normalizer is not None:
        n = torch.as_tensor(normalizer, device=loss.device)
    if loss_agg_mode == "seq-mean-token-mean":
        loss = loss.sum(-1) / length.clamp(min=1).to(loss.dtype)
    return loss.sum() / n.to(loss.dtype)


AGGREGATION = {
    "ppo": "token-mean", "grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm", "gspo": "seq-mean-token-mean", "cispo": "token-mean",
    "sapo": "seq-mean-token-mean", "vespo": "token-mean", "gpg": "token-mean", "dro": "token-mean",
    "luspo": "seq-mean-token-sum", "geo_mean": "seq-mean-token-mean", "dppo_tv": "token-mean",
    "dppo_kl": "token-mean", "clip_cov": "token-mean", "kl_cov": "token-mean", "reinforce": "seq-mean-token-sum",
    "topr": "seq-mean-token-sum",
}  # fmt: skip
"""How each type is aggregated where it is published."""
FORMULA = {
    "cispo": "cispo", "sapo": "sapo", "vespo": "gradient", "gpg": "gradient", "reinforce": "gradient", "dro": "dro",
    "topr": "gradient", "geo_mean": "geometric", "dppo_tv": "bounded_change", "dppo_kl": "bounded_kl",
    **dict.fromkeys(("ppo", "grpo", "bnpo", "dapo", "dr_grpo", "clip_cov", "kl_cov"), "clip"),
    **dict.fromkeys(("gspo", "luspo"), "sequence_clip"),
}  # fmt: skip
"""The formula of a token."""
RATIO_CAP = 20.0
"""Of dppo_tv and dppo_kl where `delta` is not given."""


def sequence_mean(x: Tensor, mask) -> Tensor:
    """Return [..., 1]: the mean over a completion's tokens, by their weights; 0 where it has none."""
    if mask is None:
        return x.mean(-1, keepdim=True)
    m = torch.as_tensor(mask).to(x.dtype).expand(x.shape)
    fraction = m / m.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(m != 0, fraction * x, 0.0).sum(-1, keepdim=True)


def vespo_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, clamp: float) -> Tensor:
    """Return A phi(w) of a completion's ratio w, phi = w^k e^(l (1 - w)); (k, l) is (2, 3) for A >= 0."""
    change = (logps - old).clamp(-clamp, clamp)
    if mask is not None:
        change = torch.where(mask != 0, mask * change, 0.0)
    log_w = change.sum(-1, keepdim=True).to(logps.dtype)
    w = log_w.exp()
    return advantages * torch.where(advantages >= 0, 2 * log_w + 3 * (1 - w), 3 * log_w + 2 * (1 - w)).exp()


def topr_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, clamp: float) -> Tensor:
    """Return A min(1, w) of a completion's probability ratio w where A < 0; what is rewarded is not tapered."""
    counted = torch.ones_like(logps) if mask is None else torch.as_tensor(mask).to(logps.dtype)
    log_w = torch.where(counted != 0, counted * (logps - old).clamp(-clamp, clamp), 0.0).sum(-1, keepdim=True)
    return advantages * torch.where((advantages >= 0) | (log_w >= 0), 0.0, log_w).exp()


def geometric_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, low: float, high: float):
    """Return A times the geometric mean of a completion's ratios, each bounded on the side that A points to.

    The advantages are those of completions [..., 1], or of tokens, of which the mean is taken.
    """
    change = logps - old
    a = advantages if advantages.shape[-1] == 1 else sequence_mean(advantages, mask)
    bounded = torch.where(a > 0, torch.clamp_max(change, high), torch.clamp_min(change, -low))
    return a * sequence_mean(bounded, mask).exp() * torch.ones_like(logps)


def covariant_tokens(loss_type, logps, old, advantages, mask, low, high, ratio, bounds, generator) -> Tensor:
    """Return flags of the tokens that clip_cov leaves out or kl_cov pulls back: so many of the first by a key."""
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0
    total = counted.sum()

    def centred(x: Tensor) -> Tensor:
        x = torch.where(counted, x, 0.0)
        return x - x.sum() / total.clamp(min=1)

    key = centred(advantages) * centred(logps)
    if one_of("loss_type", loss_type, ("clip_cov", "kl_cov")) == "clip_cov":
        rho = torch.where(counted, logps - old, 0.0).exp()
        clipped = ((advantages > 0) & (rho > 1 + high)) | ((advantages < 0) & (rho < 1 - low))
        counted = counted & ~clipped & (bounds[0] < key) & (key < bounds[1])
        key = torch.rand(key.shape, generator=generator, dtype=key.dtype, device=key.device)
    place = torch.where(counted, key, -math.inf).flatten().argsort(descending=True).argsort().view(key.shape)
    most = (ratio * total.to(accumulation_dtype(key.dtype))).floor().clamp(min=1)
    return counted & (place < most)


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    loss_type: str = "ppo",
    loss_agg_mode: str | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    dro_beta: float = 1.0,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_type: str = "k3",
    log_ratio_clamp: float | None = None,
    entropies: Tensor | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    horizon: float | None = None,
    cov_ratio: float = 2e-4,
    cov_bounds: tuple[float, float] = (1.0, 5.0),
    cov_kl_coef: float = 1.0,
    generator: torch.Generator | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute `fastloss.functional.policy_loss`."""
    one_of("kl_type", kl_type, KL_TYPES)
    published = AGGREGATION[one_of("loss_type", loss_type, AGGREGATION)]
    mode = published if loss_agg_mode is None else loss_agg_mode
    a = torch.as_tensor(advantages)
    a = (a.unsqueeze(-1) if a.dim() == logps.dim() - 1 else a).detach()
    old, ref = old_logps.detach(), None if ref_logps is None else torch.as_tensor(ref_logps).detach()
    logps, old, a, ref, entropies = counted(mask, logps, old, a, ref, entropies)
    log_ratio = logps - old
    drawn, given = old, a
    low, high = clip_low, clip_high
    chosen = None
    with torch.no_grad():
        if loss_type in ("gspo", "luspo"):
            old = sequence_mean(log_ratio, mask)
        elif loss_type == "vespo":
            a = vespo_advantages(
                logps, old, a, mask, math.inf if log_ratio_clamp is None else log_ratio_clamp
            )
        elif loss_type == "topr":
            a = topr_advantages(logps, old, a, mask, math.inf if log_ratio_clamp is None else log_ratio_clamp)
        elif loss_type == "geo_mean":
            a = geometric_advantages(logps, old, a, mask, low, high)
        elif loss_type in ("clip_cov", "kl_cov"):
            chosen = covariant_tokens(
                loss_type, logps, old, a.expand_as(logps), mask, low, high, cov_ratio, cov_bounds, generator
            )
    if loss_type == "clip_cov":
        a = torch.where(chosen, 0.0, a)
    elif loss_type == "kl_cov":
        low, high = 1.0, math.inf
    if loss_type == "sapo":
        low, high = sapo_temperature_neg, sapo_temperature_pos
    elif loss_type == "dro":
        low = dro_beta
    if delta is None:
        delta = RATIO_CAP if loss_type.startswith("dppo") else math.inf
    loss = policy_element(
        logps, old, a, ref, entropies, select("loss_type", loss_type, FORMULA), low, high,
        math.inf if dual_clip is None else dual_clip, delta, kl_coef,
        "none" if ref is None else KL_TYPES[kl_type], math.inf if log_ratio_clamp is None else log_ratio_clamp,
        0.0 if entropies is None else entropy_coef,
    )  # fmt: skip
    if loss_type == "kl_cov":
        loss = loss + torch.where(chosen, cov_kl_coef * (logps - drawn).abs(), 0.0)
    loss = aggregate(loss, mask, mode, horizon, normalizer)
    return (loss, policy_metrics(logps, drawn, given, mask, clip_low, clip_high)) if return_metrics else loss


def policy_metrics(logps, old_logps, advantages, mask, clip_low, clip_high) -> dict[str, Tensor]:
    """Return means over tokens of numbers to watch."""
    x = (logps - old_logps).detach()
    above, below = x.exp() > 1 + clip_high, x.exp() < 1 - clip_low
    each = {
        "clip_fraction": torch.where(advantages >= 0, above, below).to(x.dtype),
        "approx_kl": torch.expm1(x) - x,
        "ratio": x.exp(),
    }
    return {name: aggregate(v, mask, "token-mean") for name, v in each.items()}


def value_element(v, returns, old, clip_range) -> Tensor:
    free = (v - returns).square()
    held = (torch.minimum(torch.maximum(v, old - clip_range), old + clip_range) - returns).square()
    return 0.5 * torch.where(free >= held, free, held)


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    mask: Tensor | None = None,
    clip_range: float | None = 0.2,
    loss_agg_mode: str = "token-mean",
    *,
    normalizer: float | Tensor | None = None,
    horizon: float | None = None,
) -> Tensor:
    """Compute `fastloss.functional.value_loss`."""
    old_values = None if old_values is None else torch.as_tensor(old_values).detach()
    values, returns, old_values = counted(mask, values, torch.as_tensor(returns).detach(), old_values)
    if old_values is None or clip_range is None:
        loss = 0.5 * (values - returns).square()
    else:
        loss = value_element(values, returns, old_values, clip_range)
    return aggregate(loss, mask, loss_agg_mode, horizon, normalizer)
