"""The operator of a row loss of hidden states: from chunks of logits, which never exist all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._ops import autograd, chunked_linear
from fastloss._ops.autograd import REDUCTIONS, Plan, PythonOp, _functorch_active, _requires_grad, wanted_bits
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.logit_transforms import Shape


def _divided(factor: Tensor, norm: Tensor) -> Tensor:
    """For gradients of a half type that forward left in the accumulation type: by the norm of "mean"."""
    return factor / (norm + (norm == 0)) if norm.dim() == 0 else factor  # of nothing: no gradient


class LinearOp(PythonOp):
    """A row loss of `linear(input, linear_weight, linear_bias)`, from the chunks of `_linear`.

    Tensors `(input, linear_weight, linear_bias, target, weight, row_weight)`, of which the first three are
    differentiated; `options` are `ignore_index, reduction, logit_scale, softcap, numbers, wide, chunk`.

    Where the loss is one number, the gradients are made in forward, while the logits are at hand, and the first
    backward multiplies them by its upstream gradient. Any other backward runs the chunks again.
    """

    schemas: ClassVar = {
        "fwd": "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, "
        "Tensor? row_weight, int ignore_index, int reduction, float logit_scale, float softcap, float[] numbers, "
        "bool wide, int chunk, int wanted) -> (Tensor loss, Tensor norm, Tensor dinput, Tensor dweight, Tensor dbias)"
    }
    REDUCTION = 1  # its place among the options

    def __init__(
        self, name: str, reference: Callable[..., Tensor], rows: str, shape: type[Shape] | None = None
    ):
        self._rows, self._shape = rows, shape

        def fake(input, linear_weight, linear_bias, *rest):
            high = accumulation_dtype(input.dtype)
            reduction, wide, wanted = rest[4], rest[8], rest[10]
            where = "cpu" if autograd._namespace == "fastloss" else "simt"
            products = chunked_linear.PRODUCTS["cuda" if input.device.type == "cuda" else where]
            narrow = chunked_linear.narrow_weight_gradient(products, linear_weight)
            loss = input.new_empty([] if reduction else [input.shape[0]], dtype=high if wide else input.dtype)
            norm = input.new_empty([] if reduction == REDUCTIONS["mean"] else [0], dtype=high)
            shapes = input.shape, linear_weight.shape, linear_weight.shape[:1]
            return (
                loss,
                norm,
                *(
                    input.new_empty(
                        shape if wanted & bit else [0],
                        dtype=input.dtype if narrow and bit == chunked_linear.WEIGHT else high,
                    )
                    for shape, bit in zip(
                        shapes,
                        (chunked_linear.INPUT, chunked_linear.WEIGHT, chunked_linear.BIAS),
                        strict=True,
                    )
                ),
            )

        super().__init__(name, reference, fake, tensors=6, wrt=(0, 1, 2))
        self._traced = self._trace()

    def implement(self, kind, operators, where):
        return functools.partial(
            chunked_linear.forward, self._rows, self._shape, operators, chunked_linear.PRODUCTS[where]
        )

    def flops(self, shapes, needed):
        (rows, features), (classes, _) = shapes[:2]
        return 2 * rows * features * classes * (1 + sum(needed[:2]))

    def plan(self, operators, tensors, options):
        ahead = options[self.REDUCTION] != REDUCTIONS["none"] and not _functorch_active()
        wanted = wanted_bits(self, tensors) if ahead else 0
        plan = Plan(operators)
        plan.wanted = wanted
        return plan

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options, plan.wanted)

    def keep(self, plan, saved):
        if plan.wanted:
            plan.ready = saved
        return []

    def run_backward(self, plan, grads, tensors, saved, options):
        (g,) = grads
        input, like = tensors[0], tensors[:3]
        needed = sum(1 << i for i in self.wrt if plan.needed is None or plan.needed[i])
        needed &= sum(1 << i for i in self.wrt if tensors[i] is not None)
        high = accumulation_dtype(input.dtype)
        factor, own = g.to(high), not _functorch_active()
        options = list(options)
        ready, plan.ready = plan.ready, None
        if options[self.REDUCTION] == REDUCTIONS["none"]:
            tensors = [*tensors[:5], factor if tensors[5] is None else factor * tensors[5]]
            options[self.REDUCTION] = REDUCTIONS["sum"]
            factor = torch.ones_like(factor.sum())
            ready = None
        if ready is None or needed & ~plan.wanted:
            ready = plan.operators.fwd(*tensors, *options, needed)[1:]
        norm, *ready = ready
        late = _divided(factor, norm) if high != input.dtype else factor
        scale = (
            chunked_linear.scaled if own else lambda _, d, factor, x, __: (d.to(high) * factor).to(x.dtype)
        )
        return [
            scale(plan.operators.all, d, factor if d.dtype == input.dtype else late, x, own)
            if needed >> i & 1
            else input.new_empty(0)
            for i, (d, x) in enumerate(zip(ready, like, strict=True))
        ]

    def _compiled(self, tensors, options):
        if _requires_grad(tensors[3:]):
            return self.reference(*tensors, *options)
        wanted = wanted_bits(self, tensors) if torch.is_grad_enabled() else 0
        if not wanted:
            return self._plain(*tensors, *options, 0)[0]
        return self._traced.apply(*tensors, *options, wanted)[0]

    def _trace(self) -> type[Function]:
        fwd, tensors, at = self.operators().fwd, self.tensors, self.tensors + self.REDUCTION
        none, total = REDUCTIONS["none"], REDUCTIONS["sum"]

        class Traced(Function):
            @staticmethod
            def forward(*args):
                return fwd(*args[:-1], 0 if args[at] == none else args[-1])

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.mark_non_differentiable(*output[1:])
                ctx.options = inputs[tensors:]
                ctx.count = len(inputs)
                ctx.save_for_backward(*inputs[:tensors], *(() if inputs[at] == none else output[1:]))

            @staticmethod
            def backward(ctx, g, *_):
                saved = ctx.saved_tensors
                given, ready = list(saved[:tensors]), saved[tensors:]
                options, wanted = list(ctx.options[:-1]), ctx.options[-1]
                input = given[0]
                high = accumulation_dtype(input.dtype)
                factor = g.to(high)
                if options[at - tensors] == none:
                    given[5] = factor if given[5] is None else factor * given[5]
                    options[at - tensors] = total
                    ready = fwd(*given, *options, wanted)[1:]
                    factor = torch.ones_like(factor.sum())
                norm, *ready = ready
                late = _divided(factor, norm) if high != input.dtype else factor
                found = [
                    (d.to(high) * (factor if d.dtype == input.dtype else late)).to(input.dtype)
                    if wanted >> i & 1
                    else None
                    for i, d in enumerate(ready)
                ]
                return (*found, *([None] * (ctx.count - len(found))))

        return Traced


torch.library.register_fake(
    "fastloss::linear_scaled", lambda d, factor, like: torch.empty_like(d, dtype=like.dtype)
)
