"""Losses of a similarity matrix of which each rank computes its own rows, tile by tile.

`softmax` and `sigmoid` are the distributed versions of `SoftmaxOp` and `SigmoidOp` of `fastloss._ops` and run the same
passes over one or more blocks of the matrix. Target columns and ids refer to the columns of all ranks; inputs and
results are those of this rank's rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastloss._ops.autograd import REDUCTIONS, Differentiable
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.precomputed import Precomputed
from fastloss._ops.similarity import (
    Features,
    SoftmaxAttrs,
    SoftmaxInputs,
    SoftmaxOutputs,
    SoftmaxState,
    softmax_backward,
    softmax_forward,
)
from fastloss._ops.similarity_losses import sigmoid_pass
from fastloss.distributed.collectives import Ranks, check_once
from fastloss.distributed.exchange import Exchange
from fastloss.losses.contrastive import contrastive_softmax


class _Softmax(Differentiable):
    """The distributed `SoftmaxOp`; its options are those of `SoftmaxOp`, the ranks, and the exchange of columns."""

    def __init__(self):
        super().__init__(contrastive_softmax.name, tensors=8, wrt=(0, 1, 2, 3), outputs=3)

    def run_forward(self, plan, tensors, options):
        inputs, (*attrs, ranks, exchange) = SoftmaxInputs(*tensors), options
        attrs = SoftmaxAttrs(*attrs)
        x, y = inputs.x, inputs.y
        gathered = exchange.gather(x if y is None else y, ranks)
        inputs, ids = self._with_ids_of_all(inputs, ranks)
        rows, columns = Features(x, attrs.normalize), exchange(x, y, gathered, ranks, attrs.normalize)
        found = softmax_forward(plan.operators.all, inputs, attrs, rows, columns)
        return *found, gathered, *ids

    @staticmethod
    def _with_ids_of_all(inputs: SoftmaxInputs, ranks: Ranks) -> tuple[SoftmaxInputs, list[Tensor]]:
        if inputs.row_ids is None:
            return inputs, []
        ids = ranks.gathered(inputs.row_ids if inputs.col_ids is None else inputs.col_ids)
        return inputs._replace(col_ids=ids), [ids.clone() if ids is inputs.row_ids else ids]

    def run_backward(self, plan, grads, tensors, saved, options):
        inputs, (*attrs, ranks, exchange) = SoftmaxInputs(*tensors), options
        attrs, grads = SoftmaxAttrs(*attrs), SoftmaxOutputs(*grads)
        *state, gathered = saved[:5]
        if inputs.row_ids is not None:
            inputs = inputs._replace(col_ids=saved[5])
        if attrs.columns and grads.col is None:  # other ranks may have one: all take part
            grads = grads._replace(col=torch.zeros_like(state[0]))
        rows = Features(inputs.x, attrs.normalize)
        columns = exchange(inputs.x, inputs.y, gathered, ranks, attrs.normalize)
        return softmax_backward(plan.operators.all, grads, inputs, SoftmaxState(*state), attrs, rows, columns)

    def differentiable_again(self, plan):
        check_once()


class SigmoidInputs(NamedTuple):
    x: Tensor  # [m, features], of this rank
    y: Tensor  # [n, features], of this rank
    scale: Tensor  # one element
    bias: Tensor | None  # one element
    target_col: Tensor | None  # [m] int64, among the columns of all
    weight: Tensor | None  # [m], of this rank's rows
    weight_of_all: Tensor | None  # [rows of all ranks], not differentiated


class SigmoidOptions(NamedTuple):
    reduction: int
    normalize: bool
    out_dtype: torch.dtype
    rows: Ranks
    columns: Ranks
    exchange: type[Exchange]


class _Sigmoid(Precomputed):
    """The distributed `SigmoidOp`: a reduced loss covers all ranks' rows; weights come in the accumulation dtype."""

    reduction, row_weight = 0, 5

    def __init__(self):
        super().__init__("contrastive_sigmoid", tensors=7, wrt=(0, 1, 2, 3, 5))

    def evaluate(self, operators, tensors, options, mask):
        inputs, options = SigmoidInputs(*tensors), SigmoidOptions(*options)
        acc_dtype = accumulation_dtype(inputs.x.dtype)
        norm = row_grad = None
        if options.reduction == REDUCTIONS["mean"]:
            norm = inputs.x.new_full((), options.rows.total, dtype=acc_dtype)
            if inputs.weight_of_all is not None:
                norm = operators.all.row_reduce(inputs.weight_of_all, None)
        if mask:
            row_grad = inputs.weight
            if row_grad is None:
                row_grad = inputs.x.new_ones(inputs.x.shape[0], dtype=acc_dtype)
            row_grad = row_grad if norm is None else row_grad / norm
        value, grads = self._pass(operators, inputs, options, row_grad)
        loss = value
        if options.reduction:
            loss = options.rows.gathered(value)
            loss = loss if inputs.weight_of_all is None else loss * inputs.weight_of_all
            loss = operators.all.row_reduce(loss, norm)
        if mask and inputs.weight is not None:
            grads = *grads, value if norm is None else (value - loss) / norm
        empty = value.new_empty(0)
        return loss.to(options.out_dtype), *self._of_mask(grads, mask, empty)

    def evaluate_again(self, operators, tensors, options, mask):
        if options[self.reduction] == REDUCTIONS["mean"] or tensors[6] is not None:
            return super().evaluate_again(operators, tensors, options, mask)
        # only the gradients, for which no rank needs the loss of the others
        inputs, options = SigmoidInputs(*tensors), SigmoidOptions(*options)
        row_grad = inputs.weight
        if row_grad is None:
            row_grad = inputs.x.new_ones(inputs.x.shape[0], dtype=accumulation_dtype(inputs.x.dtype))
        value, grads = self._pass(operators, inputs, options, row_grad.contiguous())
        return self._of_mask(grads, mask, value.new_empty(0))

    @staticmethod
    def _pass(operators, inputs: SigmoidInputs, options: SigmoidOptions, row_grad: Tensor | None):
        gathered = options.exchange.gather(inputs.y, options.columns)
        columns = options.exchange(inputs.x, inputs.y, gathered, options.columns, options.normalize)
        rows = Features(inputs.x, options.normalize)
        return sigmoid_pass(operators.all, inputs, row_grad, rows, columns)

    def _of_mask(self, grads, mask: int, empty: Tensor) -> list[Tensor]:
        grads = [*grads, *([None] * (len(self.wrt) - len(grads)))]
        return [d if mask >> i & 1 else empty for d, i in zip(grads, self.wrt, strict=True)]

    def differentiable_again(self, plan):
        check_once()


_softmax, _sigmoid = _Softmax(), _Sigmoid()


def softmax(
    inputs: SoftmaxInputs, attrs: SoftmaxAttrs, ranks: Ranks, exchange: type[Exchange]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of `SoftmaxOp`: of rows, of columns, and positives."""
    if ranks.size == 1:
        return contrastive_softmax(inputs, attrs)
    return _softmax(inputs, (*attrs, ranks, exchange))


def sigmoid(inputs: SigmoidInputs, options: SigmoidOptions) -> Tensor:
    """Return the losses of this rank's rows, or the reduced loss over all ranks' rows."""
    return _sigmoid(inputs, options)
