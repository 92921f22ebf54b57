"""GEMMs in the place of cuBLAS where the CPU runs the CUDA kernels, which themselves are not built for the CPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._ops.dtypes import accumulation_dtype


class RowByRow:
    """Products that know one row at a time, as no result of a row may depend on its neighbours.

    Each row is copied first: the bits of a BLAS's result depend on how far from a multiple of 64 bytes it lies.
    """

    def __init__(self, operators: Any, weight: Tensor, bias: Tensor | None):
        self.weight_acc = weight.to(accumulation_dtype(weight.dtype))
        self.bias = 0 if bias is None else bias.to(self.weight_acc.dtype)
        self.logits_type = self.row_type = weight.dtype

    def logits(self, out: Tensor, x: Tensor) -> None:
        for row, to in zip(x.to(self.weight_acc.dtype), out, strict=True):
            to.copy_(torch.mv(self.weight_acc, row.clone()) + self.bias)

    def input_gradient(self, out: Tensor, g: Tensor) -> None:
        for row, to in zip(g.to(self.weight_acc.dtype), out, strict=True):
            to.copy_(torch.mv(self.weight_acc.t(), row.clone()))

    def weight_gradient(
        self, out: Tensor | None, bias_out: Tensor | None, g: Tensor, x: Tensor, add: bool
    ) -> None:
        g = g.to(self.weight_acc.dtype)
        for to, part in ((out, g.t() @ x.to(g.dtype)), (bias_out, g.sum(0))):
            if to is not None:
                to.add_(part) if add else to.copy_(part)
