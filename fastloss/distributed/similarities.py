"""The losses of a matrix of similarities of which each rank computes the rows that it holds, tile by tile.

`softmax` and `sigmoid` are to several processes what `SoftmaxOp` and `SigmoidOp` of `fastloss._ops` are to one:
marks and ids are those of all columns, what comes out and what goes in is of this rank's rows and columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._ops import autograd
from fastloss._ops.autograd import REDUCTIONS
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.similarity import SIGMOID, SOFTMAX_GRADIENT, Matrix, Rows
from fastloss.distributed.collectives import Ranks, check_once, in_order
from fastloss.distributed.exchange import Block, Gathered, Ring
from fastloss.losses.contrastive import contrastive_softmax as alone


def _operators() -> Any:
    return getattr(torch.ops, autograd._namespace)


def _matrix(
    x: Rows, block: Block, scale, bias, mark, row_ids, col_ids, flags, normalize, inverse=False
) -> Matrix:
    mark = None if mark is None else mark - block.columns.start  # elsewhere nothing is marked
    col_ids = None if col_ids is None else col_ids[block.columns]
    on_cpu = autograd.runs_on_cpu(block.y)
    return Matrix(
        _operators(), on_cpu, x, block.y, scale, bias, mark, row_ids, col_ids, flags, normalize, inverse
    )


def _merged(top: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Of several maxima and logs of sums relative to them, [parts, n], those of all parts together."""
    most = top.masked_fill(log_sum == -torch.inf, -torch.inf).amax(0)
    most = most.masked_fill(most == -torch.inf, 0.0)
    return most, ((top - most) + log_sum).logsumexp(0)


class _Sums:
    """What the blocks of a matrix add up: gradients of rows as the blocks come, numbers in the order of columns."""

    def __init__(self, blocks: int):
        self.dx: Tensor | None = None
        self.numbers: list[Any] = [None] * blocks

    def add(self, index: int, dx: Tensor | None, *numbers: Tensor) -> None:
        self.dx = dx if self.dx is None or dx is None else self.dx.add_(dx)
        self.numbers[index] = numbers

    def of_numbers(self) -> list[Tensor]:
        found = [n for n in self.numbers if n is not None]
        return [in_order(parts) for parts in zip(*found, strict=True)]


class _Softmax(Function):
    @staticmethod
    def forward(ctx, x, y, scale, base, mark, row_ids, col_ids, share, options, ranks, exchange):
        same, both, normalize, inverse, _, columns = options
        itself = y is None
        kept = exchange.kept(x if itself else y, ranks)
        if row_ids is not None:
            col_ids = ranks.gathered(row_ids if col_ids is None else col_ids)
        rows, parts = Rows(x, normalize), [None] * ranks.size
        for block in exchange(kept, ranks).blocks():
            s = _matrix(rows, block, scale, None, mark, row_ids, col_ids, (same, both), normalize, inverse)
            parts[block.index] = s.statistics(True, columns)
        of_rows, of_cols, positives = zip(*(p for p in parts if p is not None), strict=True)
        positive = in_order(positives)
        row_max, row_log_sum = _merged(*(torch.stack(t) for t in zip(*of_rows, strict=True)))
        row = row_max - (positive if share is None else positive * share)
        row = (row if base is None else row - base) + row_log_sum
        col = col_max = col_log_sum = row.new_empty(0)
        if columns:
            of_cols = torch.stack([torch.cat(t) for t in zip(*of_cols, strict=True)], 1)
            col_max, col_log_sum = _merged(*ranks.parts(of_cols).unbind(2))
            own = mark - ranks.begin
            col = (col_max[own] - positive) + col_log_sum[own]
        ctx.call = options, ranks, exchange, itself
        ctx.save_for_backward(
            x, kept, scale, mark, row_ids, col_ids, share, row_max, row_log_sum, col_max, col_log_sum
        )
        ctx.has_base = base is not None
        ctx.set_materialize_grads(False)
        return row, col, positive

    @staticmethod
    def backward(ctx, g_row, g_col, g_positive):
        check_once()
        (same, both, normalize, inverse, _, columns), ranks, exchange, itself = ctx.call
        x, kept, scale, mark, row_ids, col_ids, share, row_max, row_log_sum, *of_cols = ctx.saved_tensors
        zero = torch.zeros_like(row_max)
        g_row = zero if g_row is None else g_row.contiguous()
        up = (zero if g_positive is None else g_positive) - (g_row if share is None else g_row * share)
        if columns:
            g_col = zero if g_col is None else g_col
            up = up - g_col
            grad = torch.zeros_like(of_cols[0]).scatter_(0, mark - ranks.begin, g_col)
            of_cols = ranks.gathered(torch.stack([*of_cols, grad], 1)).t().contiguous()
        arrays = {"row_max": row_max, "row_log_sum": row_log_sum, "row_grad": g_row}
        arrays["positive_grad"] = up.contiguous()
        rows, others, sums = Rows(x, normalize), exchange(kept, ranks), _Sums(ranks.size)
        for block in others.blocks():
            if columns:
                here = of_cols[:, block.columns]
                arrays |= dict(zip(("col_max", "col_log_sum", "col_grad"), here, strict=True))
            s = _matrix(rows, block, scale, None, mark, row_ids, col_ids, (same, both), normalize, inverse)
            dx, dy, dscale = s.walk_wide(SOFTMAX_GRADIENT, True, **arrays)
            sums.add(block.index, dx, dscale)
            others.add(dy)
        dx, dy, (dscale,) = sums.dx, others.gradient(), sums.of_numbers()
        if itself:
            dx, dy = dx.add_(dy), None
        else:
            dy = Rows(exchange.own(kept, ranks), normalize).gradient(dy)
        return rows.gradient(dx), dy, dscale, -g_row if ctx.has_base else None, *[None] * 7


class _Sigmoid(Function):
    """As an operator it makes the gradients of a loss that is one number in forward, in the one walk."""

    @staticmethod
    def forward(ctx, x, y, scale, bias, mark, weight, weights, options, rows, ranks, exchange, gradient):
        reduction, normalize, dtype = options
        kept = exchange.kept(y, ranks)
        ctx.call = reduction, normalize, ranks, exchange
        ctx.ready = bool(reduction) and gradient
        tensors = x, kept, scale, bias, mark
        norm = row_grad = None
        high = accumulation_dtype(x.dtype)
        if reduction == REDUCTIONS["mean"]:
            norm = x.new_full((), rows.total, dtype=high)
            norm = norm if weights is None else _operators().row_reduce(weights, None)
        if ctx.ready:
            row_grad = x.new_ones(x.shape[0], dtype=high) if weight is None else weight
            row_grad = row_grad if norm is None else row_grad / norm
        value, grads = _Sigmoid.walk(ctx, tensors, row_grad)
        loss = value
        if reduction:
            loss = rows.gathered(value)
            loss = loss if weights is None else loss * weights
            loss = _operators().row_reduce(loss, norm)
        if ctx.ready:
            dweight = None if weight is None else value if norm is None else (value - loss) / norm
            grads = *grads, dweight
        ctx.save_for_backward(*tensors, *(grads or ()))
        return loss.to(dtype)

    @staticmethod
    def walk(ctx, tensors, row_grad):
        """The rows' losses, and with `row_grad` the gradients, in the accumulation type."""
        _, normalize, ranks, exchange = ctx.call
        x, kept, scale, bias, mark = tensors
        rows, others, sums = Rows(x, normalize), exchange(kept, ranks), _Sums(ranks.size)
        for block in others.blocks():
            s = _matrix(rows, block, scale, bias, mark, None, None, (False, False), normalize)
            value, slope = (torch.zeros_like(s.x.wide.new_empty(s.m)) for _ in range(2))
            arrays = {"positive": value, "row_log_sum": slope, "row_grad": row_grad}
            found = s.walk_wide(SIGMOID, row_grad is not None, **arrays)
            if found:
                sums.add(block.index, found[0], value, slope, found[2])
                others.add(found[1])
            else:
                sums.add(block.index, None, value)
        value, *rest = sums.of_numbers()
        if row_grad is None:
            return value, None
        slope, dscale = rest
        dbias = None
        if bias is not None:
            dbias = _operators().row_reduce(slope * row_grad, None).reshape(bias.shape)
        mine = Rows(exchange.own(kept, ranks), normalize)
        rows.dtype = mine.dtype = rows.wide.dtype
        return value, (rows.gradient(sums.dx), mine.gradient(others.gradient()), dscale, dbias)

    @staticmethod
    def backward(ctx, grad):
        check_once()
        tensors, ready = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        x, kept, *_ = tensors
        grad = grad.to(accumulation_dtype(x.dtype))
        if not ctx.ready:
            _, ready = _Sigmoid.walk(ctx, tensors, grad.contiguous())
            ready, grad = (*ready, None), torch.ones_like(grad.sum())
        dx, dy, dscale, dbias, dweight = (None if d is None else d * grad for d in ready)
        return dx.to(x.dtype), dy.to(kept.dtype), dscale, dbias, None, dweight, *[None] * 6


def softmax(tensors, options, ranks: Ranks, exchange: type[Gathered | Ring]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and positives: tensors and options as of `SoftmaxOp`, `rows` being always wanted."""
    if ranks.size == 1:
        return alone(tensors, options)
    return _Softmax.apply(*tensors, options, ranks, exchange)


def sigmoid(tensors, options, rows: Ranks, ranks: Ranks, exchange: type[Gathered | Ring]) -> Tensor:
    """The loss of the rows, or of all ranks' rows.

    Tensors `(x, y, scale, bias, mark, weight, weights)`, the weights of this rank's rows and of all, for a loss that
    is one number: in the accumulation type, the latter not differentiated. Options `reduction, normalize, dtype`.
    """
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _Sigmoid.apply(*tensors, options, rows, ranks, exchange, gradient)
