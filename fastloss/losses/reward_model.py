"""Reward model losses on rankings of completions to one prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops import abi
from fastloss._ops.autograd import REDUCTIONS, Op, contiguous_like
from fastloss._ops.checks import (
    as_weight,
    check_floating,
    check_number,
    check_real,
    check_reduction,
    check_same_shape,
    check_tensor,
    check_tensors,
    choice,
    same_shape,
    smoothing_in,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32
from fastloss._ops.elementwise import ElementOp, call_elementwise, zeros_like

__all__ = ["bradley_terry_loss", "k_way_ranking_loss"]


_KINDS = abi.enum("Ranking")


def _state_width(kind: int, items: int) -> int:
    if kind == _KINDS["plackett_luce"]:
        return abi.constant("plackett_luce_state") + items
    return abi.constant("bradley_terry_state")


def _of_kind(rewards, ranks, kind):
    return reference.reward_model.rows_of_ranking(rewards, ranks, list(_KINDS)[kind])


def _fake(rewards, ranks, kind):
    acc_dtype = accumulation_dtype(rewards.dtype)
    rows, n = rewards.shape
    return (
        rewards.new_empty([rows], dtype=acc_dtype),
        rewards.new_empty([rows], dtype=acc_dtype),
        rewards.new_empty([rows, _state_width(kind, n)], dtype=acc_dtype),
    )


_ranking = Op("ranking", _of_kind, _fake, tensors=2, outputs=2, gradient_like=contiguous_like)


def k_way_ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    kind: str = "bradley_terry",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute a reward model's loss on a ranking of K completions: all pairs, or Plackett-Luce.

    With rewards :math:`r` and ranks, of which the smaller is the better, a row's loss is

    =============  =================================================================================================
    bradley_terry  :math:`-\frac{1}{C} \sum_{i, j} \log \sigma(r_i - r_j)` over the :math:`C` pairs in which i ranks
                   before j: :math:`K (K - 1) / 2` if there are no ties
    plackett_luce  :math:`-\sum_i \log \frac{e^{r_i}}{e^{r_i} + \sum_j e^{r_j}}`, j over those ranked behind i: the
                   likelihood of choosing the best, then the best of the rest, and so on
    =============  =================================================================================================

    Ties are not compared. No K x K matrix is stored.

    Args:
        rewards: shape `(..., K)`; float32, float64, bfloat16 or float16.
        ranks: same shape, any real type, without gradient; compared in float32 (float64 for float64 rewards), NaN: not
            ranked.
        kind: `"bradley_terry"` or `"plackett_luce"`. Default: `"bradley_terry"`.
        mask: flags of the completions that count, same shape; others are ignored, even if NaN. Default: all.
        reduction: `"none"`, `"mean"` over the rows in which there is a pair to compare (0 if there is none) or
            `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(...)`, 0 for rows without pairs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: Ouyang et al., https://arxiv.org/abs/2203.02155 (K completions, one mean over their pairs); Plackett 1975.
    """
    mode = check_reduction(reduction)
    kind_number = _KINDS[choice("kind", kind, tuple(_KINDS))]
    check_tensor("rewards", rewards)
    check_tensors(rewards, ranks=ranks, mask=mask)
    check_floating("rewards", rewards)
    if rewards.dim() == 0:
        raise RuntimeError("rewards: expected (..., K), got a tensor without dimensions")
    check_real(ranks=ranks, mask=mask)
    for name, t in (("ranks", ranks), ("mask", mask)):
        check_same_shape(name, t, "rewards", rewards)
    acc_dtype = accumulation_dtype(rewards.dtype)
    places = ranks.detach().to(acc_dtype)
    if mask is not None:
        places = torch.where(mask != 0, places, math.nan)
    rows, n = math.prod(rewards.shape[:-1]), rewards.shape[-1]
    loss, pairs = _ranking((rewards.reshape(rows, n), places.reshape(rows, n)), (kind_number,))
    if mode == REDUCTIONS["none"]:
        loss = loss.reshape(rewards.shape[:-1])
    elif mode == REDUCTIONS["mean"]:
        loss = loss.sum() / (pairs > 0).sum().clamp(min=1)
    else:
        loss = loss.sum()
    return loss if autocast_to_fp32(rewards) else loss.to(rewards.dtype)


_bradley_terry = ElementOp("bradley_terry_loss", reference.reward_model.bradley_terry_element)


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the pairwise Bradley-Terry loss of a reward model, with margin, weight, smoothing and centering.

    With :math:`u = r_c - r_r - m` the loss of a pair is

    .. math:: w \left[-(1 - \varepsilon) \log \sigma(u) - \varepsilon \log \sigma(-u) + k\, (r_c + r_r)^2\right]

    Args:
        chosen, rejected: rewards :math:`r_c` and :math:`r_r`, of one shape, usually `(N)`; float32, float64, bfloat16
            or float16.
        margin: :math:`m`, same shape. Default: 0.
        weight: :math:`w`, same shape; pairs of weight 0 are ignored, even if NaN. Default: 1.
        label_smoothing: :math:`\varepsilon` in [0, 1]. Default: 0.
        center_coefficient: :math:`k`, pulls the rewards towards a mean of 0. Default: 0.
        reduction: `"none"`, `"mean"` (over the pairs, regardless of their weights) or `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of the shape of the inputs.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: Bradley and Terry 1952; margin, weight and smoothing https://arxiv.org/abs/2401.06080; `RewardTrainer` of
    TRL (`center_rewards_coefficient`).
    """
    mode = check_reduction(reduction)
    hparams = _bradley_terry.pack(
        label_smoothing=smoothing_in(label_smoothing),
        center_coefficient=check_number("center_coefficient", center_coefficient),
    )
    check_tensor("chosen", chosen)
    weight = as_weight("weight", weight, chosen.dtype)
    c, r, m, w = same_shape(chosen=chosen, rejected=rejected, margin=margin, weight=weight)
    return call_elementwise(_bradley_terry, (c, r, zeros_like(c) if m is None else m), hparams, mode, w)
