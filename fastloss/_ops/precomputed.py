"""Losses whose forward pass computes the gradients too, if the loss is a scalar: the data is at hand.

Backward multiplies these by its upstream gradient. If there are none, because the loss is unreduced or the graph is
used again, backward runs forward once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastloss._ops.autograd import (
    REDUCTIONS,
    Differentiable,
    Plan,
    PythonOp,
    runs_on_cpu,
)
from fastloss._ops.dtypes import accumulation_dtype


def scaled(operators: Any, d: Tensor, factor: Tensor, like: Tensor, inplace: bool) -> Tensor:
    """Return `factor * d` in the dtype of `like`; with `inplace` it may be `d` itself, written or left as it is."""
    if not inplace or d.numel() == 1:
        return (d.to(factor.dtype) * factor).to(like.dtype)
    on_cpu = runs_on_cpu(d, operators)
    if d.dtype == like.dtype:
        if on_cpu:
            return d if factor.item() == 1 else d.mul_(factor)
        operators.linear_scale_(d, factor)  # the kernel skips a factor of 1
        return d
    if on_cpu:
        return operators.linear_scaled(d, factor, like)
    if d.is_cpu:
        return (d * factor).to(like.dtype)
    return torch.mul(d, factor, out=torch.empty_like(d, dtype=like.dtype))


class Precomputed(Differentiable):
    """A loss of rows that computes its gradients in forward. `evaluate` is its forward pass.

    Its results are the loss and the gradients that `needs_grad_mask` selects, in the order of `wrt`.
    """

    reduction: ClassVar[int]  # its position among the options
    row_weight: ClassVar[int]  # the position of the row weights among the tensors

    def evaluate(self, operators: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], mask: int):
        raise NotImplementedError

    def evaluate_again(
        self, operators: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], mask: int
    ) -> Sequence[Tensor]:
        """Return the results without the loss."""
        return self.evaluate(operators, tensors, options, mask)[1:]

    @staticmethod
    def factors(
        results: Sequence[Tensor], factor: Tensor, dtype: torch.dtype
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradients among the results, and the factor of each."""
        return results, [factor] * len(results)

    @functools.cached_property
    def _gradients(self) -> Callable[..., list[Tensor | None]]:
        return _gradients_of(self.reduction, self.row_weight, self.wrt, self.factors)

    def plan(self, operators, tensors, options, needed):
        plan = Plan(operators)
        if options[self.reduction] != REDUCTIONS["none"]:
            plan.needs_grad_mask = needed & self._bits
        return plan

    def run_forward(self, plan, tensors, options):
        return self.evaluate(plan.operators, tensors, options, plan.needs_grad_mask)

    def save_for_backward(self, plan, saved):
        if plan.needs_grad_mask:
            plan.precomputed_grads = saved
        return []

    def run_backward(self, plan, grads, tensors, saved, options):
        needed = sum(1 << i for i in self.wrt if plan.needed[i])
        precomputed, plan.precomputed_grads = plan.precomputed_grads, None
        if needed & ~plan.needs_grad_mask:
            precomputed = None
        found = self._gradients(
            lambda *args: self.evaluate_again(plan.operators, *args),
            lambda d, factor, like: scaled(plan.operators.all, d, factor, like, inplace=True),
            grads[0], tensors, options, precomputed, needed,
        )  # fmt: skip
        return [tensors[0].new_empty(0) if d is None else d for d in found]


def _gradients_of(
    reduction: int, row_weight: int, wrt: Sequence[int], factors: Callable[..., Any]
) -> Callable[..., list[Tensor | None]]:
    """Return the backward pass as a function that both eager code and a tracer can call."""
    none, total = REDUCTIONS["none"], REDUCTIONS["sum"]

    def gradients(
        evaluate: Callable[..., Sequence[Tensor]], multiply: Callable[..., Tensor], grad: Tensor,
        tensors: Sequence[Tensor | None], options: Sequence[Any], precomputed: Sequence[Tensor] | None, mask: int,
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the gradients of the tensors in `wrt` that the mask selects."""
        factor = grad.to(accumulation_dtype(tensors[0].dtype))
        if options[reduction] == none:
            tensors, options = list(tensors), list(options)
            weight = tensors[row_weight]
            tensors[row_weight] = factor if weight is None else factor * weight
            options[reduction] = total
            factor, precomputed = torch.ones_like(factor.sum()), None
        if precomputed is None:
            precomputed = evaluate(tensors, options, mask)
        found, by = factors(precomputed, factor, tensors[0].dtype)
        return [multiply(d, f, tensors[i]) if mask >> i & 1 else None for d, f, i in zip(found, by, wrt)]

    return gradients


class PrecomputedOp(Precomputed, PythonOp):
    """A `Precomputed` loss as an operator, of which the last fields of `State` are the gradients of `wrt`.

    `bwd` multiplies them; those that it is not given, because the loss is unreduced or autograd did not save them, it
    computes.
    """

    masked = True

    def evaluate(self, operators, tensors, options, mask):
        return operators.fwd(*tensors, *options[: len(self.Attrs._fields)], mask)

    def forward_mask(self, options, mask):
        return 0 if options[self.reduction] == REDUCTIONS["none"] else mask

    def saved_state(self, saved):
        return [torch.empty(0)] * len(self.State._fields)

    def is_precomputed(self, inputs: Sequence[Tensor | None], *state_and_attrs: Any) -> bool:
        """Return whether the gradients that `bwd` is asked for are among the state that it is given."""
        fields = len(self.State._fields)
        state, (*attrs, mask) = state_and_attrs[:fields], state_and_attrs[fields:]
        given = zip(self.wrt, state[-len(self.wrt) :], strict=True)
        return attrs[self.reduction] != REDUCTIONS["none"] and all(
            d.shape == inputs[i].shape for i, d in given if mask >> i & 1
        )

    def backward(self, operators, grads, inputs, state, attrs, mask):
        ready = self.is_precomputed(inputs, *state, *attrs, mask)

        def evaluate(tensors, options, mask):
            return self.forward(operators, self.Inputs(*tensors), self.Attrs(*options), mask)[1:]

        found = self._gradients(
            evaluate,
            lambda d, factor, like: scaled(operators, d, factor, like, inplace=not ready),
            grads[0], inputs, attrs, state if ready else None, mask,
        )  # fmt: skip
        return [inputs[0].new_empty(0) if d is None else d for d in found]


torch.library.register_fake(
    "fastloss::linear_scaled", lambda d, factor, like: torch.empty_like(d, dtype=like.dtype)
)
