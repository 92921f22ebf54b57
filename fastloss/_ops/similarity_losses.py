"""Operators over a matrix of similarities beside the softmax: pairs, decisions, extremes. See similarity.py."""

from __future__ import annotations

from typing import ClassVar

import torch

from fastloss._ops.autograd import REDUCTIONS, Plan, _functorch_active, _requires_grad
from fastloss._ops.chunked_linear import scaled
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.similarity import HARDEST, PAIRS, PAIRS_GRADIENT, SIGMOID, STATISTICS, Matrix, TileOp


class PairsOp(TileOp):
    """Of each row the sum over its positives p of log(1 + sum over its negatives j of exp(s_j - s_p)).

    Tensors `(x, y, scale, mark, row_ids, col_ids)`; options `normalize, inverse`.
    """

    _TENSORS = "Tensor x, Tensor? y, Tensor scale, Tensor? mark, Tensor row_ids, Tensor? col_ids, "
    _STATE = "Tensor row_max, Tensor row_log_sum, Tensor slope"
    schemas: ClassVar = {
        "fwd": f"({_TENSORS}bool normalize, bool inverse, int wanted) -> (Tensor value, {_STATE})",
        "bwd": f"(Tensor grad, {_TENSORS}{_STATE}, bool normalize, bool inverse, int wanted) "
        "-> (Tensor dx, Tensor dy, Tensor dscale)",
    }

    def __init__(self, name: str, reference):
        super().__init__(name, reference, tensors=6, wrt=(0, 1, 2), outputs=1)

    def shapes(self, x, *_):
        return tuple(x.new_empty([x.shape[0]], dtype=accumulation_dtype(x.dtype)) for _ in range(4))

    def forward(self, operators, on_cpu, x, y, scale, mark, row_ids, col_ids, normalize, inverse, _):
        s = Matrix(
            operators, on_cpu, x, y, scale, None, mark, row_ids, col_ids, (True, False), normalize, inverse
        )
        m, log_sum, value, slope = (torch.zeros_like(s.x.wide.new_empty(s.m)) for _ in range(4))
        s.walk(STATISTICS, row_max=m, row_log_sum=log_sum)
        s.walk(PAIRS, row_max=m, row_log_sum=log_sum, positive=value, row_grad=slope)
        return value, m, log_sum, slope

    def backward(
        self,
        operators,
        on_cpu,
        grad,
        x,
        y,
        scale,
        mark,
        row_ids,
        col_ids,
        m,
        log_sum,
        slope,
        normalize,
        inverse,
        _,
    ):
        s = Matrix(
            operators, on_cpu, x, y, scale, None, mark, row_ids, col_ids, (True, False), normalize, inverse
        )
        arrays = {"row_max": m, "row_log_sum": log_sum}
        up = {"row_grad": grad * slope, "positive_grad": grad.contiguous()}
        dx, dy, dscale = s.walk(PAIRS_GRADIENT, True, **arrays, **up)
        return dx, dy, dscale.to(scale.dtype)


class SigmoidOp(TileOp):
    """Sum of softplus(-z s) over a row, z = 1 at the marked entry and -1 at the others, then over rows.

    Tensors `(x, y, scale, bias, mark, row_ids, col_ids, weight)`, of which the first four are differentiated;
    options `reduction, normalize, wide`. Where the loss is one number, forward also makes the gradients, in the
    same pass, and the first backward multiplies them by its upstream gradient.
    """

    _TENSORS = (
        "Tensor x, Tensor? y, Tensor scale, Tensor? bias, Tensor? mark, Tensor? row_ids, Tensor? col_ids, "
        "Tensor? weight, "
    )
    schemas: ClassVar = {
        "fwd": f"({_TENSORS}int reduction, bool normalize, bool wide, int wanted, bool with_gradient) "
        "-> (Tensor loss, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
        "bwd": f"(Tensor grad, {_TENSORS}int reduction, bool normalize, bool wide, int wanted) "
        "-> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    }
    traced_extra = (False,)
    saved = 0

    def __init__(self, name: str, reference):
        super().__init__(name, reference, tensors=8, wrt=(0, 1, 2, 3), outputs=1)

    def shapes(
        self, x, y, scale, bias, mark, row_ids, col_ids, weight, reduction, normalize, wide, wanted, gradient
    ):
        high = accumulation_dtype(x.dtype)
        loss = x.new_empty([] if reduction else x.shape[:1], dtype=high if wide else x.dtype)
        shapes = [t.shape if gradient and t is not None else [0] for t in (x, y, scale, bias)]
        return loss, *(x.new_empty(shape, dtype=high) for shape in shapes)

    def forward(
        self, operators, on_cpu, x, y, scale, bias, mark, row_ids, col_ids, weight, reduction, normalize, wide,
        wanted, gradient,
    ):  # fmt: skip
        high = accumulation_dtype(x.dtype)
        s = Matrix(operators, on_cpu, x, y, scale, bias, mark, row_ids, col_ids, (False, False), normalize)
        s.x.dtype = s.y.dtype = high
        value, slope = (torch.zeros_like(s.x.wide.new_empty(s.m)) for _ in range(2))
        norm = None
        if reduction == REDUCTIONS["mean"]:
            norm = value.new_full((), s.m) if weight is None else operators.row_reduce(weight.to(high), None)
        row_grad = None
        if gradient:
            row_grad = torch.ones_like(value) if weight is None else weight.to(high)
            row_grad = (row_grad if norm is None else row_grad / norm).contiguous()
        grads = s.walk(SIGMOID, gradient, positive=value, row_log_sum=slope, row_grad=row_grad)
        loss = value if weight is None else value * weight.to(high)
        loss = operators.row_reduce(loss, norm) if reduction else loss
        loss = loss if wide else loss.to(x.dtype)
        if not gradient:
            return loss, *(value.new_empty(0) for _ in range(4))
        dx, dy, dscale = grads
        dbias = value.new_empty(0)
        if bias is not None:
            dbias = operators.row_reduce(slope * row_grad, None).reshape(bias.shape)
        return loss, dx, dy.to(high), dscale, dbias

    def plan(self, operators, tensors, options):
        plan = Plan(operators)
        plan.fuse = options[0] != 0 and not _functorch_active() and _requires_grad(tensors[:4])
        return plan

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options, plan.fuse)

    def keep(self, plan, saved):
        plan.ready = list(saved) if plan.fuse else None
        return []

    def run_backward(self, plan, grads, tensors, saved, options):
        ready, plan.ready = plan.ready, None
        if ready is None:
            return list(plan.operators.bwd(*grads, *tensors, *options))
        return self._scaled(plan.operators.all, ready, grads[0].to(ready[0].dtype), tensors)

    @staticmethod
    def _scaled(operators, ready, grad, tensors):
        own, empty = not _functorch_active(), tensors[0].new_empty
        sides = (
            empty(0) if x is None else scaled(operators, d, grad, x, own)
            for d, x in zip(ready[:2], tensors[:2], strict=True)
        )
        numbers = (
            empty(0) if x is None else (d * grad).to(x.dtype)
            for d, x in zip(ready[2:], tensors[2:4], strict=True)
        )
        return [*sides, *numbers]

    def backward(self, operators, on_cpu, grad, *args):
        tensors, (reduction, normalize, wide, wanted) = args[:8], args[8:]
        high = accumulation_dtype(tensors[0].dtype)
        grad = grad.to(high)
        if reduction == REDUCTIONS["none"]:
            weight = tensors[7]
            tensors = (*tensors[:7], grad if weight is None else weight.to(high) * grad)
            reduction, grad = REDUCTIONS["sum"], torch.ones_like(grad.sum())
        _, *ready = self.forward(operators, on_cpu, *tensors, reduction, normalize, wide, wanted, True)
        return tuple(self._scaled(operators, ready, grad, tensors))


class HardestOp(TileOp):
    """Of each row x_i the farthest row with its id and the nearest with another: their indices, [2, m], or -1."""

    schemas: ClassVar = {"fwd": "(Tensor x, Tensor ids, int wanted) -> Tensor"}

    def __init__(self, name: str):
        super().__init__(name, None, tensors=2, wrt=(), outputs=1)

    def shapes(self, x, ids, _):
        return x.new_empty([2, x.shape[0]], dtype=torch.int64)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.operators().fwd(x, ids, 0)  # nothing to differentiate

    def forward(self, operators, on_cpu, x, ids, _):
        scale = x.new_full((), -2, dtype=accumulation_dtype(x.dtype))
        mark = torch.arange(x.shape[0], device=x.device)
        s = Matrix(operators, on_cpu, x, None, scale, None, mark, ids, None, (True, False), False)
        found = torch.full((2, s.m), -1, dtype=torch.int64, device=x.device)
        s.walk(HARDEST, col_max=s.x.wide.square().sum(1), hardest=found)  # |x_j|^2 - 2 <x_i, x_j>
        return found
