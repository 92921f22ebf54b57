"""What several references need: options that are one of several names, reductions, softplus, the dtype of sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


def unknown(name: str, value: str, choices: Iterable[str]) -> ValueError:
    """Return the error for an option that is none of the choices."""
    return ValueError(f"{name}: expected one of {', '.join(dict.fromkeys(choices))}, got {value!r}")


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return the value if it is one of the choices, else raise."""
    choices = tuple(choices)
    if value not in choices:
        raise unknown(name, value, choices)
    return value


def select(name: str, value: str, table: Mapping[str, T]) -> T:
    """Return the entry of an option's value, mostly the formula to call; raise where the table has none."""
    return table[one_of(name, value, table)]


def reduced(loss: Tensor, reduction: str, divisor: Tensor | float | None = None) -> Tensor:
    """Return the losses, their mean or their sum; a mean is the sum by the divisor, if one is given."""
    reduce = select("reduction", reduction, {
        "none": lambda: loss,
        "mean": lambda: loss.mean() if divisor is None else loss.sum() / divisor,
        "sum": lambda: loss.sum(),
    })  # fmt: skip
    return reduce()


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x); torch's is x from its threshold on, where float64 must not see the difference."""
    return F.softplus(x, threshold=80)


def weighed(w: Tensor | float, x: Tensor) -> Tensor:
    """Return w x; 0 where w is 0, also of an infinite x. NaN stays."""
    w = torch.as_tensor(w, dtype=x.dtype, device=x.device)
    return w * torch.where((w == 0) & x.isinf(), 0.0, x)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
