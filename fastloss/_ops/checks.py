"""Argument checks that the losses share. Each raises the error that torch raises and names the argument."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS, functorch_active
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


def as_weight(name: str, t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a weight in floating point: booleans and integers are converted to `dtype`."""
    if t is None:
        return None
    check_tensor(name, t)
    return t if t.is_floating_point() or t.is_complex() else t.to(dtype)


def check_weight(name: str, t: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a weight, which must have the dtype of the logits, or float32 for half-precision logits.

    Booleans and integers are converted.
    """
    if t is None or t.dtype == like.dtype:
        return t
    t = as_weight(name, t, accumulation_dtype(like.dtype))
    if t.dtype != like.dtype and not (t.dtype == torch.float32 and like.dtype in HALF_TYPES):
        raise RuntimeError(f"{name}: expected scalar type {like.dtype} but found {t.dtype}")
    return t


def _number_in(name: str, t: Tensor, kind: str) -> Any:
    """Return the number in a tensor without dimensions, of which no gradient is asked."""
    if t.dim():
        raise TypeError(f"{name}: expected {kind}, got a Tensor of shape {tuple(t.shape)}")
    if t.requires_grad:
        raise TypeError(f"{name}: expected {kind}, got a Tensor that requires a gradient")
    return t.item()


def real_number(name: str, value: Any) -> float:
    """Return as a float a real number of Python, of numpy or in a tensor without dimensions."""
    if isinstance(value, Tensor):
        value = _number_in(name, value, "a number")
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value` as a float; raise unless it is a finite number in [low, high]."""
    if type(value) is not float:
        value = real_number(name, value)
    if not (-math.inf < value < math.inf and low <= value <= high):
        raise ValueError(f"{name}: expected a finite number in [{low}, {high}], got {value}")
    return value


def check_integer(name: str, value: Any) -> int:
    """Return as an int an integer of Python, of numpy or in a tensor without dimensions; flags are none."""
    if type(value) is int:
        return value
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name}: expected an int, got a Tensor of {value.dtype}")
        value = _number_in(name, value, "an int")
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got bool")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None


def warn(text: str, frames: int) -> None:
    """Warn of what torch warns of, in its words, so that filters know it.

    The warning is of the line so many frames up: that which calls the public function. Compiled code does not warn.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(text, stacklevel=frames + 1)


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction that torch's deprecated arguments stand for, if they are given, with torch's warning."""
    if size_average is None and reduce is None:
        return reduction
    reduction = _reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    warn(f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.", 3)
    return reduction


def check_reduction(reduction: str) -> int:
    """Return the enum value of a reduction; raise for an unknown name."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: expected 'none', 'mean' or 'sum'")
    return REDUCTIONS[reduction]


def check_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, int]:
    """Check logits (C), (N, C) or (N, C, d1, ...) with classes or probabilities, and the weights of classes.

    Returns the weights and `ignore_index`.
    """
    check_tensors(input, target=target, weight=weight)
    ignore_index = check_integer("ignore_index", ignore_index)
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
        if target.is_floating_point():  # torch multiplies by it, and promotes
            weight = as_weight("weight", weight, accumulation_dtype(input.dtype))
        else:
            weight = check_weight("weight", weight, input)
    return weight, ignore_index


def rows_shape(input: Tensor) -> torch.Size:
    """Return the shape of the classes of logits (C), (N, C) or (N, C, d1, ...)."""
    shape = input.shape
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]


def check_row_weight(sample_weight: Tensor | None, input: Tensor, rows: torch.Size) -> Tensor | None:
    """Return the weights of the rows, of which there must be one for each."""
    sample_weight = check_weight("sample_weight", sample_weight, input)
    if sample_weight is not None and sample_weight.shape != rows:
        raise ValueError(
            f"sample_weight: expected one number for each row, shape {tuple(rows)}, got {tuple(sample_weight.shape)}"
        )
    return sample_weight


def _check_classes(input: Tensor, target: Tensor) -> None:
    if input.dim() > 1 and (target.dim() == 0 or input.shape[0] != target.shape[0]):
        size = target.shape[0] if target.dim() else 0
        raise ValueError(f"target: expected the input's batch_size {input.shape[0]}, got {size}")
    rows = rows_shape(input)
    if target.is_floating_point() and target.dim() == input.dim() > 1:
        raise RuntimeError(
            f"target: expected probabilities of the input's shape {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"target: expected classes of type int64 or uint8, got {target.dtype}")
    if target.shape != rows and not (input.dim() == 1 and target.shape == (1,)):
        error = ValueError if input.dim() == 1 and target.dim() == 1 else RuntimeError
        hint = ""
        if input.dim() > 2 and target.shape == input.shape[:-1]:
            hint = ": classes are dimension 1 of the input, as after input.movedim(-1, 1)"
        raise error(
            f"target: expected classes of shape {tuple(rows)} for an input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}{hint}"
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


def values_visible(t: Tensor) -> bool:
    """Return whether a look at values costs no wait and disturbs no tracer, transform or mode."""
    return (
        not torch.compiler.is_compiling()
        and t.is_cpu
        and type(t) in (Tensor, torch.nn.Parameter)
        and not functorch_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def broadcast(input: Tensor, target: Tensor, warns: bool) -> tuple[Tensor, ...]:
    """Return both in their common shape; with `warns`, warn as torch does if that is not the shape of both."""
    if input.shape == target.shape:
        return input, target
    if warns:
        warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            4,
        )
    try:
        return torch.broadcast_tensors(input, target)
    except RuntimeError as error:
        raise RuntimeError(f"input and target: {error}") from None


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


def positive_number(name: str, value: float) -> float:
    value = check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return value


def positive_beta(value: float) -> float:
    return positive_number("beta", value)


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
    """Return `value` as a tensor of one number; one in floating point is checked and returned as it is."""
    acc_dtype = accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        check_tensors(like, **{name: value})
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name}: expected one number, got {value.dtype} of shape {tuple(value.shape)}")
        return value if value.is_floating_point() else value.to(acc_dtype)
    return like.new_full((), real_number(name, value), dtype=acc_dtype)


def positive_temperature(value: float | Tensor, like: Tensor) -> Tensor:
    if not (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())):
        value = real_number("temperature", value)
        if not value > 0:
            raise ValueError(f"temperature: expected a positive number, got {value}")
    return number("temperature", value, like)


def weight_of_rows(weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_tensors(x, sample_weight=weight)
    return check_row_weight(weight, x, x.shape[:1])


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


def call_with_classes(names: str, op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call an operator; its IndexError, of a class out of bounds, then names the argument."""
    try:
        return op(*args)
    except IndexError as error:
        raise IndexError(f"{names}: {error}") from None
