"""The operators of each driver of csrc: what they take, what they give, and what they save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss._ops.autograd import REDUCTIONS, FusedOp, needs_grad_mask
from fastloss._ops.dtypes import accumulation_dtype


class RowOp(FusedOp):
    """A loss of rows of logits: tensors `(input, target, weight, row_weight)`, one output.

    `options` are `ignore_index, reduction, logit_scale, softcap, numbers, wide`, as in the operator's schema;
    `saved` is how many numbers a row saves beside its statistics.
    """

    backward_options = slice(2, 5)
    saved = 1
    reduction = 1

    def __init__(self, name: str, reference: Callable[..., Tensor], saved: int):
        width = 3 + saved

        def fake(input, target, weight, row_weight, index, reduction, scale, cap, numbers, wide, gradient):
            rows = list(input.shape[:1] + input.shape[2:]) if input.dim() > 1 else []
            high = accumulation_dtype(input.dtype)
            shape = rows if reduction == REDUCTIONS["none"] else []
            loss = input.new_empty(shape, dtype=high if wide else input.dtype)
            count = 1
            for size in rows:
                count = count * size
            state = input.new_empty([count, width], dtype=high)
            return loss, state, torch.empty_like(input) if gradient else input.new_empty([0])

        super().__init__(name, reference, fake, tensors=4)

    def plan(self, operators, tensors, options, inplace_backward: bool = False):
        plan = super().plan(operators, tensors, options)
        plan.inplace = inplace_backward
        plan.fuse = plan.fuse and not inplace_backward
        return plan

    def run_backward(self, plan, grads, tensors, saved, options):
        if not plan.inplace:
            return super().run_backward(plan, grads, tensors, saved, options)
        dx = tensors[0].detach()
        plan.operators.into(*grads, dx, *tensors, *saved, *options[self.backward_options], False)
        torch.autograd.graph.increment_version(tensors[0])
        return [dx]

    def differentiable_again(self, plan):
        if plan.inplace:
            raise RuntimeError("inplace_backward=True: the gradient cannot be differentiated again")


class NumberOp(FusedOp):
    """A row loss with a term for numbers: `(input, target, ids, table, worst, position, number_weight)`, one output.

    `options` are `ignore_index, reduction, numbers, wide`, as in the operator's schema.
    """

    backward_options = slice(2, 3)
    saved = 1
    reduction = 1

    def __init__(self, name: str, reference: Callable[..., Tensor], saved: int):
        def fake(input, target, *rest):
            reduction, wide, gradient = rest[6], *rest[-2:]
            high = accumulation_dtype(input.dtype)
            shape = target.shape if reduction == REDUCTIONS["none"] else []
            loss = input.new_empty(shape, dtype=high if wide else input.dtype)
            state = input.new_empty([target.numel(), 3 + saved], dtype=high)
            return loss, state, torch.empty_like(input) if gradient else input.new_empty([0])

        super().__init__(name, reference, fake, tensors=7)


class DivergenceOp(FusedOp):
    """A divergence of two tensors of logits: tensors `(student, teacher, row_weight)`, one output.

    `options` are `reduction, logit_scale, beta`; the reference takes the tensors and these.
    """

    backward_options = slice(1, 4)
    saved = 1
    reduction = 0

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        def fake(student, teacher, row_weight, reduction, scale, beta, wanted, gradient):
            high = accumulation_dtype(student.dtype)
            rows = [] if reduction != REDUCTIONS["none"] else student.shape[:-1]
            count = 1
            for size in student.shape[:-1]:
                count = count * size
            loss, state = student.new_empty(rows, dtype=high), student.new_empty([count, 7], dtype=high)
            return loss, state, *self._empty_gradients(student, wanted if gradient else 0)

        super().__init__(name, lambda *args: reference(*args[:-1]), fake, tensors=3, wrt=(0, 1))

    def _empty_gradients(self, student: Tensor, wanted: int) -> list[Tensor]:
        return [student.new_empty(student.shape if wanted >> i & 1 else [0]) for i in self.wrt]

    def fake_backward(self, *args):
        return tuple(self._empty_gradients(args[1], args[-1]))

    def __call__(self, tensors, options) -> Tensor:
        return super().__call__(tensors, (*options, needs_grad_mask(self, tensors)))
