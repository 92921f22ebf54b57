"""Policy and value heads: of tokens, in one kernel each way, masks and aggregation included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS
from fastloss._ops.checks import (
    check_number,
    check_real,
    check_same_shape,
    check_tensor,
    choice,
    positive_number,
    same_shape,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32
from fastloss._ops.elementwise import ElementOp, zeros_like
from fastloss._ops.policy import (
    KL_TYPES,
    POLICY_TYPES,
    RATIO_CAP,
    PolicyType,
    covariant_tokens,
    policy_metrics,
    sequence_mean,
    token_weights,
)

__all__ = ["policy_loss", "value_loss"]


AGGREGATIONS = (
    "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none",
)  # fmt: skip
CLIPPED = ("clip", "sequence_clip")
_policy = ElementOp("policy_loss", reference.policy.policy_element)
_value = ElementOp("value_loss", reference.policy.value_element)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF_TYPES else x


def _constant(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


def _check_mask(mask: Tensor | None, name: str, like: Tensor) -> None:
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.device != like.device:
        raise RuntimeError(f"mask: expected the device of {name}, {like.device}, got {mask.device}")
    check_real(mask=mask)
    check_same_shape("mask", mask, name, like)


def _check_bounds(loss_type: str, kind: PolicyType, dual_clip, delta, log_ratio_clamp) -> None:
    if dual_clip is not None and (kind.formula not in CLIPPED or loss_type == "kl_cov"):
        raise ValueError(f"dual_clip is not supported for loss_type={loss_type!r}")
    if delta is not None and kind.formula not in CLIPPED and not loss_type.startswith("dppo"):
        raise ValueError(f"delta is not supported for loss_type={loss_type!r}")
    if log_ratio_clamp is not None and not kind.exponent:
        raise ValueError(f"log_ratio_clamp: {loss_type} has no such exponent")


def _positive(name: str, value: float | None) -> float:
    """None stands for no bound."""
    if value is None:
        return math.inf
    return positive_number(name, value)


def _shares(mask: Tensor | None, x: Tensor, mode: str, horizon: float | None) -> tuple[Tensor | None, Any]:
    """Return tokens' weights (None: 1) and the divisor of the sum of their losses, a number or a tensor of one."""
    if mask is not None and mask.dtype == torch.bool and mode in ("none", "token-sum", "token-mean"):
        return mask, mask.count_nonzero().clamp(min=1) if mode == "token-mean" else 1
    if mask is not None:
        w, norm = token_weights(mask, x, mode, horizon)
        # where tokens are not divided by the lengths, flags are read as they are
        return (mask if mask.dtype == torch.bool and mode != "seq-mean-token-mean" else w), norm
    if mode in ("none", "token-sum"):
        return None, 1
    completions = math.prod(x.shape[:-1])
    if mode == "seq-mean-token-sum":
        return None, max(completions, 1)
    if mode == "seq-mean-token-sum-norm":
        return None, max(completions, 1) * (x.shape[-1] if horizon is None else horizon)
    return None, max(x.numel(), 1)


def _aggregate(op, inputs, hparams, shares, mode, normalizer) -> Tensor:
    w, norm = shares
    x = inputs[0]
    high = accumulation_dtype(x.dtype)
    if normalizer is not None:
        if mode == "none":
            raise ValueError("normalizer: not with loss_agg_mode 'none'")
        norm = normalizer
        if isinstance(norm, Tensor):
            if norm.numel() != 1:
                raise ValueError(f"normalizer: expected one number, got shape {tuple(norm.shape)}")
            norm = norm.detach().reshape(())
        else:
            norm = _positive("normalizer", norm)
    reduction = "none" if mode == "none" else "sum"
    if isinstance(norm, Tensor):
        norm = norm.to(high)
    if not isinstance(norm, Tensor) and norm is not None:
        if norm == x.numel() and reduction == "sum":
            reduction, norm = "mean", None
        else:
            norm = None if norm == 1 else torch.full((), norm, dtype=high, device=x.device)
    return op((*inputs, w, norm), (REDUCTIONS[reduction], hparams, -100, 0, x.dtype in HALF_TYPES))


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
    r"""Compute a policy gradient loss of tokens: PPO, GRPO and their relatives, with a KL term.

    With the log-probability :math:`l` of a token, :math:`\rho = e^{l - \mathrm{old}}` and advantage :math:`A`,

    ========  ======================================================================================================
    ppo       :math:`\max(-A \min(\rho, \delta), -A\, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h))`, for
              :math:`A < 0` at most :math:`-A c`; also named grpo, bnpo, dapo, dr_grpo, which differ in aggregation
    gspo      the same with one ratio for a completion: the exponential of the mean of :math:`l - \mathrm{old}`; also
              named luspo, which differs in aggregation
    geo_mean  :math:`-A` times the exponential of the completion's mean of :math:`l - \mathrm{old}`, each bounded by
              :math:`\epsilon_h` from above for :math:`A > 0`, else by :math:`-\epsilon_l` from below
    cispo     :math:`-A\, l\, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)`, the ratio without gradient
    sapo      :math:`-A \frac{4}{\tau} \sigma(\tau (\rho - 1))` with a temperature for :math:`A > 0` and one for others
    vespo     :math:`-A\, l\, \phi(w)`, :math:`\log \phi = \lambda + k \log w - \lambda w`, of the probability ratio
              :math:`w` of the completion, without gradient; :math:`(k, \lambda)` is (2, 3) if :math:`A \ge 0`,
              else (3, 2)
    topr      :math:`-A\, l`, for :math:`A < 0` times the probability ratio of the completion or 1, whichever is less,
              without gradient
    gpg       :math:`-A\, l`; also named reinforce, which differs in aggregation
    dppo_tv   :math:`-A\, l \min(\rho, \delta)`, the ratio without gradient and :math:`\delta` 20 by default; 0 where
              :math:`e^l - e^{\mathrm{old}}` is past :math:`\epsilon_h` for :math:`A > 0`, else past
              :math:`-\epsilon_l`
    dppo_kl   the same with the divergence of the token against all others, of the old policy from the new, where the
              probability has gone the way of :math:`A`
    clip_cov  ppo without a few tokens (`cov_ratio` of all), drawn from those not clipped whose covariance, advantage
              times log-probability, both centred, is between the `cov_bounds`
    kl_cov    :math:`-A \rho`, plus `cov_kl_coef` :math:`|l - \mathrm{old}|` for the `cov_ratio` of the tokens with the
              largest covariance
    dro       :math:`-A\, l + \frac{\beta}{2} (l - \mathrm{old})^2` (direct reward optimisation)
    ========  ======================================================================================================

    Where a completion has one ratio, the gradient of each token is that of the aggregated loss with its own length.
    To these come `kl_coef` times an estimate of the divergence from a reference model, :math:`y = \mathrm{ref} - l`:
    k1 :math:`-y`, k2 :math:`y^2 / 2`, k3 :math:`e^y - y - 1`, abs :math:`|y|`, and k1+, k3+ with the value of these
    and the gradient of k2; minus `entropy_coef` times the entropies. Where :math:`\rho = 1` the gradient is
    :math:`-A` for ppo, gspo, geo_mean, cispo, sapo, topr, gpg and dppo alike.

    Aggregation, with mask :math:`m` and completions along the last dimension:

    ========================  ======================================================================================
    token-mean                :math:`\sum m \ell / \sum m` (all others)
    token-sum                 :math:`\sum m \ell`
    seq-mean-token-mean       the mean over completions of their tokens' mean (grpo, gspo, sapo, geo_mean)
    seq-mean-token-sum        the mean over completions of their tokens' sum (luspo, topr, reinforce)
    seq-mean-token-sum-norm   the same, divided by `horizon` (dr_grpo)
    none                      :math:`m \ell`
    ========================  ======================================================================================

    A completion without tokens is not counted in any mean over completions, and if there are no tokens at all the
    result is 0 and differentiable.

    Args:
        logps: :math:`l`, shape `(..., T)`; float32, float64, bfloat16 or float16.
        old_logps: of the policy that drew the tokens, same shape; without gradient.
        advantages: :math:`A`, same shape, or `(...)`, one for a completion; without gradient.
        mask: flags or weights of tokens, same shape; tokens of weight 0 are ignored, even if NaN.
            Default: all.
        loss_type: a name of the first table. Default: `"ppo"`.
        loss_agg_mode: a name of the second. Default: that of the type.
        clip_low, clip_high: :math:`\epsilon_l` and :math:`\epsilon_h`. Default: 0.2.
        dual_clip: :math:`c > 1`. Default: none.
        delta: :math:`\delta`, bounds the ratio of the free branch. Default: none; 20 for dppo.
        sapo_temperature_pos, sapo_temperature_neg: :math:`\tau` for :math:`A > 0` and others. Default: 1 and 1.05.
        dro_beta: :math:`\beta`. Default: 1.
        ref_logps: of the reference model, same shape, without gradient. Default: none, no such term.
        kl_coef: its factor. Default: 0.
        kl_type: `"k1"`, `"k2"`, `"k3"`, `"abs"`, `"k1+"`, `"k3+"` or `"none"`. Default: `"k3"`.
        log_ratio_clamp: bounds :math:`l - \mathrm{old}` both ways (verl, and TRL for vespo: 20); not for
            gpg, dro and geo_mean. Default: none.
        entropies: of the tokens' distributions, same shape. Default: none, no such term.
        entropy_coef: its factor. Default: 0.
        normalizer: a number, or a tensor of one, in the place of the number that the aggregation divides by, for
            example the number of tokens of all processes. Default: none.
        horizon: for `"seq-mean-token-sum-norm"`. Default: T.
        cov_ratio, cov_bounds, cov_kl_coef: of clip_cov and kl_cov. Default: 0.0002, (1, 5) and 1.
        generator: of clip_cov's draw. Default: torch's own.
        return_metrics: also give `clip_fraction`, `approx_kl` and `ratio`, means over tokens, as tensors: nothing
            waits for the device. Default: False.

    Returns:
        A scalar (for `"none"` of the shape of `logps`); with `return_metrics` a tuple of it and a dictionary.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/1707.06347, https://arxiv.org/abs/2402.03300 and, as each type is named there,
    `GRPOConfig.loss_type` of TRL and `core_algos.py` of verl; topr https://arxiv.org/abs/2503.14286.
    """
    kind = POLICY_TYPES[choice("loss_type", loss_type, tuple(POLICY_TYPES))]
    mode = kind.aggregation if loss_agg_mode is None else loss_agg_mode
    choice("loss_agg_mode", mode, AGGREGATIONS)
    choice("kl_type", kl_type, tuple(KL_TYPES))
    _check_bounds(loss_type, kind, dual_clip, delta, log_ratio_clamp)
    if horizon is not None and mode != "seq-mean-token-sum-norm":
        raise ValueError(f"horizon is not supported for loss_agg_mode={mode!r}")
    for name, t in (("logps", logps), ("old_logps", old_logps), ("advantages", advantages)):
        check_tensor(name, t)
    per_completion = logps.dim() > 0 and advantages.shape == logps.shape[:-1]
    given = advantages.unsqueeze(-1).expand(logps.shape) if per_completion else advantages
    x, old, a, ref, h = same_shape(
        logps=logps, old_logps=old_logps, advantages=given, ref_logps=ref_logps, entropies=entropies
    )
    if x.dim() == 0:
        raise ValueError("logps: expected at least one dimension, tokens being the last")
    _check_mask(mask, "logps", x)
    dtype = x.dtype
    old, a, ref = _constant(old), _constant(a), _constant(ref)
    low, high = check_number("clip_low", clip_low, 0.0), check_number("clip_high", clip_high, 0.0)
    drawn, whole = old, a
    chosen = None
    clamp = _positive("log_ratio_clamp", log_ratio_clamp)
    if kind.of_completion:
        x, old, a, ref, h = (None if t is None else _wide(t) for t in (x, old, a, ref, h))
        drawn, whole = old, a
        with torch.no_grad():
            if loss_type in ("gspo", "luspo"):
                old = sequence_mean(x - old, mask).expand(x.shape)  # as it is: every token has this log-ratio
            elif kind.advantages is not None:
                a = a[..., :1] if per_completion else a
                a = kind.advantages(x, old, a, mask, low=low, high=high, clamp=clamp).expand(x.shape)
            else:
                ratio = check_number("cov_ratio", cov_ratio, 0.0, 1.0)
                chosen = covariant_tokens(loss_type, x, old, a, mask, low, high, ratio, cov_bounds, generator)
                if loss_type == "clip_cov":
                    a = torch.where(chosen, 0.0, a)
    if loss_type == "sapo":
        low = _positive("sapo_temperature_neg", sapo_temperature_neg)
        high = _positive("sapo_temperature_pos", sapo_temperature_pos)
    elif loss_type == "dro":
        low = check_number("dro_beta", dro_beta)
    elif loss_type == "kl_cov":
        low, high = 1.0, math.inf
    two_sided = RATIO_CAP if delta is None and loss_type.startswith("dppo") else _positive("delta", delta)
    hparams = _policy.pack(
        type=kind.formula, low=low, high=high, dual=_positive("dual_clip", dual_clip),
        two_sided=two_sided, kl_coef=check_number("kl_coef", kl_coef),
        kl_type="none" if ref is None or not kl_coef else KL_TYPES[kl_type], top=clamp,
        entropy_coef=0.0 if h is None else check_number("entropy_coef", entropy_coef),
    )  # fmt: skip
    nothing = zeros_like(x)
    inputs = (x, old, a, nothing if ref is None else ref, nothing if h is None else h)
    shares = _shares(mask, x, mode, None if horizon is None else _positive("horizon", horizon))
    loss = _aggregate(_policy, inputs, hparams, shares, mode, normalizer)
    if (
        loss_type == "kl_cov"
    ):  # |l - old| as a divergence from where the token is drawn back to, else from itself
        pull = (x, old, nothing, torch.where(chosen, old, x.detach()), nothing)
        of_pull = _policy.pack(
            type="gradient", low=0.0, high=0.0, dual=math.inf, two_sided=math.inf,
            kl_coef=check_number("cov_kl_coef", cov_kl_coef), kl_type="absolute", top=math.inf, entropy_coef=0.0,
        )  # fmt: skip
        loss = loss + _aggregate(_policy, pull, of_pull, shares, mode, normalizer)
    loss = loss if autocast_to_fp32(logps) else loss.to(dtype)
    if not return_metrics:
        return loss
    return loss, policy_metrics(
        _wide(x), _wide(drawn), _wide(whole), mask, *(float(bound) for bound in (clip_low, clip_high))
    )


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
    r"""Compute PPO's value-function loss, clipped around the values of the rollout.

    .. math:: \tfrac{1}{2} \max\left((V - R)^2,
              (\mathrm{clip}(V, V_{old} - \epsilon, V_{old} + \epsilon) - R)^2\right)

    Args:
        values: :math:`V`, shape `(..., T)`; float32, float64, bfloat16 or float16.
        returns: :math:`R`, same shape, without gradient.
        old_values: :math:`V_{old}`, same shape, without gradient. Default: none, no clipping.
        mask: flags or weights of tokens, same shape. Default: all.
        clip_range: :math:`\epsilon > 0`; None: no clipping. Default: 0.2.
        loss_agg_mode: as for `policy_loss`. Default: `"token-mean"`.
        normalizer, horizon: as for `policy_loss`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of `values`.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/1707.06347 and its released code; `compute_value_loss` of verl.
    """
    choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    if horizon is not None and loss_agg_mode != "seq-mean-token-sum-norm":
        raise ValueError(f"horizon is not supported for loss_agg_mode={loss_agg_mode!r}")
    v, r, old = same_shape(values=values, returns=returns, old_values=old_values)
    old = None if clip_range is None else old
    if v.dim() == 0:
        raise ValueError("values: expected at least one dimension, tokens being the last")
    _check_mask(mask, "values", v)
    dtype = v.dtype
    r, old = _constant(r), _constant(old)
    bound = _positive("clip_range", clip_range) if old is not None else math.inf
    shares = _shares(mask, v, loss_agg_mode, None if horizon is None else _positive("horizon", horizon))
    inputs = (v, r, zeros_like(v) if old is None else old)
    hparams = _value.pack(clip_range=bound)
    loss = _aggregate(_value, inputs, hparams, shares, loss_agg_mode, normalizer)
    return loss if autocast_to_fp32(values) else loss.to(dtype)
