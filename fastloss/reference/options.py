"""What several references need: options that are one of several names, the dtype of sums."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return the value if it is one of the choices, else raise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
