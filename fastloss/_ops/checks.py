"""Checks of arguments that the losses share. Each raises what torch raises and names the argument."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS


def check_tensors(like: Tensor, **tensors: Tensor | None) -> None:
    """All tensors, and on the device of `like`, the first of which must be `input` or its equal."""
    if not isinstance(like, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(like).__name__}")
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.device != like.device:
            raise RuntimeError(
                f"{name}: expected all tensors on the same device, but it is on {t.device} and input on {like.device}"
            )


def check_floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise NotImplementedError(f"{name}: expected a floating point type, got {t.dtype}")


def check_real(**tensors: Tensor | None) -> None:
    """Numbers of any type but complex ones."""
    for name, t in tensors.items():
        if t is not None and t.is_complex():
            raise NotImplementedError(f"{name}: expected real numbers, got {t.dtype}")


def check_weight_type(name: str, t: Tensor | None, like: Tensor) -> None:
    """A weight has the type of the logits, or float32 beside half types."""
    if (
        t is not None
        and t.dtype != like.dtype
        and not (t.dtype == torch.float32 and like.dtype in HALF_TYPES)
    ):
        raise RuntimeError(f"{name}: expected scalar type {like.dtype} but found {t.dtype}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (-math.inf < value < math.inf and low <= value <= high):
        raise ValueError(f"{name}: expected a finite number in [{low}, {high}], got {value}")
    return float(value)


def check_reduction(reduction: str) -> int:
    """The operators' number of a reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    return REDUCTIONS[reduction]


def check_rows(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Logits (C), (N, C) or (N, C, d1, ...), with classes or probabilities, and a weight for each class."""
    check_tensors(input, target=target, weight=weight)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if input.dim() == 0:
        error = IndexError if target.dim() else RuntimeError
        raise error("input: expected (C), (N, C) or (N, C, d1, ...), got a tensor without dimensions")
    check_floating("input", input)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if target.shape == input.shape and target.is_floating_point():
        if ignore_index >= 0:
            raise RuntimeError("ignore_index is not supported for floating point target")
    else:
        _check_classes(input, target)
    if weight is not None:
        if weight.shape != (classes,):
            raise RuntimeError(
                f"weight: expected one number for each of {classes} classes, got shape {tuple(weight.shape)}"
            )
        check_weight_type("weight", weight, input)


def _check_classes(input: Tensor, target: Tensor) -> None:
    if input.dim() > 1 and (target.dim() == 0 or input.shape[0] != target.shape[0]):
        size = target.shape[0] if target.dim() else 0
        raise ValueError(f"target: expected the input's batch_size {input.shape[0]}, got {size}")
    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.is_floating_point() and target.dim() == input.dim() > 1:
        raise RuntimeError(
            f"target: expected probabilities of the input's shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target: expected classes of type int64 or uint8, got {target.dtype}")
    if target.shape != rows and not (input.dim() == 1 and target.shape == (1,)):
        error = ValueError if input.dim() == 1 and target.dim() == 1 else RuntimeError
        raise error(
            f"target: expected classes of shape {tuple(rows)} for an input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
