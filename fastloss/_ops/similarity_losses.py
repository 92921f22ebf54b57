"""Operators over a similarity matrix other than the softmax: pairs, sigmoid, hardest. See similarity.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastloss._ops.autograd import REDUCTIONS
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.precomputed import PrecomputedOp
from fastloss._ops.similarity import (
    HARDEST,
    PAIRS,
    PAIRS_GRADIENT,
    SIGMOID,
    STATISTICS,
    BlockSums,
    Columns,
    Features,
    Matrix,
    OneBlock,
    SimilarityOp,
)


class PairsInputs(NamedTuple):
    x: Tensor  # [m, features]
    y: Tensor | None  # [n, features]
    scale: Tensor  # one element
    target_col: Tensor | None  # [m] int64: the column of the row itself
    row_ids: Tensor  # [m] int64
    col_ids: Tensor | None  # [n] int64


class PairsAttrs(NamedTuple):
    normalize: bool
    temperature: bool = False


class PairsOutputs(NamedTuple):
    loss: Tensor  # [m]


class PairsState(NamedTuple):
    row_max: Tensor
    row_log_sum: Tensor
    slope: Tensor


class PairsGradients(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor


class PairsOp(SimilarityOp):
    """For each row the sum over its positives p of log(1 + sum over its negatives j of exp(s_j - s_p))."""

    Inputs, Attrs, Outputs, State, Gradients = (
        PairsInputs,
        PairsAttrs,
        PairsOutputs,
        PairsState,
        PairsGradients,
    )
    passes = 2

    def __init__(self, name: str, reference):
        super().__init__(name, reference, wrt=(0, 1, 2))

    def shapes(self, inputs, attrs):
        x = inputs.x
        return (x.new_empty([x.shape[0]], dtype=accumulation_dtype(x.dtype)) for _ in range(4))

    def forward(self, operators, inputs, attrs):
        s, _ = self._matrix(operators, inputs, attrs)
        row_max, row_log_sum, loss, slope = (s.zeros(s.m) for _ in range(4))
        s.run(STATISTICS, row_max=row_max, row_log_sum=row_log_sum)
        s.run(PAIRS, row_max=row_max, row_log_sum=row_log_sum, positive=loss, row_grad=slope)
        return loss, row_max, row_log_sum, slope

    def backward(self, operators, grads, inputs, state, attrs):
        s, columns = self._matrix(operators, inputs, attrs)
        grad = grads.loss
        dx, dy, dscale = s.run(
            PAIRS_GRADIENT, True, row_max=state.row_max, row_log_sum=state.row_log_sum, row_grad=grad * state.slope,
            positive_grad=grad.contiguous(),
        )  # fmt: skip
        columns.add(dy)
        dy = columns.gradient()
        if inputs.y is None and dy is not None:
            dx, dy = dx.add_(dy), None
        dy = inputs.x.new_empty(0) if dy is None else dy
        return s.x.gradient(dx), dy, dscale.to(inputs.scale.dtype)

    @staticmethod
    def _matrix(operators: Any, inputs: PairsInputs, attrs: PairsAttrs) -> tuple[Matrix, OneBlock]:
        rows = Features(inputs.x, attrs.normalize)
        columns = OneBlock(rows, inputs.y, attrs.normalize)
        (block,) = columns.blocks()
        s = Matrix(
            operators, rows, block, inputs.scale, temperature=attrs.temperature, target_col=inputs.target_col,
            row_ids=inputs.row_ids, col_ids=inputs.col_ids, labels_are_positives=True,
        )  # fmt: skip
        return s, columns


class SigmoidInputs(NamedTuple):
    x: Tensor  # [m, features]
    y: Tensor  # [n, features]
    scale: Tensor  # one element
    bias: Tensor | None  # one element
    target_col: Tensor | None  # [m] int64: the column of the positive; None: there is none
    weight: Tensor | None  # [m]


class SigmoidAttrs(NamedTuple):
    reduction: int
    normalize: bool
    out_fp32: bool


class SigmoidOutputs(NamedTuple):
    loss: Tensor


class SigmoidState(NamedTuple):
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    dbias: Tensor


class SigmoidGradients(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor


class SigmoidOp(PrecomputedOp, SimilarityOp):
    """Sum of softplus(-z s) over a row, z = 1 at the target column and -1 at the others, then over rows.

    Value and gradients come from one pass over the matrix: three GEMMs.
    """

    Inputs, Attrs, Outputs, State = SigmoidInputs, SigmoidAttrs, SigmoidOutputs, SigmoidState
    Gradients = SigmoidGradients
    reduction: ClassVar[int] = 0
    row_weight: ClassVar[int] = 5

    def __init__(self, name: str, reference):
        super().__init__(name, reference, wrt=(0, 1, 2, 3))

    def shapes(self, inputs, attrs, mask):
        x, acc_dtype = inputs.x, accumulation_dtype(inputs.x.dtype)
        loss_dtype = acc_dtype if attrs.out_fp32 else x.dtype
        yield x.new_empty([] if attrs.reduction else x.shape[:1], dtype=loss_dtype)
        for i, t in enumerate(inputs[:4]):
            yield x.new_empty(t.shape if mask >> i & 1 else [0], dtype=acc_dtype)

    def forward(self, operators, inputs, attrs, mask):
        acc_dtype = accumulation_dtype(inputs.x.dtype)
        rows = Features(inputs.x, attrs.normalize)
        columns = OneBlock(rows, inputs.y, attrs.normalize)
        weight = None if inputs.weight is None else inputs.weight.to(acc_dtype)
        norm = row_grad = None
        if attrs.reduction == REDUCTIONS["mean"]:
            norm = rows.acc.new_full((), rows.acc.shape[0])
            norm = norm if weight is None else operators.row_reduce(weight, None)
        if mask:
            row_grad = rows.acc.new_ones(rows.acc.shape[0]) if weight is None else weight
            row_grad = (row_grad if norm is None else row_grad / norm).contiguous()
        loss, grads = sigmoid_pass(operators, inputs, row_grad, rows, columns)
        loss = loss if weight is None else loss * weight
        loss = operators.row_reduce(loss, norm) if attrs.reduction else loss
        loss = loss if attrs.out_fp32 else loss.to(inputs.x.dtype)
        grads = grads if mask else [None] * 4
        return loss, *(d if mask >> i & 1 else rows.acc.new_empty(0) for i, d in enumerate(grads))


def sigmoid_pass(
    operators: Any, inputs: Any, row_grad: Tensor | None, rows: Features, columns: Columns
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the rows' losses and, with `row_grad`, the gradients of the first four inputs.

    All in the accumulation dtype; `target_col` is among the columns of all.
    """
    sums = BlockSums(columns.count)
    for block in columns.blocks():
        s = Matrix(operators, rows, block, inputs.scale, bias=inputs.bias, target_col=inputs.target_col)
        loss, slope = s.zeros(s.m), s.zeros(s.m)
        found = s.run(SIGMOID, row_grad is not None, positive=loss, row_log_sum=slope, row_grad=row_grad)
        if found:
            sums.add(block.index, found[0], loss, slope, found[2])
            columns.add(found[1])
        else:
            sums.add(block.index, None, loss)
    loss, *arrays = sums.arrays()
    if row_grad is None:
        return loss, ()
    slope, dscale = arrays
    dbias = None
    if inputs.bias is not None:
        dbias = operators.row_reduce(slope * row_grad, None).reshape(inputs.bias.shape)
    acc_dtype = rows.acc.dtype
    return loss, (rows.gradient(sums.dx, acc_dtype), columns.gradient(acc_dtype), dscale, dbias)


class HardestInputs(NamedTuple):
    x: Tensor  # [m, features]
    ids: Tensor  # [m] int64


class HardestOutputs(NamedTuple):
    hardest: Tensor


class HardestOp(SimilarityOp):
    """For each row x_i the indices of the farthest row with its id and the nearest with another, [2, m], or -1."""

    Inputs, Outputs = HardestInputs, HardestOutputs

    def __init__(self, name: str):
        super().__init__(name, None)

    def shapes(self, inputs, _):
        yield inputs.x.new_empty([2, inputs.x.shape[0]], dtype=torch.int64)

    def indices(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.operators().fwd(x, ids)  # nothing to differentiate

    def forward(self, operators, inputs, _):
        x, ids = inputs
        rows = Features(x, False)
        (block,) = OneBlock(rows, None, False).blocks()
        scale = x.new_full((), -2, dtype=rows.acc.dtype)
        itself = torch.arange(x.shape[0], device=x.device)
        s = Matrix(operators, rows, block, scale, target_col=itself, row_ids=ids, labels_are_positives=True)
        found = torch.full((2, s.m), -1, dtype=torch.int64, device=x.device)
        s.run(HARDEST, col_max=rows.acc.square().sum(1), hardest=found)  # |x_j|^2 - 2 <x_i, x_j>
        return found
