"""Softplus and log-sum-exp of losses that torch operations finish, as exact as their arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x).

    From its threshold on torch returns x, off by e^-x: by default 20, which float64 sees. At 80 no type does, and e^x
    is finite in all.
    """
    return F.softplus(x, threshold=80)


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Return log(sum(e^x)).

    Its gradient is e^(x - result), in which torch has the rounding error of the result, however large that is; here
    that of what is left above the largest x.
    """
    if x.shape[dim] == 0:
        return x.logsumexp(dim)
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    return (x - top).logsumexp(dim) + top.squeeze(dim)
