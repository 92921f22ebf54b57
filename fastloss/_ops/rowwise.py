"""The operators of each driver of csrc: their inputs, outputs and saved state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss._ops import abi
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS, FusedOp, contiguous_like
from fastloss._ops.dtypes import accumulation_dtype


def state_width(name: str) -> int:
    """Return how many numbers of a row backward needs: its statistics, its weight and what the loss saves."""
    return abi.constant("state_head") + abi.fact(name, "saved")


def like_rows(x: Tensor) -> Tensor:
    """Return an empty gradient of logits (N, C, d1, ...), with the strides of `row_layout` in csrc/ops/row_ops.h."""
    inner, stride = 1, None
    for d in range(x.dim() - 1, 1, -1):
        if x.shape[d] == 1:
            continue
        if stride is None:
            stride = x.stride(d)
        elif x.stride(d) != stride * inner:
            return contiguous_like(x)
        inner = inner * x.shape[d]
    return torch.empty_like(x)


def like_last_rows(x: Tensor) -> Tensor:
    """Return an empty gradient of logits (..., C), with the strides of `row_layout_last` in csrc/ops/row_ops.h."""
    inner, stride, levels = 1, 0, 0
    for d in range(x.dim() - 2, -1, -1):
        if x.shape[d] == 1:
            continue
        if inner != 1 and x.stride(d) != stride * inner:
            levels, inner = levels + 1, 1
            if levels > 1:
                return contiguous_like(x)
        if inner == 1:
            stride = x.stride(d)
        inner = inner * x.shape[d]
    return torch.empty_like(x)


class RowOp(FusedOp):
    """A loss of rows of logits: tensors `(input, target, weight, row_weight)`, one output.

    `options` are `ignore_index, reduction, logit_scale, softcap, hparams, out_fp32`, as in the operator's schema, with
    `hparams` from `pack`. The reference takes `input, target` and by name
    `weight, sample_weight, ignore_index, reduction, logit_scale, softcap` and the hyperparameters.
    """

    backward_options = slice(2, 5)
    saved = 1
    reduction = 1

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        self.hparams = abi.hparams(name)
        self.hparams.check_taken_by(reference)
        self.pack = self.hparams.pack
        width = state_width(name)

        def by_name(input, target, weight, row_weight, index, reduction, scale, cap, hparams, out_fp32):
            loss = reference(
                input, target, weight=weight, sample_weight=row_weight, ignore_index=index,
                reduction=list(REDUCTIONS)[reduction], logit_scale=scale, softcap=cap, **self.hparams.unpack(hparams),
            )  # fmt: skip
            return loss.float() if out_fp32 and loss.dtype in HALF_TYPES else loss

        def fake(
            input, target, weight, row_weight, index, reduction, scale, cap, hparams, out_fp32, gradient
        ):
            rows = list(input.shape[:1] + input.shape[2:]) if input.dim() > 1 else []
            acc_dtype = accumulation_dtype(input.dtype)
            shape = rows if reduction == REDUCTIONS["none"] else []
            loss = input.new_empty(shape, dtype=acc_dtype if out_fp32 else input.dtype)
            count = 1
            for size in rows:
                count = count * size
            state = input.new_empty([count, width], dtype=acc_dtype)
            return loss, state, like_rows(input) if gradient else input.new_empty([0])

        super().__init__(name, by_name, fake, tensors=4, gradient_like=like_rows)

    def plan(self, operators, tensors, options, needed, inplace_backward: bool = False):
        plan = super().plan(operators, tensors, options, needed)
        if inplace_backward and needed & 1:
            _check_overwritable(tensors[0])
            plan.fuse, plan.inplace = False, [tensors[0].dtype]
        return plan

    def _dispatched(self, tensors, options, inplace_backward: bool = False):
        if inplace_backward:
            raise RuntimeError(
                "inplace_backward=True: only in plain eager code, without torch.compile, torch.func, forward-mode "
                "differentiation, modes or tensor subclasses"
            )
        return super()._dispatched(tensors, options)

    def run_backward(self, plan, grads, tensors, saved, options):
        if plan.inplace is None:
            return super().run_backward(plan, grads, tensors, saved, options)
        try:
            plan.inplace.pop()  # of two threads one gets it
        except IndexError:
            raise RuntimeError(
                "inplace_backward=True: a second backward through the overwritten input"
            ) from None
        dx = tensors[0].detach()
        plan.operators.into(*grads, dx, *tensors, *saved, *options[self.backward_options], False)
        torch.autograd.graph.increment_version(tensors[0])
        return [dx]

    def differentiable_again(self, plan):
        if plan.inplace is not None:
            raise RuntimeError(
                "inplace_backward=True: the gradient cannot be differentiated again, nor batched, nor taken from "
                "tensor subclasses or in modes"
            )


def _check_overwritable(x: Tensor) -> None:
    """Raise if a gradient written into the memory of `x` would overwrite what is needed, or itself."""
    for t in (x, x._base):
        if t is not None and t.is_leaf and t.requires_grad:
            raise RuntimeError(
                "inplace_backward=True: input is, or is a view of, a leaf that requires a gradient, and whose value "
                "would be lost; expected the result of an operation"
            )
    span = 1
    for stride, size in sorted((t, n) for t, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride < span:
            raise RuntimeError(
                f"inplace_backward=True: input: expected elements that share no memory, got shape {tuple(x.shape)} "
                f"with strides {x.stride()}"
            )
        span += stride * (size - 1)


class NumberOp(FusedOp):
    """A row loss with a term for number tokens, one output.

    The tensors are `(input, target, ids, table, max_distance, position, number_weight)`, the options
    `ignore_index, reduction, hparams, out_fp32`, as in the operator's schema; the reference takes the tensors, and by
    name the first two and the hyperparameters.
    """

    backward_options = slice(2, 3)
    saved = 1
    reduction = 1

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        self.hparams = abi.hparams(name)
        self.hparams.check_taken_by(reference)
        self.pack = self.hparams.pack
        width = state_width(name)

        def by_name(*args):
            tensors, (index, reduction, hparams, out_fp32) = args[:7], args[7:]
            loss = reference(
                *tensors, ignore_index=index, reduction=list(REDUCTIONS)[reduction],
                **self.hparams.unpack(hparams),
            )  # fmt: skip
            return loss if out_fp32 else loss.to(tensors[0].dtype)

        def fake(input, target, *args):
            reduction, out_fp32, gradient = args[6], *args[-2:]
            acc_dtype = accumulation_dtype(input.dtype)
            shape = target.shape if reduction == REDUCTIONS["none"] else []
            loss = input.new_empty(shape, dtype=acc_dtype if out_fp32 else input.dtype)
            state = input.new_empty([target.numel(), width], dtype=acc_dtype)
            return loss, state, like_rows(input) if gradient else input.new_empty([0])

        super().__init__(name, by_name, fake, tensors=7, gradient_like=like_rows)


class DivergenceOp(FusedOp):
    """A divergence of two tensors of logits: tensors `(student, teacher, row_weight)`, one output.

    `options` are `reduction, logit_scale, beta`; the reference takes the tensors and these.
    """

    backward_options = slice(1, 4)
    saved = 1
    reduction = 0
    masked = True

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        width = abi.constant("divergence_state")

        def fake(student, teacher, row_weight, reduction, scale, beta, mask, gradient):
            acc_dtype = accumulation_dtype(student.dtype)
            rows = [] if reduction != REDUCTIONS["none"] else student.shape[:-1]
            count = 1
            for size in student.shape[:-1]:
                count = count * size
            loss = student.new_empty(rows, dtype=acc_dtype)
            state = student.new_empty([count, width], dtype=acc_dtype)
            return loss, state, *self._empty_gradients(student, mask if gradient else 0)

        super().__init__(name, lambda *args: reference(*args[:-1]), fake, tensors=3, wrt=(0, 1))

    def _empty_gradients(self, student: Tensor, mask: int) -> list[Tensor]:
        return [student.new_empty(student.shape if mask >> i & 1 else [0]) for i in self.wrt]

    def fake_backward(self, *args):
        return tuple(self._empty_gradients(args[1], args[-1]))
