"""Turns the operators of a row loss, `<name>_fwd`, `_bwd` and `_bwd_into`, into one differentiable function.

The only autograd of the package. The rules:

* The operators differentiate the logits. Any other tensor that requires a gradient (soft targets, weights) and
  every second derivative go through the loss's reference, which is plain PyTorch.
* Where the loss is one number, the forward pass also writes the gradient for an upstream gradient of 1: the row
  is at hand. The backward pass hands that buffer over if the upstream gradient is 1, else fills it again from the
  logits; both ways give the same bits. On the CPU, where looking is free, a function whose upstream gradients
  are not 1 stops doing so.
* A gradient once handed over is never looked at again: a second backward computes its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

torch.ops.load_library(str(Path(__file__).with_name("_ops.so")))

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
HALF_TYPES = (torch.bfloat16, torch.float16)

_namespace = "fastloss"


@contextlib.contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Run the operators registered under another namespace: a second build of the same kernels."""
    global _namespace
    before, _namespace = _namespace, namespace
    try:
        yield
    finally:
        _namespace = before


# Function.apply inspects the signature of forward on every call (20 us); the C++ method behind it does not.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None)


def _apply(function: type[Function], *args: Any) -> Any:
    if _functorch_active is None or _functorch_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)


class RowOp:
    """A loss of rows of logits: `(input, target, weight, row_weight, *options) -> loss`.

    `options` are `ignore_index, reduction, logit_scale, softcap, numbers, wide`, as in the operator's schema;
    `reference` takes the same arguments. `saved` is how many numbers a row saves beside its statistics.
    """

    def __init__(self, name: str, reference: Callable[..., Tensor], saved: int):
        self.name = name
        self.reference = reference
        self.saved = saved
        self._expect_unit = threading.local()  # does the upstream gradient tend to be 1?
        self._operators: dict[str, SimpleNamespace] = {}
        self._function, self._gradient = _functions(self)
        self._register_fake("fastloss")
        self._traced = _traced_function(self.operators())

    def operators(self) -> SimpleNamespace:
        ops = self._operators.get(_namespace)
        if ops is None:
            library = getattr(torch.ops, _namespace)
            ops = SimpleNamespace(
                fwd=getattr(library, f"{self.name}_fwd").default,
                bwd=getattr(library, f"{self.name}_bwd").default,
                bwd_into=getattr(library, f"{self.name}_bwd_into").default,
            )
            self._operators[_namespace] = ops
        return ops

    def __call__(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        options: Sequence[Any],
        inplace_backward: bool = False,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return self._compiled(input, target, weight, row_weight, options)
        operators = self.operators()
        if _functorch_active is None or _functorch_active():
            return _apply(
                self._function, input, target, weight, row_weight, *options, inplace_backward, False, operators
            )[0]
        wanted = torch.is_grad_enabled() and (
            input.requires_grad
            or target.requires_grad
            or (weight is not None and weight.requires_grad)
            or (row_weight is not None and row_weight.requires_grad)
        )
        if not wanted:
            return operators.fwd(input, target, weight, row_weight, *options, False)[0]
        fuse = (
            input.requires_grad
            and options[1] != REDUCTIONS["none"]
            and not inplace_backward
            and (input.device.type != "cpu" or getattr(self._expect_unit, "value", True))
        )
        return _apply(
            self._function, input, target, weight, row_weight, *options, inplace_backward, fuse, operators
        )[0]

    def _compiled(self, input, target, weight, row_weight, options) -> Tensor:
        """What torch.compile and torch.export trace: the operators for the logits' gradient, for others the reference."""
        if target.requires_grad or any(t is not None and t.requires_grad for t in (weight, row_weight)):
            return self.reference(input, target, weight, row_weight, *options)
        return self._traced.apply(input, target, weight, row_weight, *options)[0]

    def _register_fake(self, namespace: str) -> None:
        width = 3 + self.saved

        def fwd(input, target, weight, row_weight, ignore_index, reduction, scale, cap, numbers, wide, gradient):
            rows = list(input.shape[:1] + input.shape[2:]) if input.dim() > 1 else []
            high = torch.float64 if input.dtype == torch.float64 else torch.float32
            loss = input.new_empty(
                rows if reduction == REDUCTIONS["none"] else [], dtype=high if wide else input.dtype
            )
            count = 1
            for size in rows:
                count = count * size
            state = input.new_empty([count, width], dtype=high)
            return loss, state, torch.empty_like(input) if gradient else input.new_empty([0])

        def bwd(grad, input, *_):
            return torch.empty_like(input)

        torch.library.register_fake(f"{namespace}::{self.name}_fwd", fwd)
        torch.library.register_fake(f"{namespace}::{self.name}_bwd", bwd)
        torch.library.register_fake(f"{namespace}::{self.name}_bwd_into", lambda *_: None)
        for kind in ("fwd", "bwd"):
            operator = getattr(getattr(torch.ops, namespace), f"{self.name}_{kind}").default
            torch.library.register_vmap(f"{namespace}::{self.name}_{kind}", _each_sample(operator))


def _each_sample(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A batching rule: one call for each sample."""

    def rule(info, in_dims, *args):
        results = [
            operator(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _traced_function(operators: SimpleNamespace) -> type[Function]:
    """The plain two-operator function, of nothing but what a tracer can follow."""
    fwd, bwd = operators.fwd, operators.bwd

    class Traced(Function):
        @staticmethod
        def forward(input, target, weight, row_weight, index, reduction, scale, cap, numbers, wide):
            return fwd(input, target, weight, row_weight, index, reduction, scale, cap, numbers, wide, False)

        @staticmethod
        def setup_context(ctx, inputs, output):
            input, target, weight, _, _, _, ctx.scale, ctx.cap, ctx.numbers, _ = inputs
            _, state, dx = output
            ctx.mark_non_differentiable(state, dx)
            ctx.save_for_backward(input, target, weight, state)

        @staticmethod
        def backward(ctx, g, _state, _dx):
            dx = bwd(g, *ctx.saved_tensors, ctx.scale, ctx.cap, ctx.numbers)
            return dx, None, None, None, None, None, None, None, None, None

    return Traced


# Positions in the arguments of the functions below
_TENSORS = 4  # input, target, weight, row_weight
_OPTIONS = slice(4, 10)  # ignore_index, reduction, logit_scale, softcap, numbers, wide


def _functions(op: RowOp) -> tuple[type[Function], type[Function]]:
    def by_reference(tensors: Sequence[Tensor | None], options: Sequence[Any], needed: Sequence[bool], g: Tensor):
        """Gradients of the reference, by differentiable operations, for the tensors that are needed."""
        wrt = [t for t, need in zip(tensors, needed, strict=True) if need]

        def loss(*free: Tensor) -> Tensor:
            it = iter(free)
            return op.reference(*(next(it) if n else t for t, n in zip(tensors, needed, strict=True)), *options)

        value, pull = torch.func.vjp(loss, *wrt)
        it = iter(pull(g.to(value.dtype)))
        return [next(it) if need else None for need in needed]

    class Gradient(Function):
        """d loss / d input as a function that can be differentiated again."""

        generate_vmap_rule = True

        @staticmethod
        def forward(g, input, target, weight, row_weight, state, options, operators):
            return operators.bwd(g, input, target, weight, state, *options[2:5])

        @staticmethod
        def setup_context(ctx, inputs, output):
            g, *tensors, _state, options, _ = inputs
            ctx.save_for_backward(g, *tensors)
            ctx.options = options

        @staticmethod
        def backward(ctx, upstream):
            g, *tensors = ctx.saved_tensors
            needed = list(ctx.needs_input_grad[: 1 + _TENSORS])

            def first(*free: Tensor) -> Tensor:
                it = iter(free)
                g_, *rest = (next(it) if n else t for t, n in zip([g, *tensors], needed, strict=True))
                return by_reference(rest, ctx.options, [True, False, False, False], g_)[0]

            _, pull = torch.func.vjp(first, *(t for t, n in zip([g, *tensors], needed, strict=True) if n))
            it = iter(pull(upstream))
            return (*(next(it) if n else None for n in needed), None, None, None)

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(input, target, weight, row_weight, *rest):
            *options, _inplace, fuse, operators = rest
            return operators.fwd(input, target, weight, row_weight, *options, fuse)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _loss, state, dx = output
            *_, ctx.inplace, fused, ctx.operators = inputs
            ctx.options = tuple(inputs[_OPTIONS])
            ctx.mark_non_differentiable(state, dx)
            ctx.set_materialize_grads(False)  # else autograd would fill zeros of the logits' size for dx
            ctx.save_for_backward(*inputs[:_TENSORS], state)
            ctx.dx = dx if fused else None  # not saved: the first backward takes it away

        @staticmethod
        def backward(ctx, g, *_):
            input, target, weight, row_weight, state = ctx.saved_tensors
            ready, ctx.dx = ctx.dx, None
            if g is None:
                return (None,) * 13
            tensors, operators = (input, target, weight, row_weight), ctx.operators
            dx = None
            if ctx.needs_input_grad[0]:
                saved = (input, target, weight, state, *ctx.options[2:5])
                if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                    if ctx.inplace:
                        raise RuntimeError("inplace_backward=True: the gradient cannot be differentiated again")
                    dx = _apply(Gradient, g, *tensors, state, ctx.options, operators)
                elif ctx.inplace:
                    dx = input.detach()
                    operators.bwd_into(g, dx, *saved, False)
                    torch.autograd.graph.increment_version(input)
                elif ready is not None:
                    if g.device.type == "cpu":
                        op._expect_unit.value = g.item() == 1
                    dx = ready
                    operators.bwd_into(g, dx, *saved, True)
                else:
                    if ctx.options[1] != REDUCTIONS["none"] and g.device.type == "cpu" and not _tracing(g):
                        op._expect_unit.value = g.item() == 1
                    dx = operators.bwd(g, *saved)
            others = [False, *ctx.needs_input_grad[1:_TENSORS]]
            if any(others):
                grads = by_reference(tensors, ctx.options, others, g)
                return (dx, *grads[1:], *([None] * 9))
            return (dx, *([None] * 12))

    Forward.__name__ = Forward.__qualname__ = f"{op.name}_function"
    Gradient.__name__ = Gradient.__qualname__ = f"{op.name}_gradient"
    return Forward, Gradient


def _tracing(t: Tensor) -> bool:
    """Is the value of `t` out of reach: a fake tensor, or one inside a transform?"""
    return torch.compiler.is_compiling() or type(t) is not Tensor or _functorch_active is None or _functorch_active()
