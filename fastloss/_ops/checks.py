"""Argument checks that the losses share. Each raises the error that torch raises and names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS
from fastloss._ops.dtypes import accumulation_dtype


def check_tensor(name: str, t: Any) -> None:
    """Raise if `t` is not a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")


def check_same_shape(name: str, t: Tensor | None, like_name: str, like: Tensor) -> None:
    """Raise if `t` is given and its shape differs from that of `like`."""
    if t is not None and t.shape != like.shape:
        raise RuntimeError(
            f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(t.shape)}"
        )


def check_tensors(like: Tensor, **tensors: Tensor | None) -> None:
    """Check that all are tensors on the device of `like`, which errors call `input`."""
    check_tensor("input", like)
    for name, t in tensors.items():
        if t is None:
            continue
        check_tensor(name, t)
        if t.device != like.device:
            raise RuntimeError(
                f"{name}: expected all tensors on the same device, but it is on {t.device} and input on {like.device}"
            )


def check_floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise NotImplementedError(f"{name}: expected a floating point type, got {t.dtype}")


def check_real(**tensors: Tensor | None) -> None:
    """Raise for complex tensors."""
    for name, t in tensors.items():
        if t is not None and t.is_complex():
            raise NotImplementedError(f"{name}: expected real numbers, got {t.dtype}")


def check_weight_type(name: str, t: Tensor | None, like: Tensor) -> None:
    """Check that a weight has the dtype of the logits, or float32 for half-precision logits."""
    if (
        t is not None
        and t.dtype != like.dtype
        and not (t.dtype == torch.float32 and like.dtype in HALF_TYPES)
    ):
        raise RuntimeError(f"{name}: expected scalar type {like.dtype} but found {t.dtype}")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float; raise unless it is a finite number in [low, high]."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (-math.inf < value < math.inf and low <= value <= high):
        raise ValueError(f"{name}: expected a finite number in [{low}, {high}], got {value}")
    return float(value)


def check_reduction(reduction: str) -> int:
    """Return the enum value of a reduction; raise for an unknown name."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    return REDUCTIONS[reduction]


def check_rows(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    """Check logits (C), (N, C) or (N, C, d1, ...) with classes or probabilities, and the weights of classes."""
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


def promoted(input: Tensor, **others: Tensor | None) -> torch.dtype:
    """Return the dtype to which torch promotes all of them."""
    dtype = input.dtype
    check_real(**others)
    for t in others.values():
        if t is not None:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def expanded(name: str, t: Tensor, like: Tensor) -> Tensor:
    try:
        return t.expand(like.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name}: expected a shape that broadcasts to {tuple(like.shape)}, got {tuple(t.shape)}"
        ) from None


def one_number(name: str, value: float | Tensor | None, like: Tensor) -> Tensor | None:
    if value is None:
        return None
    acc_dtype = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return like.new_full((), check_number(name, value), dtype=acc_dtype)
    if value.dim():
        raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")
    check_real(**{name: value})
    return value.to(acc_dtype)


def _alike(tensors: list[Tensor | None]) -> bool:
    """Return True if all tensors already agree in dtype, shape and device: the fast path."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return False
    dtype, shape, device = first.dtype, first.shape, first.device
    return all(
        t is None or (isinstance(t, Tensor) and t.dtype == dtype and t.shape == shape and t.device == device)
        for t in tensors[1:]
    )


def same_shape(**tensors: Tensor | None) -> list[Tensor | None]:
    """Check that all are floating-point tensors of one shape and device; return them promoted to one dtype."""
    found = list(tensors.values())
    if _alike(found):
        return found
    (name, first), *_ = tensors.items()
    check_tensor(name, first)
    present = {k: t for k, t in tensors.items() if t is not None}
    for k, t in present.items():
        check_tensor(k, t)
        check_floating(k, t)
        if t.device != first.device:
            raise RuntimeError(f"{k}: expected the device of {name}, {first.device}, got {t.device}")
        check_same_shape(k, t, name, first)
    dtype = reduce(torch.promote_types, (t.dtype for t in present.values()))
    return [None if t is None else t.to(dtype) for t in tensors.values()]


def smoothing_in(value: float, high: float = 1.0) -> float:
    return check_number("label_smoothing", value, 0.0, high)


def positive_beta(value: float) -> float:
    if check_number("beta", value) <= 0:
        raise ValueError(f"beta: expected a positive number, got {value}")
    return float(value)


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def rows_of_features(first: str, **tensors: Tensor | None) -> tuple[list[Tensor | None], torch.dtype | None]:
    """Validate feature matrices, cast for autocast, and return them with the output dtype."""
    x = tensors[first]
    check_tensor(first, x)
    for name, t in tensors.items():
        if t is None:
            continue
        check_tensors(x, **{name: t})
        check_floating(name, t)
        if t.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, features), got {tuple(t.shape)}")
        if t.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected {x.shape[1]} features as {first} has, got {t.shape[1]}")
        if t.dtype != x.dtype:
            raise RuntimeError(f"{name}: expected the dtype of {first}, {x.dtype}, got {t.dtype}")
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors.values()), x.dtype
    autocast_dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(autocast_dtype) for t in tensors.values()], (
        accumulation_dtype(x.dtype)
    )


def number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """Return `value` as a tensor of one number; a tensor is checked and returned as it is."""
    if isinstance(value, Tensor):
        check_tensors(like, **{name: value})
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one number, got {value.dtype} of shape {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a Tensor, got {type(value).__name__}")
    return like.new_full((), value, dtype=accumulation_dtype(like.dtype))


def positive_temperature(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"temperature: expected a positive number, got {value}")
    return number("temperature", value, like)


def weight_of_rows(weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_tensors(x, sample_weight=weight)
    check_weight_type("sample_weight", weight, x)
    if weight.shape != x.shape[:1]:
        raise ValueError(
            f"sample_weight: expected one number for each of {x.shape[0]} rows, got shape {tuple(weight.shape)}"
        )
    return weight


def labels_of_rows(labels: Tensor, x: Tensor, name: str = "labels") -> Tensor:
    check_tensor(name, labels)
    check_tensors(x, **{name: labels})
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: expected one label for each of {x.shape[0]} rows, got shape {tuple(labels.shape)}"
        )
    return labels.long()


def call_with_classes(names: str | None, op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call an operator; turn its error about a class out of bounds into an IndexError that names the argument."""
    try:
        return op(*args)
    except RuntimeError as error:
        if "is out of bounds" in str(error):
            raise IndexError(f"{names}: {error}" if names else str(error)) from None
        raise
