"""The dtypes that losses are computed and returned in."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss._ops.autograd import HALF_TYPES


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_to_fp32(input: Tensor) -> bool:
    """Return whether the loss of this input is float32 though it is not: under autocast, as torch's losses are."""
    return input.dtype in HALF_TYPES and torch.is_autocast_enabled(input.device.type)
