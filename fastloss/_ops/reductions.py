"""Weighted reductions of row losses and running sums, by torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss._ops.autograd import runs_on_cpu


def _weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """Return the losses times the weights; one of weight 0 adds nothing, not even NaN."""
    read = torch.where(
        (weight == 0) & ~loss.isfinite(), 0.0, loss
    )  # a finite one is the derivative by its weight
    return read * weight.to(loss.dtype)


def reduced(loss: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """Weight and reduce the row losses, in `dtype`; a mean is divided by the sum of the weights."""
    if weight is not None:
        loss = _weighted(loss, weight)
    if reduction == "mean":
        loss = loss.sum() / (loss.shape[0] if weight is None else weight.to(loss.dtype).sum())
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def reduced_over(
    loss: Tensor, counts: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype
) -> Tensor:
    """Weight and reduce the row losses; a mean is divided by the sum of `counts` times the weights.

    The mean is 0 where that sum is 0.
    """
    if weight is not None:
        loss = _weighted(loss, weight)
        counts = counts * weight.to(loss.dtype)
    if reduction == "mean":
        total = counts.sum()
        loss = loss.sum() / torch.where(total == 0, 1, total).to(loss.dtype)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def running_sums(x: Tensor) -> Tensor:
    """Return the sums of the elements up to each, along the last dimension.

    `cumsum` on CUDA adds floating-point numbers in an order that may change; this one doubles the distance of what it
    adds, log2(n) times.
    """
    if runs_on_cpu(x):
        return x.cumsum(-1)
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x
