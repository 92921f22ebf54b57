"""What the preference, ranking and policy heads share: checks of their arguments, and their place in the registry."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from fastloss._ops.checks import check_floating, check_number
from fastloss._registry import Draw
from fastloss.losses.pointwise import is_wide


def _alike(tensors: list[Tensor | None]) -> bool:
    """Whether nothing is to be said nor converted, as in nearly every call."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return False
    dtype, shape, device = first.dtype, first.shape, first.device
    return all(
        t is None or (isinstance(t, Tensor) and t.dtype == dtype and t.shape == shape and t.device == device)
        for t in tensors[1:]
    )


def same_shape(**tensors: Tensor | None) -> list[Tensor | None]:
    """Checks that all are floating-point tensors of the first one's shape and device; gives them one type."""
    found = list(tensors.values())
    if _alike(found):
        return found
    (name, first), *_ = tensors.items()
    if not isinstance(first, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(first).__name__}")
    present = {k: t for k, t in tensors.items() if t is not None}
    for k, t in present.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{k}: expected a Tensor, got {type(t).__name__}")
        check_floating(k, t)
        if t.device != first.device:
            raise RuntimeError(f"{k}: expected the device of {name}, {first.device}, got {t.device}")
        if t.shape != first.shape:
            raise RuntimeError(
                f"{k}: expected the shape of {name}, {tuple(first.shape)}, got {tuple(t.shape)}"
            )
    dtype = reduce(torch.promote_types, (t.dtype for t in present.values()))
    return [None if t is None else t.to(dtype) for t in tensors.values()]


def zeros_like(x: Tensor) -> Tensor:
    """One zero that every element reads."""
    return x.new_zeros(()).expand(x.shape)


def head(op, inputs, numbers, mode, weight=None) -> Tensor:
    return op((*inputs, weight, None), (mode, numbers, -100, 0, is_wide(inputs[0])))


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


def logps(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(*shape, low=-6.0, high=-0.05)


def of_logps(*names: str):
    return lambda draw, shape: {name: logps(draw, shape) for name in names}


def traffic_of(inputs: int, trained: int):
    """All inputs read once; the gradients of those that are trained written in the same pass."""
    return lambda shape, itemsize, backward: (inputs + backward * trained) * math.prod(shape) * itemsize


SHAPES = ((7, 1), (3, 33), (2, 1025), (2, 5, 3))
BENCH = (64, 4096)
