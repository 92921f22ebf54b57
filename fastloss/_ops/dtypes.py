"""Accumulation and result dtypes of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss._ops.autograd import HALF_TYPES


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_to_fp32(input: Tensor) -> bool:
    """Return whether autocast makes the loss of this half-precision input float32, as it does torch's losses."""
    return input.dtype in HALF_TYPES and torch.is_autocast_enabled(input.device.type)
