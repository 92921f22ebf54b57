"""Losses of a prediction and a target, and of scores of two classes, as in torch.nn.functional."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from fastloss.reference.options import one_of, reduced, select, weighed

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "hinge_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "log_cosh_loss",
    "mse_loss",
    "rmse_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square()


def absolute_error(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs()


def smooth_absolute_error(x: Tensor, y: Tensor, beta: float) -> Tensor:
    e = x - y
    size = e.abs()
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * e.square() / beta, size - 0.5 * beta)


def huber(x: Tensor, y: Tensor, delta: float) -> Tensor:
    e = x - y
    size = e.abs()
    return torch.where(size <= delta, 0.5 * e.square(), delta * (size - 0.5 * delta))


def log_cosh(x: Tensor, y: Tensor) -> Tensor:
    """log(1 + (cosh e - 1)) near 0, |e| + log((1 + exp(-2 |e|)) / 2) elsewhere; neither sees what the other is for."""
    e = x - y
    near = e.abs() < 2
    below = 2 * torch.sinh(torch.where(near, e, 0.0) / 2).square()
    size = torch.where(near, 2.0, e.abs())
    return torch.where(near, torch.log1p(below), size + torch.log1p(torch.exp(-2 * size)) - math.log(2.0))


def hinge(s: Tensor, y: Tensor) -> Tensor:
    return torch.relu(1 - s * y)


def binary(p: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy; logarithms are not below -100, as in torch."""
    of_one, of_zero = p.log().clamp_min(-100), torch.log1p(-p).clamp_min(-100)
    return (y - 1) * of_zero - y * of_one


def binary_with_logits(x: Tensor, y: Tensor) -> Tensor:
    return -(weighed(y, F.logsigmoid(x)) + weighed(1 - y, F.logsigmoid(-x)))


def weighted_binary_with_logits(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return -(weighed(w * y, F.logsigmoid(x)) + weighed(1 - y, F.logsigmoid(-x)))


def kl_divergence(x: Tensor, t: Tensor, log_target: float) -> Tensor:
    if not log_target:
        return torch.xlogy(t, t) - torch.where((t == 0) & (x == -torch.inf), 0.0, t * x)
    nowhere = (t == -torch.inf) & ~x.isnan()  # e^t (t - x) tends to 0
    return torch.where(nowhere, 0.0, t.exp() * torch.where(nowhere, 0.0, t - x))


def _floats(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and not torch.is_floating_point(t):
            raise NotImplementedError(f"{name}: expected a floating point type, got {t.dtype}")


def _promoted(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one floating point type; one of them may be integers."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if not dtype.is_floating_point:
        _floats(input=input, target=target)
    return input.to(dtype), target.to(dtype)


def _mode(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    return reduction


def read(counts: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors with a number in place of what is not counted, of which every loss has finite derivatives."""
    return tensors if counts is None else tuple(torch.where(counts != 0, t, 0.5) for t in tensors)


def _reduced(loss: Tensor, reduction: str, weight: Tensor | None = None, by_weight: bool = False) -> Tensor:
    if weight is not None:
        loss = torch.where(weight != 0, weight * loss, 0.0)
    return reduced(loss, reduction, weight.sum() if by_weight and weight is not None else None)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.mse_loss`."""
    input, target = _promoted(input, target)
    input, target = read(weight, input, target)
    return _reduced(squared_error(input, target), _mode(size_average, reduce, reduction), weight, True)


def safe_sqrt(x: Tensor) -> Tensor:
    """Return the root; its derivative at 0 is taken to be 0."""
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def rmse_loss(input: Tensor, target: Tensor, eps: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """Compute `fastloss.functional.rmse_loss`."""
    return safe_sqrt(mse_loss(input, target, weight=weight) + eps)


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.l1_loss`."""
    input, target = _promoted(input, target)
    input, target = read(weight, input, target)
    return _reduced(absolute_error(input, target), _mode(size_average, reduce, reduction), weight, True)


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Compute `fastloss.functional.smooth_l1_loss`."""
    input, target = _promoted(input, target)
    return _reduced(smooth_absolute_error(input, target, beta), _mode(size_average, reduce, reduction))


def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.huber_loss`."""
    input, target = _promoted(input, target)
    input, target = read(weight, input, target)
    return _reduced(huber(input, target, delta), reduction, weight)


def log_cosh_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", *, weight: Tensor | None = None
) -> Tensor:
    """Compute `fastloss.functional.log_cosh_loss`."""
    input, target = _promoted(input, target)
    input, target = read(weight, input, target)
    return _reduced(log_cosh(input, target), reduction, weight, True)


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.binary_cross_entropy`."""
    _floats(input=input, target=target, weight=weight)
    input, target = read(weight, input, target)
    return _reduced(binary(input, target), _mode(size_average, reduce, reduction), weight)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.binary_cross_entropy_with_logits`."""
    _floats(input=input, target=target, weight=weight, pos_weight=pos_weight)
    input, target = read(weight, input, target)
    if pos_weight is None:
        loss = binary_with_logits(input, target)
    else:
        loss = weighted_binary_with_logits(input, target, pos_weight)
    return _reduced(loss, _mode(size_average, reduce, reduction), weight)


def hinge_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Compute `fastloss.functional.hinge_loss`."""
    input, target = _promoted(input, target)
    return _reduced(hinge(input, target), reduction)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Compute `fastloss.functional.kl_div`."""
    _floats(input=input, target=target)
    reduction = _mode(size_average, reduce, reduction)
    loss = kl_divergence(input, target, float(log_target))
    if one_of("reduction", reduction, ("none", "mean", "sum", "batchmean")) == "batchmean":
        return loss.sum() / input.shape[0] if input.dim() else loss.sum()
    return _reduced(loss, reduction)


def sigmoid_focal_element(x: Tensor, y: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the loss of logit x and target y in [0, 1]; every factor keeps its relative precision for large |x|."""
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    cross_entropy = binary_with_logits(x, y)
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
    """Compute `fastloss.functional.sigmoid_focal_loss`."""
    if not torch.is_floating_point(inputs):
        raise NotImplementedError(f"inputs: expected a floating point type, got {inputs.dtype}")
    dtype = torch.result_type(inputs, targets)
    if weight is not None:
        dtype = torch.promote_types(dtype, torch.result_type(inputs, weight))
    inputs = inputs.to(dtype)
    if targets.shape == inputs.shape:
        y, counted, rows = targets.to(dtype), None, None
    elif targets.dtype == torch.int64 and targets.shape == inputs.shape[:-1]:
        positive = targets.unsqueeze(-1) == torch.arange(inputs.shape[-1], device=inputs.device)
        if background_index is not None:
            positive = positive & (targets != background_index).unsqueeze(-1)
        y = positive.to(inputs.dtype)
        counted = (targets != ignore_index).unsqueeze(-1)
        rows = counted.sum()
    else:
        raise ValueError(f"targets: expected the shape of inputs, {tuple(inputs.shape)}")
    inputs, y = read(weight, *read(counted, inputs, y))
    loss = sigmoid_focal_element(inputs, y, alpha, gamma)
    if weight is not None:
        loss = torch.where(weight != 0, weight * loss, 0.0)
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    if num_positives is None:
        return reduced(loss, reduction, rows)
    total = select("reduction", reduction, {"none": loss, "mean": loss.sum(), "sum": loss.sum()})
    return total / (num_positives.to(loss.dtype) if isinstance(num_positives, Tensor) else num_positives)
