"""Focal loss of a softmax over classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.classification import nll_of

__all__ = ["softmax_focal_loss"]


def class_weights(alpha: float | Tensor | None, background_class: int | None, input: Tensor) -> Tensor | None:
    """The weight of each class that a focal loss's `alpha` stands for."""
    if alpha is None or isinstance(alpha, Tensor):
        return alpha
    weight = torch.full(
        (input.shape[min(input.dim() - 1, 1)],), alpha, dtype=input.dtype, device=input.device
    )
    if background_class is not None:
        weight[background_class] = 1 - alpha
    return weight


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    background_class: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """As `fastloss.functional.softmax_focal_loss`; `inplace_backward` changes nothing here."""
    dim = 0 if input.dim() == 1 else 1
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    nll = nll_of(input, F.one_hot(y, input.shape[dim]).bool().movedim(-1, dim), dim)
    rest = -torch.expm1(-nll)  # 1 - p
    certain = rest == 0  # where a power below one has no derivative, and the loss is 0
    loss = torch.where(certain, nll * (gamma == 0), torch.where(certain, 1.0, rest) ** gamma * nll)
    weight = class_weights(alpha, background_class, input)
    if weight is not None:
        loss = weight.to(loss.dtype)[y] * loss
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()
