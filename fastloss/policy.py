"""Policy and value heads: of tokens, in one kernel each way, masks and aggregation included."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_number
from fastloss._op import HALF_TYPES, REDUCTIONS
from fastloss._registry import Draw, Loss, estimator, register
from fastloss.pointwise import element_op
from fastloss.preference import _choice, same_shape, zeros_like
from fastloss.reference.policy import (
    AGGREGATION,
    FORMULA,
    KL_TYPES,
    policy_metrics,
    sequence_mean,
    token_weights,
    vespo_advantages,
)

__all__ = ["group_advantages", "policy_loss", "value_loss"]

AGGREGATIONS = (
    "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none",
)  # fmt: skip
_policy = element_op("policy_loss", reference.policy.policy_element, inputs=4, wrt=(0,))
_value = element_op("value_loss", reference.policy.value_element, inputs=3, wrt=(0,))


def _wide(x: Tensor | None) -> Tensor | None:
    """Weights such as 1 / length do not fit half types: these heads compute in float32 from the start."""
    return x.float() if x is not None and x.dtype in HALF_TYPES else x


def _check_mask(mask: Tensor | None, name: str, like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a Tensor, got {type(mask).__name__}")
    if mask.device != like.device:
        raise RuntimeError(f"mask: expected the device of {name}, {like.device}, got {mask.device}")
    if mask.is_complex():
        raise NotImplementedError("mask: expected flags or real numbers")
    if mask.shape != like.shape:
        raise RuntimeError(
            f"mask: expected the shape of {name}, {tuple(like.shape)}, got {tuple(mask.shape)}"
        )


def _positive(name: str, value: float | None) -> float:
    """None stands for no bound."""
    if value is None:
        return math.inf
    if check_number(name, value) <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return float(value)


def _aggregate(op, inputs, numbers, w, norm, mode, normalizer) -> Tensor:
    if normalizer is not None:
        if mode == "none":
            raise ValueError("normalizer: not with loss_agg_mode 'none'")
        if isinstance(normalizer, Tensor):
            if normalizer.numel() != 1:
                raise ValueError(f"normalizer: expected one number, got shape {tuple(normalizer.shape)}")
            norm = normalizer.detach().reshape(()).to(w.dtype)
        else:
            norm = w.new_full((), _positive("normalizer", normalizer))
    reduction = REDUCTIONS["none" if mode == "none" else "sum"]
    return op((*inputs, w.to(inputs[0].dtype), norm), (reduction, numbers, -100, 0, False))


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
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Policy gradient losses of tokens: PPO, GRPO and their relatives, with a divergence term.

    With the log-probability :math:`l` of a token, :math:`\rho = e^{l - \mathrm{old}}` and advantage :math:`A`,

    ========  ======================================================================================================
    ppo       :math:`\max(-A \min(\rho, \delta), -A\, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h))`, for
              :math:`A < 0` at most :math:`-A c`; also named grpo, bnpo, dapo, dr_grpo, which differ in aggregation
    gspo      the same with one ratio for an answer: the exponential of the mean of :math:`l - \mathrm{old}`
    cispo     :math:`-A\, l\, \mathrm{clip}(\rho, 1 - \epsilon_l, 1 + \epsilon_h)`, the ratio without gradient
    sapo      :math:`-A \frac{4}{\tau} \sigma(\tau (\rho - 1))` with a temperature for :math:`A > 0` and one for others
    vespo     :math:`-A\, l\, \phi(w)`, :math:`\log \phi = \lambda + k \log w - \lambda w`, of the probability ratio
              :math:`w` of the answer, without gradient; :math:`(k, \lambda)` is (2, 3) for :math:`A \ge 0`, else (3, 2)
    gpg       :math:`-A\, l`
    dro       :math:`-A\, l + \frac{\beta}{2} (l - \mathrm{old})^2` (direct reward optimisation)
    ========  ======================================================================================================

    plus `kl_coef` times an estimate of the divergence from a reference model, :math:`y = \mathrm{ref} - l`:
    k1 :math:`-y`, k2 :math:`y^2 / 2`, k3 :math:`e^y - y - 1`, abs :math:`|y|`, and k1+, k3+ with the value of these
    and the gradient of k2; minus `entropy_coef` times the entropies. Where :math:`\rho = 1` the gradient is
    :math:`-A` for ppo, sapo and gpg alike.

    Aggregation, with mask :math:`m` and answers along the last dimension:

    ========================  ======================================================================================
    token-mean                :math:`\sum m \ell / \sum m` (ppo, bnpo, dapo, cispo, vespo, gpg, dro)
    token-sum                 :math:`\sum m \ell`
    seq-mean-token-mean       the mean over answers of their tokens' mean (grpo, gspo, sapo)
    seq-mean-token-sum        the mean over answers of their tokens' sum
    seq-mean-token-sum-norm   :math:`\sum m \ell` / (number of answers x `horizon`) (dr_grpo)
    none                      :math:`m \ell`
    ========================  ======================================================================================

    An answer without tokens is not counted in the means over answers, and if there are no tokens at all the
    result is 0 and differentiable.

    Args:
        logps: :math:`l`, shape `(..., T)`; float32, float64, bfloat16 or float16.
        old_logps: of the policy that drew the tokens, same shape; without gradient.
        advantages: :math:`A`, same shape, or `(...)`, one for an answer; without gradient.
        mask: flags or weights of tokens, same shape; tokens of weight 0 count nothing whatever they hold.
            Default: all.
        loss_type: a name of the first table. Default: `"ppo"`.
        loss_agg_mode: a name of the second. Default: that of the type.
        clip_low, clip_high: :math:`\epsilon_l` and :math:`\epsilon_h`. Default: 0.2.
        dual_clip: :math:`c > 1`. Default: none.
        delta: :math:`\delta`, bounds the ratio of the free branch. Default: none.
        sapo_temperature_pos, sapo_temperature_neg: :math:`\tau` for :math:`A > 0` and others. Default: 1 and 1.05.
        dro_beta: :math:`\beta`. Default: 1.
        ref_logps: of the reference model, same shape, without gradient. Default: none, no such term.
        kl_coef: its factor. Default: 0.
        kl_type: `"k1"`, `"k2"`, `"k3"`, `"abs"`, `"k1+"`, `"k3+"` or `"none"`. Default: `"k3"`.
        log_ratio_clamp: bounds :math:`l - \mathrm{old}` both ways (verl: 20). Default: none.
        entropies: of the tokens' distributions, same shape. Default: none, no such term.
        entropy_coef: its factor. Default: 0.
        normalizer: a number, or a tensor of one, in the place of the number that the aggregation divides by, for
            example the number of tokens of all processes. Default: none.
        horizon: for `"seq-mean-token-sum-norm"`. Default: T.
        return_metrics: also give `clip_fraction`, `approx_kl` and `ratio`, means over tokens, as tensors: nothing
            waits for the device. Default: False.

    Returns:
        A scalar (for `"none"` of the shape of `logps`); with `return_metrics` a tuple of it and a dictionary.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/1707.06347, https://arxiv.org/abs/2402.03300 and, as each type is named there,
    `GRPOConfig.loss_type` of TRL and `core_algos.py` of verl.
    """
    _choice("loss_type", loss_type, tuple(AGGREGATION))
    mode = AGGREGATION[loss_type] if loss_agg_mode is None else loss_agg_mode
    _choice("loss_agg_mode", mode, AGGREGATIONS)
    _choice("kl_type", kl_type, KL_TYPES)
    clips = loss_type not in FORMULA
    for name, value in (("dual_clip", dual_clip), ("delta", delta)):
        if value is not None and not clips:
            raise ValueError(f"{name}: {loss_type} has none")
    if horizon is not None and mode != "seq-mean-token-sum-norm":
        raise ValueError(f"horizon: {mode} has none")
    per_answer = (
        isinstance(advantages, Tensor) and isinstance(logps, Tensor) and advantages.dim() == logps.dim() - 1
    )
    given = advantages
    if per_answer and advantages.shape == logps.shape[:-1]:
        given = advantages.unsqueeze(-1).expand(logps.shape)
    x, old, a, ref, h = same_shape(
        logps=logps, old_logps=old_logps, advantages=given, ref_logps=ref_logps, entropies=entropies
    )
    if x.dim() == 0:
        raise ValueError("logps: expected at least one dimension, tokens being the last")
    _check_mask(mask, "logps", x)
    dtype = x.dtype
    x, old, a, ref, h = (_wide(t) for t in (x, old, a, ref, h))
    old, a, ref = old.detach(), a.detach(), None if ref is None else ref.detach()
    drawn = old
    with torch.no_grad():
        if loss_type == "gspo":
            old = x.detach() - sequence_mean(x.detach() - old, mask)
        elif loss_type == "vespo":
            a = vespo_advantages(x.detach(), old, a, mask)
    low, high = check_number("clip_low", clip_low, 0.0), check_number("clip_high", clip_high, 0.0)
    if loss_type == "sapo":
        low = _positive("sapo_temperature_neg", sapo_temperature_neg)
        high = _positive("sapo_temperature_pos", sapo_temperature_pos)
    elif loss_type == "dro":
        low = check_number("dro_beta", dro_beta)
    numbers = [
        float(FORMULA.get(loss_type, 0)), low, high, _positive("dual_clip", dual_clip), _positive("delta", delta),
        check_number("kl_coef", kl_coef), float(KL_TYPES.index(kl_type) if ref is not None else 0),
        _positive("log_ratio_clamp", log_ratio_clamp),
    ]  # fmt: skip
    w, norm = token_weights(mask, x, mode, None if horizon is None else _positive("horizon", horizon))
    inputs = (x, old, a, zeros_like(x) if ref is None else ref)
    loss = _aggregate(_policy, inputs, numbers, w, norm, mode, normalizer)
    if h is not None:
        bonus = torch.where(w != 0, w * h, 0.0)
        if mode != "none":
            bonus = bonus.sum()
            if normalizer is not None or norm is not None:
                bonus = bonus / (norm if normalizer is None else normalizer)
        loss = loss - check_number("entropy_coef", entropy_coef) * bonus
    loss = loss.to(dtype)
    return (loss, policy_metrics(x, drawn, a, mask, clip_low, clip_high)) if return_metrics else loss


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
    r"""PPO's loss of a value function, clipped around the values at the time of the rollout.

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
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/1707.06347 and its released code; `compute_value_loss` of verl.
    """
    _choice("loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    if horizon is not None and loss_agg_mode != "seq-mean-token-sum-norm":
        raise ValueError(f"horizon: {loss_agg_mode} has none")
    v, r, old = same_shape(values=values, returns=returns, old_values=old_values)
    if v.dim() == 0:
        raise ValueError("values: expected at least one dimension, tokens being the last")
    _check_mask(mask, "values", v)
    dtype = v.dtype
    v, r, old = _wide(v), _wide(r).detach(), _wide(old)
    bound = _positive("clip_range", clip_range) if old is not None else math.inf
    w, norm = token_weights(
        mask, v, loss_agg_mode, None if horizon is None else _positive("horizon", horizon)
    )
    inputs = (v, r, zeros_like(v) if old is None else old.detach())
    return _aggregate(_value, inputs, [bound], w, norm, loss_agg_mode, normalizer).to(dtype)


@estimator
def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: str = "grpo", *, epsilon: float = 1e-4
) -> Tensor:
    r"""Advantages of answers relative to those to the same prompt.

    With the mean :math:`\bar r` and the (unbiased) standard deviation :math:`s` of the rewards of a group of
    :math:`n` answers, :math:`(r - \bar r) / (s + \varepsilon)` (grpo), :math:`r - \bar r` (dr_grpo), or
    :math:`(r - \bar r)\, n / (n - 1)`, the difference from the mean of the others (rloo). An answer that is alone
    in its group has advantage 0.

    Args:
        rewards: shape `(N)`; float32, float64, bfloat16 or float16.
        group_ids: int64 `(N)`, numbers in [0, N) that tell the groups apart, in any order.
        kind: `"grpo"`, `"dr_grpo"` or `"rloo"`. Default: `"grpo"`.
        epsilon: :math:`\varepsilon \ge 0`. Default: 1e-4, as in TRL (verl: 1e-6).

    Returns:
        Advantages of shape `(N)`, differentiable in the rewards.

    Raises:
        ValueError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2402.03300, https://arxiv.org/abs/2503.20783, https://arxiv.org/abs/2402.14740.
    """
    _choice("kind", kind, ("grpo", "dr_grpo", "rloo"))
    epsilon = check_number("epsilon", epsilon, 0.0)
    check_floating("rewards", rewards)
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            "rewards, group_ids: expected the same single dimension, got "
            f"{tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"group_ids: expected int64, got {group_ids.dtype}")
    ids = group_ids.long()
    r = rewards.double() if rewards.dtype == torch.float64 else rewards.float()

    def of_group(x: Tensor) -> Tensor:
        return torch.zeros_like(r).index_add(0, ids, x)[ids]

    count = of_group(torch.ones_like(r))
    centred = r - of_group(r) / count
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        centred = torch.where(count > 1, centred * (count / others), 0.0)
    elif kind == "grpo":
        variance = of_group(centred.square()) / others
        spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        centred = torch.where(count > 1, centred / (spread + epsilon), 0.0)
    return centred.to(rewards.dtype)


# ---- registration


def _tokens(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    x = draw.uniform(*shape, low=-4.0, high=-0.1)
    return {"logps": x, "old_logps": x + draw.normal(*shape, scale=0.2), "advantages": draw.normal(*shape)}


def _flags(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.index(4, *shape) > 0


_SHAPES = ((7, 1), (3, 33), (2, 1025), (2, 5, 3))
_OPTIONAL = ("mask", "ref_logps", "entropies", "normalizer")

register(
    Loss(
        name="policy_loss",
        family="policy",
        function=policy_loss,
        reference=reference.policy_loss,
        replaces="verl.trainer.ppo.core_algos.compute_policy_loss",
        inputs=_tokens,
        wrt=("logps",),
        forward_arguments=("logps", "old_logps", "advantages", *_OPTIONAL),
        cases={
            "ppo": {},
            "grpo": {
                "loss_type": "grpo",
                "mask": _flags,
                "ref_logps": lambda d, s: d.uniform(*s, low=-4.0, high=-0.1),
                "kl_coef": 0.1,
                "clip_high": 0.28,
                "dual_clip": 1.1,
            },
        },
        shapes=_SHAPES,
        bench_shape=(64, 4096),
        traffic=lambda shape, itemsize, backward: (4 if backward else 3) * math.prod(shape) * itemsize,
    )
)
register(
    Loss(
        name="value_loss",
        family="policy",
        function=value_loss,
        reference=reference.value_loss,
        replaces="verl.trainer.ppo.core_algos.compute_value_loss",
        inputs=lambda d, s: {"values": d.normal(*s), "returns": d.normal(*s)},
        wrt=("values",),
        forward_arguments=("values", "returns", "old_values", "mask", "normalizer"),
        cases={
            "plain": {},
            "clipped": {
                "old_values": lambda d, s: d.normal(*s),
                "mask": _flags,
                "clip_range": 0.5,
                "loss_agg_mode": "seq-mean-token-mean",
            },
        },
        shapes=_SHAPES,
        bench_shape=(64, 4096),
        traffic=lambda shape, itemsize, backward: (4 if backward else 3) * math.prod(shape) * itemsize,
    )
)
