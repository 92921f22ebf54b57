"""Terms of policy losses that torch computes beside the kernel: weights of tokens, ratios of completions, metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloss._ops.dtypes import accumulation_dtype

KL_TYPES = {
    "none": "none", "k1": "k1", "k2": "k2", "k3": "k3", "abs": "absolute", "k1+": "k1_straight", "k3+": "k3_straight",
}  # fmt: skip
"""The estimators of the divergence, and the formula of each."""
RATIO_CAP = 20.0
"""Of dppo_tv and dppo_kl where `delta` is not given."""


def token_weights(mask, like: Tensor, loss_agg_mode: str, horizon: float | None):
    """Return the weights of tokens [..., T] and what the sum of their losses is divided by (None: 1)."""
    acc_dtype = accumulation_dtype(like.dtype)
    m = (
        torch.ones((), dtype=acc_dtype, device=like.device)
        if mask is None
        else torch.as_tensor(mask).to(acc_dtype)
    )
    m = m.expand(like.shape)
    if loss_agg_mode in ("none", "token-sum"):
        return m, None
    if loss_agg_mode == "token-mean":
        return m, m.sum().clamp(min=1.0)
    length = m.sum(-1, keepdim=True)
    completions = (length > 0).sum().to(acc_dtype).clamp(min=1.0)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        return m, completions * (like.shape[-1] if horizon is None else horizon)
    if loss_agg_mode == "seq-mean-token-sum":
        return m, completions
    if loss_agg_mode == "seq-mean-token-mean":
        return m / length.clamp(min=1.0), completions
    raise ValueError(f"loss_agg_mode: unknown: {loss_agg_mode!r}")


def sequence_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the tokens of each completion that count, [..., 1]."""
    m = torch.ones_like(x) if mask is None else torch.as_tensor(mask).to(x.dtype).expand(x.shape)
    return torch.where(m != 0, m * x, 0.0).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1.0)


def _log_ratio(logps: Tensor, old: Tensor, mask, clamp: float) -> Tensor:
    """Return the log of a completion's probability ratio [..., 1], of tokens that differ by at most `clamp` each."""
    change = (logps - old).clamp(-clamp, clamp)
    if mask is not None:
        m = torch.as_tensor(mask).to(logps.dtype).expand(logps.shape)
        change = torch.where(m != 0, m * change, 0.0)
    return change.sum(-1, keepdim=True)


def vespo_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, *, clamp: float, **_) -> Tensor:
    """Return A phi(w) of a completion's probability ratio w, log phi = l + k log w - l w."""
    log_w = _log_ratio(logps, old, mask, clamp)
    good = advantages >= 0
    k, rate = torch.where(good, 2.0, 3.0).to(log_w.dtype), torch.where(good, 3.0, 2.0).to(log_w.dtype)
    return advantages * torch.exp(rate + k * log_w - rate * log_w.exp())


def topr_advantages(logps: Tensor, old: Tensor, advantages: Tensor, mask, *, clamp: float, **_) -> Tensor:
    """Return A, for A < 0 times a completion's probability ratio where that is below 1."""
    w = _log_ratio(logps, old, mask, clamp).clamp(max=0.0).exp()
    return torch.where(advantages < 0, w * advantages, advantages)


def geometric_advantages(
    logps: Tensor, old: Tensor, advantages: Tensor, mask, *, low: float, high: float, **_
) -> Tensor:
    """Return A times the geometric mean of a completion's ratios, each bounded on the side that A points to.

    The advantages are those of completions [..., 1], or of tokens, of which the mean is taken.
    """
    a = advantages if advantages.shape[-1] == 1 else sequence_mean(advantages, mask)
    change = logps - old
    change = torch.where(a > 0, change.clamp(max=high), change.clamp(min=-low))
    return a * sequence_mean(change, mask).exp()


@dataclass(frozen=True)
class PolicyType:
    """What sets a `loss_type` apart."""

    aggregation: str = "token-mean"
    """Where it is published."""
    formula: str = "clip"
    """That of a token in the kernel."""
    advantages: Callable[..., Tensor] | None = None
    """What takes the place of the advantages, [..., T] or [..., 1] for completions; without gradient."""
    of_completion: bool = False
    """A token's loss depends on other tokens."""
    exponent: bool = True
    """It takes e^(l - old), which `log_ratio_clamp` bounds."""


POLICY_TYPES = {
    "ppo": PolicyType(),
    "grpo": PolicyType("seq-mean-token-mean"),
    "bnpo": PolicyType(),
    "dapo": PolicyType(),
    "dr_grpo": PolicyType("seq-mean-token-sum-norm"),
    "gspo": PolicyType("seq-mean-token-mean", "sequence_clip", of_completion=True),
    "cispo": PolicyType(formula="cispo"),
    "sapo": PolicyType("seq-mean-token-mean", "sapo"),
    "vespo": PolicyType("token-mean", "gradient", vespo_advantages, of_completion=True),
    "topr": PolicyType("seq-mean-token-sum", "gradient", topr_advantages, of_completion=True),
    "gpg": PolicyType(formula="gradient", exponent=False),
    "dro": PolicyType(formula="dro", exponent=False),
    "luspo": PolicyType("seq-mean-token-sum", "sequence_clip", of_completion=True),
    "geo_mean": PolicyType(
        "seq-mean-token-mean", "geometric", geometric_advantages, of_completion=True, exponent=False
    ),
    "dppo_tv": PolicyType(formula="bounded_change"),
    "dppo_kl": PolicyType(formula="bounded_kl"),
    "clip_cov": PolicyType(of_completion=True),
    "kl_cov": PolicyType(of_completion=True),
    "reinforce": PolicyType("seq-mean-token-sum", "gradient", exponent=False),
}
"""Each is a case of the registry."""


def covariant_tokens(loss_type, logps, old, advantages, mask, low, high, ratio, bounds, generator) -> Tensor:
    """Return flags of the tokens that clip_cov leaves out or kl_cov pulls back, without waiting for the device."""
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


def policy_metrics(logps, old_logps, advantages, mask, clip_low, clip_high) -> dict[str, Tensor]:
    """Return numbers to watch, means over tokens, as tensors on the device: nothing waits for them."""
    with torch.no_grad():
        x = logps - old_logps
        rho = x.exp()
        bound = torch.where(advantages >= 0, rho > 1 + clip_high, rho < 1 - clip_low).to(x.dtype)
        w, norm = token_weights(mask, x, "token-mean", None)
        mean = {"clip_fraction": bound, "approx_kl": torch.expm1(x) - x, "ratio": rho}
        return {
            name: torch.where(w != 0, w.to(v.dtype) * v, 0.0).sum() / norm.to(v.dtype)
            for name, v in mean.items()
        }
