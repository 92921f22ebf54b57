"""Losses of rankings of several answers to one prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_real, check_reduction, check_tensors
from fastloss._heads import choice
from fastloss._op import REDUCTIONS, Op
from fastloss._registry import Draw, Loss, register
from fastloss.pointwise import is_wide
from fastloss.reference.ranking import KINDS

__all__ = ["k_way_ranking_loss"]


def _fake(rewards, ranks, kind):
    high = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rows, n = rewards.shape
    return (
        rewards.new_empty([rows], dtype=high),
        rewards.new_empty([rows], dtype=high),
        rewards.new_empty([rows, n + 1 if KINDS[kind] == "plackett_luce" else 1], dtype=high),
    )


_ranking = Op("ranking", reference.ranking.rows_of_ranking, _fake, tensors=2, outputs=2)


def k_way_ranking_loss(
    rewards: Tensor,
    ranks: Tensor,
    kind: str = "bradley_terry",
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Reward model loss on a ranking of K completions: all pairs, or Plackett-Luce.

    With rewards :math:`r` and ranks, of which the smaller is the better, a row's loss is

    =============  =================================================================================================
    bradley_terry  :math:`-\frac{1}{C} \sum_{i, j} \log \sigma(r_i - r_j)` over the :math:`C` pairs in which i ranks
                   before j: :math:`K (K - 1) / 2` if there are no ties
    plackett_luce  :math:`-\sum_i \log \frac{e^{r_i}}{e^{r_i} + \sum_j e^{r_j}}`, j over those ranked behind i: the
                   likelihood of choosing the best, then the best of the rest, and so on
    =============  =================================================================================================

    Ties are not compared. Nothing of K x K is stored.

    Args:
        rewards: shape `(..., K)`; float32, float64, bfloat16 or float16.
        ranks: same shape, any real type, without gradient; compared in float32 (float64 for float64 rewards), NaN: not
            ranked.
        kind: `"bradley_terry"` or `"plackett_luce"`. Default: `"bradley_terry"`.
        mask: flags of the answers that count, same shape; others count nothing whatever they hold. Default: all.
        reduction: `"none"`, `"mean"` over the rows in which there is a pair to compare (0 if there is none) or
            `"sum"`. Default: `"mean"`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(...)`, 0 for rows without pairs.

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: Ouyang et al., https://arxiv.org/abs/2203.02155 (K answers, one mean over their pairs); Plackett 1975.
    """
    mode = check_reduction(reduction)
    kind_number = KINDS.index(choice("kind", kind, KINDS))
    if not isinstance(rewards, Tensor):
        raise TypeError(f"rewards: expected a Tensor, got {type(rewards).__name__}")
    check_tensors(rewards, ranks=ranks, mask=mask)
    check_floating("rewards", rewards)
    if rewards.dim() == 0:
        raise RuntimeError("rewards: expected (..., K), got a tensor without dimensions")
    check_real(ranks=ranks, mask=mask)
    for name, t in (("ranks", ranks), ("mask", mask)):
        if t is not None and t.shape != rewards.shape:
            raise RuntimeError(
                f"{name}: expected the shape of rewards, {tuple(rewards.shape)}, got {tuple(t.shape)}"
            )
    high = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    places = ranks.detach().to(high)
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
    return loss if is_wide(rewards) else loss.to(rewards.dtype)


def _ranked(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"rewards": draw.normal(*shape, scale=2.0), "ranks": draw.index(shape[-1], *shape)}


register(
    Loss(
        name="k_way_ranking_loss",
        family="preference",
        function=k_way_ranking_loss,
        reference=reference.k_way_ranking_loss,
        inputs=_ranked,
        wrt=("rewards",),
        forward_arguments=("rewards", "ranks", "mask"),
        cases={
            "bradley_terry": {},
            "plackett_luce": {"kind": "plackett_luce", "reduction": "none"},
            "masked": {"mask": lambda d, s: d.index(4, *s) > 0, "reduction": "sum"},
        },
        shapes=((7, 1), (3, 9), (17, 4), (2, 3, 5)),
        bench_shape=(4096, 9),
        traffic=lambda shape, itemsize, backward: (3 if backward else 2) * math.prod(shape) * itemsize,
    )
)
