"""Losses of a prediction and a target, element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sigmoid_focal_loss"]


def sigmoid_focal_element(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """Of logit x and target y in [0, 1]; every factor keeps its relative precision for large |x|."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    cross_entropy = -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    miss = p * (1 - y) + q * y  # 1 - p_t
    seen = miss > 0  # where it is 0, the loss and its derivatives are too
    power = torch.where(seen, torch.where(seen, miss, 1.0).pow(gamma), 0.0) if gamma else 1.0
    loss = power * cross_entropy
    return loss if alpha < 0 else (alpha * y + (1 - alpha) * (1 - y)) * loss


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    num_positives: float | Tensor | None = None,
    ignore_index: int = -100,
    background_index: int | None = None,
) -> Tensor:
    """As `fastloss.functional.sigmoid_focal_loss`."""
    if not torch.is_floating_point(inputs):
        raise NotImplementedError(f"inputs: expected a floating point type, got {inputs.dtype}")
    dtype = torch.result_type(inputs, targets)
    if weight is not None:
        dtype = torch.promote_types(dtype, torch.result_type(inputs, weight))
    inputs = inputs.to(dtype)
    if targets.shape == inputs.shape:
        y, counted, rows = targets.to(dtype), None, None
    elif targets.dtype == torch.int64 and targets.shape == inputs.shape[:-1]:
        y = (targets.unsqueeze(-1) == torch.arange(inputs.shape[-1], device=inputs.device)).to(inputs.dtype)
        counted = (targets != ignore_index).unsqueeze(-1)
        rows = counted.sum()
    else:
        raise ValueError(f"targets: expected the shape of inputs, {tuple(inputs.shape)}")
    loss = sigmoid_focal_element(inputs, y, alpha, gamma)
    if weight is not None:
        loss = torch.where(weight != 0, weight * loss, 0.0)
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    if reduction == "mean" and num_positives is None and rows is None:
        return loss.mean()
    loss = loss if reduction == "none" else loss.sum()
    if num_positives is not None:
        return loss / (num_positives.to(loss.dtype) if isinstance(num_positives, Tensor) else num_positives)
    return loss / rows if reduction == "mean" else loss
