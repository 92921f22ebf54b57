"""Policy and value heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["policy_loss", "value_loss"]

KL_TYPES = {
    "none": "none", "k1": "k1", "k2": "k2", "k3": "k3", "abs": "absolute", "k1+": "k1_straight", "k3+": "k3_straight",
}  # fmt: skip
"""The estimators of the divergence, and the formula of each."""


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one and the derivative of the other."""
    return gradient + (value - gradient).detach()


def within_bounds(type: str, lp, old, a, low, high) -> Tensor:
    """Whether the probability of a token has not moved too far the way that its advantage points to."""
    lp, old = lp.detach(), old.detach()
    if type == "bounded_change":
        change = lp.exp() - old.exp()
        return torch.where(a > 0, change <= high, change >= -low)
    other, was = -torch.expm1(lp), -torch.expm1(old)
    of_others = torch.where(was > 0, was * (was.log() - other.log()), 0.0)
    kl = old.exp() * (old - lp) + of_others
    return torch.where(a > 0, (kl <= high) | (lp <= old), (kl <= low) | (lp >= old))


def policy_element(
    lp, old, a, ref, h, type, low, high, dual, two_sided, kl_coef, kl_type, top, entropy_coef
) -> Tensor:
    raw = lp - old
    x = raw.clamp(-top, top)
    rho = x.exp()
    if type == "clip":  # at a tie, as for every ratio inside the bounds, the free branch moves
        free = -a * torch.where(rho <= two_sided, rho, torch.full_like(rho, two_sided).detach())
        inside = -a * torch.where(
            (rho >= 1 - low) & (rho <= 1 + high), rho, rho.detach().clamp(1 - low, 1 + high)
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
        raise ValueError(f"type: unknown: {type!r}")
    if kl_type != "none":
        y = ref - lp
        k2 = 0.5 * y.square()
        estimates = {"k1": lambda: -y, "k2": lambda: k2, "k3": lambda: torch.expm1(y) - y, "absolute": y.abs}
        value = estimates[kl_type.removesuffix("_straight")]()
        loss = loss + kl_coef * (straight_through(value, k2) if kl_type.endswith("_straight") else value)
    return loss - entropy_coef * h if entropy_coef else loss


def token_weights(mask, like: Tensor, loss_agg_mode: str, horizon: float | None):
    """Weights of tokens [..., T], and what the sum of their losses is divided by (None: 1)."""
    high = torch.float64 if like.dtype == torch.float64 else torch.float32
    m = torch.ones((), dtype=high, device=like.device) if mask is None else torch.as_tensor(mask).to(high)
    m = m.expand(like.shape)
    if loss_agg_mode in ("none", "token-sum"):
        return m, None
    if loss_agg_mode == "token-mean":
        return m, m.sum().clamp(min=1.0)
    length = m.sum(-1, keepdim=True)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        steps = like.shape[-1] if horizon is None else horizon
        return m, m.new_ones(length.shape).sum().clamp(min=1.0) * steps
    answers = (length > 0).to(high).sum().clamp(min=1.0)
    if loss_agg_mode == "seq-mean-token-sum":
        return m, answers
    if loss_agg_mode == "seq-mean-token-mean":
        return m / length.clamp(min=1.0), answers
    raise ValueError(f"loss_agg_mode: unknown: {loss_agg_mode!r}")


def aggregated(loss: Tensor, w: Tensor, norm: Tensor | None, loss_agg_mode: str) -> Tensor:
    """Tokens of weight 0 count nothing, whatever they hold."""
    loss = torch.where(w != 0, w.to(loss.dtype) * loss, 0.0)
    if loss_agg_mode == "none":
        return loss
    return loss.sum() if norm is None else loss.sum() / norm.to(loss.dtype)


AGGREGATION = {
    "ppo": "token-mean", "grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm", "gspo": "seq-mean-token-mean", "cispo": "token-mean",
    "sapo": "seq-mean-token-mean", "vespo": "token-mean", "gpg": "token-mean", "dro": "token-mean",
    "luspo": "seq-mean-token-sum", "geo_mean": "seq-mean-token-mean", "dppo_tv": "token-mean",
    "dppo_kl": "token-mean", "clip_cov": "token-mean", "kl_cov": "token-mean", "reinforce": "seq-mean-token-sum",
}  # fmt: skip
"""How each type is aggregated where it is published."""
FORMULA = {
    "cispo": "cispo", "sapo": "sapo", "vespo": "gradient", "gpg": "gradient", "reinforce": "gradient", "dro": "dro",
    "geo_mean": "geometric", "dppo_tv": "bounded_change", "dppo_kl": "bounded_kl",
}  # fmt: skip
"""The formula of a token; where none is named, `"clip"`."""
RATIO_CAP = 20.0
"""Of dppo_tv and dppo_kl where `delta` is not given."""


def sequence_mean(x: Tensor, mask) -> Tensor:
    m = torch.ones_like(x) if mask is None else torch.as_tensor(mask).to(x.dtype).expand(x.shape)
    return torch.where(m != 0, m * x, 0.0).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1.0)


def vespo_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, clamp: float) -> Tensor:
    """A phi(w) of an answer's probability ratio w, log phi = l + k log w - l w."""
    m = torch.ones_like(logps) if mask is None else torch.as_tensor(mask).to(logps.dtype).expand(logps.shape)
    log_w = torch.where(m != 0, m * (logps - old).clamp(-clamp, clamp), 0.0).sum(-1, keepdim=True)
    good = advantages >= 0
    k, rate = torch.where(good, 2.0, 3.0).to(log_w.dtype), torch.where(good, 3.0, 2.0).to(log_w.dtype)
    return advantages * torch.exp(rate + k * log_w - rate * log_w.exp())


def geometric_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, low: float, high: float):
    """A times the geometric mean of an answer's ratios, each bounded on the side that A points to.

    The advantages are those of answers [..., 1], or of tokens, of which the mean is taken.
    """
    a = advantages if advantages.shape[-1] == 1 else sequence_mean(advantages, mask)
    change = logps - old
    change = torch.where(a > 0, change.clamp(max=high), change.clamp(min=-low))
    return (a * sequence_mean(change, mask).exp()).expand(logps.shape)


def covariant_tokens(loss_type, logps, old, advantages, mask, low, high, ratio, bounds, generator) -> Tensor:
    """The tokens that clip_cov leaves out or kl_cov pulls back: flags, found without waiting for the device."""
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0
    m = counted.to(logps.dtype)
    total = m.sum().clamp(min=1.0)
    centred = [
        x - torch.where(counted, x, 0.0).sum() / total
        for x in (torch.where(counted, advantages, 0.0), torch.where(counted, logps, 0.0))
    ]
    cov = centred[0] * centred[1]
    if loss_type == "clip_cov":
        rho = torch.where(counted, logps - old, 0.0).exp()
        clipped = torch.where(advantages > 0, rho > 1 + high, (advantages < 0) & (rho < 1 - low))
        counted = counted & ~clipped & (cov > bounds[0]) & (cov < bounds[1])
        random = torch.rand(cov.shape, generator=generator, dtype=cov.dtype, device=cov.device)
        cov = random
    order = torch.where(counted, cov, -math.inf).flatten()
    most = min(max(int(ratio * order.numel()), 1), order.numel())
    places = order.topk(most)[1]
    count = (ratio * m.sum()).floor().clamp(min=1.0)
    picked = torch.arange(most, device=order.device) < count
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(0, places, picked)
    return chosen.view(cov.shape) & counted


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
    """As `fastloss.functional.policy_loss`."""
    mode = loss_agg_mode or AGGREGATION[loss_type]
    log_ratio, a = logps - old_logps, torch.as_tensor(advantages)
    a = (a.unsqueeze(-1) if a.dim() == log_ratio.dim() - 1 else a).detach()
    old, ref = old_logps.detach(), None if ref_logps is None else torch.as_tensor(ref_logps).detach()
    drawn, given = old, a
    low, high = clip_low, clip_high
    chosen = None
    with torch.no_grad():
        if loss_type in ("gspo", "luspo"):
            old = logps - sequence_mean(log_ratio, mask)
        elif loss_type == "vespo":
            a = vespo_advantages(
                logps, old, a, mask, math.inf if log_ratio_clamp is None else log_ratio_clamp
            )
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
        logps, old, a, ref, entropies, FORMULA.get(loss_type, "clip"), low, high,
        math.inf if dual_clip is None else dual_clip, delta, kl_coef,
        "none" if ref is None else KL_TYPES[kl_type], math.inf if log_ratio_clamp is None else log_ratio_clamp,
        0.0 if entropies is None else entropy_coef,
    )  # fmt: skip
    if loss_type == "kl_cov":
        loss = loss + torch.where(chosen, cov_kl_coef * (logps - drawn).abs(), 0.0)
    w, norm = token_weights(mask, logps, mode, horizon)
    if normalizer is not None:
        norm = torch.as_tensor(normalizer, dtype=w.dtype, device=w.device)
    loss = aggregated(loss, w, norm, mode)
    return (loss, policy_metrics(logps, drawn, given, mask, clip_low, clip_high)) if return_metrics else loss


def policy_metrics(logps, old_logps, advantages, mask, clip_low, clip_high) -> dict[str, Tensor]:
    """Numbers to watch, as tensors on the device: nothing waits for them."""
    with torch.no_grad():
        x = logps - old_logps
        rho = x.exp()
        bound = torch.where(advantages >= 0, rho > 1 + clip_high, rho < 1 - clip_low).to(x.dtype)
        w, norm = token_weights(mask, x, "token-mean", None)
        mean = {"clip_fraction": bound, "approx_kl": torch.expm1(x) - x, "ratio": rho}
        return {name: aggregated(v, w, norm, "token-mean") for name, v in mean.items()}


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
    """As `fastloss.functional.value_loss`."""
    returns = torch.as_tensor(returns).detach()
    if old_values is None or clip_range is None:
        loss = 0.5 * (values - returns).square()
    else:
        loss = value_element(values, returns, torch.as_tensor(old_values).detach(), clip_range)
    w, norm = token_weights(mask, values, loss_agg_mode, horizon)
    if normalizer is not None:
        norm = torch.as_tensor(normalizer, dtype=w.dtype, device=w.device)
    return aggregated(loss, w, norm, loss_agg_mode)
