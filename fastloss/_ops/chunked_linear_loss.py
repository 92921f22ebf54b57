"""The operator of a row loss of hidden states, computed from chunks of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor

from fastloss._ops import abi, autograd, chunked_linear
from fastloss._ops.autograd import HALF_TYPES, REDUCTIONS
from fastloss._ops.chunked_linear import LinearAttrs, LinearInputs
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.flops import count_passes
from fastloss._ops.logit_transforms import LogitTransform
from fastloss._ops.precomputed import PrecomputedOp


class LinearOutputs(NamedTuple):
    loss: Tensor


class LinearState(NamedTuple):
    norm: Tensor
    dinput: Tensor
    dweight: Tensor
    dbias: Tensor


class LinearGradients(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor


class LinearOp(PrecomputedOp):
    """A row loss of `linear(input, linear_weight, linear_bias)`, from the chunks of `chunked_linear`.

    If the loss is a scalar, forward also computes the gradients, while the logits are at hand, and the first backward
    multiplies them by its upstream gradient. Any other backward processes the chunks again.

    The attribute `hparams` comes from `pack`: those of the row loss, then those of the logit transform.

    Args:
        reference: takes the inputs, and by name `ignore_index, reduction, logit_scale, softcap` and the
            hyperparameters.
        row_loss: the row loss whose kernels turn a chunk of logits into their gradient.
        logit_transform: the transform from the GEMM's results to logits. Default: none.
    """

    Inputs, Attrs, Outputs, State = LinearInputs, LinearAttrs, LinearOutputs, LinearState
    Gradients = LinearGradients
    reduction: ClassVar[int] = 1
    row_weight: ClassVar[int] = 5

    def __init__(
        self,
        name: str,
        reference: Callable[..., Tensor],
        row_loss: str,
        logit_transform: type[LogitTransform] | None = None,
    ):
        self._row_loss, self._logit_transform = row_loss, logit_transform
        of_rows = abi.hparams(row_loss)
        names = (*of_rows.names, *(logit_transform.HPARAMS if logit_transform else ()))
        self.hparams = abi.Hparams(name, names, of_rows.choices)
        self.hparams.check_taken_by(reference)
        self.pack = self.hparams.pack

        def by_name(inputs, attrs):
            loss = reference(
                *inputs, ignore_index=attrs.ignore_index, reduction=list(REDUCTIONS)[attrs.reduction],
                logit_scale=attrs.logit_scale, softcap=attrs.softcap, **self.hparams.unpack(attrs.hparams),
            )  # fmt: skip
            return loss.float() if attrs.out_fp32 and loss.dtype in HALF_TYPES else loss

        super().__init__(name, by_name, wrt=(0, 1, 2))
        count_passes(self)

    def shapes(self, inputs, attrs, mask):
        input, weight = inputs.input, inputs.linear_weight
        acc_dtype = accumulation_dtype(input.dtype)
        products = chunked_linear.products_for(autograd.kernels(), input)
        narrow = chunked_linear.narrow_weight_gradient(products, weight)
        loss_dtype = acc_dtype if attrs.out_fp32 else input.dtype
        yield input.new_empty([] if attrs.reduction else [input.shape[0]], dtype=loss_dtype)
        yield input.new_empty([] if attrs.reduction == REDUCTIONS["mean"] else [0], dtype=acc_dtype)
        for shape, bit in (
            (input.shape, chunked_linear.INPUT),
            (weight.shape, chunked_linear.WEIGHT),
            (weight.shape[:1], chunked_linear.BIAS),
        ):
            dtype = input.dtype if narrow and bit == chunked_linear.WEIGHT else acc_dtype
            yield input.new_empty(shape if mask & bit else [0], dtype=dtype)

    def forward(self, operators, inputs, attrs, mask):
        return chunked_linear.forward(operators, self._row_loss, self._logit_transform, inputs, attrs, mask)

    @staticmethod
    def factors(results, factor, dtype):
        """Return the gradients and their factors; half-precision ones are yet to be divided by the norm of "mean"."""
        norm, *grads = results
        undivided = factor
        if norm.dtype != dtype and norm.dim() == 0:
            undivided = factor / (norm + (norm == 0))  # an empty mean has no gradient
        return grads, [factor if d.dtype == dtype else undivided for d in grads]

    def flops(self, shapes, needed):
        (rows, features), (classes, _) = shapes[:2]
        return 2 * rows * features * classes * (1 + sum(needed[:2]))
