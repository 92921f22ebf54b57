"""The operator of elementwise losses, and how a family makes and calls one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS, FusedOp, needs_grad_mask
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32

NO_INDEX = -(2**63)  # the operators take the number of classes for it


class ElementOp(FusedOp):
    """An elementwise loss: `inputs` tensors of one shape, then `weight` of that shape and `norm`, one number.

    An int64 tensor among the inputs holds classes and stands for their one-hot encoding along a last dimension.
    What is broadcast comes expanded; it is read where it lies. A weight of 0 leaves an element out; a reduced
    loss is divided by `norm`. `wrt` must name the inputs that the struct in C++ differentiates.

    `options` are `reduction, numbers, ignore_index, background_index, wide`; `numbers` are the struct's. The
    reference takes the tensors and these.
    """

    saved = 0
    reduction = 0

    def __init__(self, name: str, reference: Callable[..., Tensor], inputs: int, wrt: Sequence[int]):
        def fake(*args):
            input, reduction, wide, wanted, gradient = args[0], args[inputs + 2], *args[-3:]
            shape = input.shape if reduction == REDUCTIONS["none"] else []
            high = accumulation_dtype(input.dtype)
            loss = input.new_empty(shape, dtype=high if wide else input.dtype)
            return loss, *self._empty_gradients(input, wanted if gradient else 0)

        def for_inputs(*args):
            return reference(*args[:-1])  # without `wanted`

        super().__init__(name, for_inputs, fake, tensors=inputs + 2, wrt=wrt)

    def _empty_gradients(self, input: Tensor, wanted: int) -> list[Tensor]:
        return [input.new_empty(input.shape if wanted >> i & 1 else [0]) for i in self.wrt]

    def fake_backward(self, *args):
        grads = self._empty_gradients(args[1], args[-1])
        return grads[0] if len(grads) == 1 else tuple(grads)

    def __call__(self, tensors, options) -> Tensor:
        return super().__call__(tensors, (*options, needs_grad_mask(self, tensors)))


def element_reference(formula: Callable[..., Tensor], inputs: int) -> Callable[..., Tensor]:
    """The reference of an `ElementOp` from the loss of one element, `formula(*inputs, *numbers)`."""

    def whole(*args):
        tensors, (weight, norm, reduction, numbers, ignore_index, _, wide) = args[:inputs], args[inputs:]
        shape, first = tensors[0].shape, tensors[0]
        counted = None
        columns = []
        for t in tensors:
            if t.dtype == torch.int64:
                counted = (t != ignore_index).unsqueeze(-1).expand(shape)
                t = (t.unsqueeze(-1) == torch.arange(shape[-1], device=t.device)).to(first.dtype)
            columns.append(t)
        loss = formula(*columns, *numbers)
        if weight is not None:
            loss = torch.where(weight != 0, weight * loss, 0.0)
        elif counted is not None:
            loss = torch.where(counted, loss, 0.0)
        if reduction != REDUCTIONS["none"]:
            loss = loss.mean() if reduction == REDUCTIONS["mean"] else loss.sum()
        if norm is not None:
            loss = loss / norm.reshape(()).to(loss.dtype)
        return loss.float() if wide and loss.dtype in HALF_TYPES else loss

    return whole


def element_op(name: str, formula: Callable[..., Tensor], inputs: int = 2, wrt=(0, 1)) -> ElementOp:
    return ElementOp(name, element_reference(formula, inputs), inputs, wrt)


def zeros_like(x: Tensor) -> Tensor:
    """One zero that every element reads."""
    return x.new_zeros(()).expand(x.shape)


def call_elementwise(op, inputs, numbers, mode, weight=None) -> Tensor:
    return op((*inputs, weight, None), (mode, numbers, -100, 0, autocast_to_fp32(inputs[0])))
