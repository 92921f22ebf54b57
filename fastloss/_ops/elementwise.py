"""The operator of elementwise losses, and helpers to call it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss._ops import abi
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS, FusedOp
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32

NO_INDEX = abi.constant("default_background")  # the operators take the number of classes for it


class ElementOp(FusedOp):
    """An elementwise loss: its inputs, tensors of one shape, then `weight` of that shape and `norm`, a scalar.

    An int64 tensor among the inputs holds classes and stands for their one-hot encoding along a last dimension.
    Broadcast tensors come expanded and are not copied. A weight of 0 leaves an element out; a reduced loss is divided
    by `norm`.

    At `harmless` the formula has finite derivatives: its inputs where an element is left out.

    `options` are `reduction, hparams, ignore_index, background_index, out_fp32`, with `hparams` from `pack`. `formula`,
    the reference of one element's loss, takes the inputs, and by name the hyperparameters.
    """

    saved = 0
    reduction = 0
    masked = True

    def __init__(self, name: str, formula: Callable[..., Tensor], harmless: float = -0.5):
        inputs = abi.fact(name, "inputs")
        self.hparams = abi.hparams(name)
        self.hparams.check_taken_by(formula, after=inputs)
        self.pack = self.hparams.pack
        reference = _whole(formula, inputs, self.hparams, harmless)

        def fake(*args):
            input, reduction, out_fp32, mask, gradient = args[0], args[inputs + 2], *args[-3:]
            shape = input.shape if reduction == REDUCTIONS["none"] else []
            acc_dtype = accumulation_dtype(input.dtype)
            loss = input.new_empty(shape, dtype=acc_dtype if out_fp32 else input.dtype)
            return loss, *self._empty_gradients(input, mask if gradient else 0)

        def for_inputs(*args):
            return reference(*args[:-1])  # without `needs_grad_mask`

        super().__init__(name, for_inputs, fake, tensors=inputs + 2, wrt=abi.fact(name, "wrt"))

    def _empty_gradients(self, input: Tensor, mask: int) -> list[Tensor]:
        return [input.new_empty(input.shape if mask >> i & 1 else [0]) for i in self.wrt]

    def fake_backward(self, *args):
        grads = self._empty_gradients(args[1], args[-1])
        return grads[0] if len(grads) == 1 else tuple(grads)


def _whole(
    formula: Callable[..., Tensor], inputs: int, named: abi.Hparams, harmless: float
) -> Callable[..., Tensor]:
    """Return the reference of an `ElementOp` from that of one element."""

    def whole(*args):
        tensors, options = args[:inputs], args[inputs:]
        weight, norm, reduction, hparams, ignore_index, background_index, out_fp32 = options
        shape, first = tensors[0].shape, tensors[0]
        counted = None
        columns = []
        for t in tensors:
            if t.dtype == torch.int64:
                counted = (t != ignore_index).unsqueeze(-1).expand(shape)
                positive = t.unsqueeze(-1) == torch.arange(shape[-1], device=t.device)
                t = (positive & (t != background_index).unsqueeze(-1)).to(first.dtype)
            columns.append(t)
        if weight is not None:
            counted = weight != 0
        if counted is not None:
            columns = [t if t.dtype == torch.bool else torch.where(counted, t, harmless) for t in columns]
        loss = formula(*columns, **named.unpack(hparams))
        if counted is not None:
            loss = torch.where(counted, loss if weight is None else weight * loss, 0.0)
        if reduction != REDUCTIONS["none"]:
            loss = loss.mean() if reduction == REDUCTIONS["mean"] else loss.sum()
        if norm is not None:
            loss = loss / norm.reshape(()).to(loss.dtype)
        return loss.float() if out_fp32 and loss.dtype in HALF_TYPES else loss

    return whole


def zeros_like(x: Tensor) -> Tensor:
    """Return zeros as one number that is expanded."""
    return x.new_zeros(()).expand(x.shape)


def call_elementwise(op, inputs, hparams, mode, weight=None) -> Tensor:
    return op((*inputs, weight, None), (mode, hparams, -100, 0, autocast_to_fp32(inputs[0])))
