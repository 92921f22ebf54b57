"""Reductions of the losses of rows that are left to torch."""

from __future__ import annotations

import torch
from torch import Tensor


def reduced(loss: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """Return the rows' losses weighted and reduced, in `dtype`; a mean is divided by the sum of the weights."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "mean":
        loss = loss.sum() / (loss.shape[0] if weight is None else weight.to(loss.dtype).sum())
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)
