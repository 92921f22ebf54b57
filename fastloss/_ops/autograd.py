"""Turns a pair of operators, `<name>_fwd` and `<name>_bwd`, into one differentiable function.

The only autograd of the package. The convention:

    fwd(*tensors, *options) -> (*outputs, *saved)
    bwd(*grads of outputs, *tensors, *saved, *backward options) -> gradients of the tensors in `wrt`

The rules:

* The operators differentiate the tensors in `wrt`. Any other tensor that requires a gradient, and every second
  derivative, goes through the loss's reference, which is plain PyTorch and takes `(*tensors, *options)`.
* torch.compile and torch.export see the two operators; torch.func and vmap the same functions as eager code.
* Nothing that autograd may still need is written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

_library = Path(__file__).parents[1] / "_library.so"
if not _library.exists():
    raise ImportError(
        "fastloss is not built: run `pip install --no-build-isolation .` in its checkout (`make build` there)"
    )
torch.ops.load_library(str(_library))

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


def runs_on_cpu(x: Tensor) -> bool:
    """Whether kernels made for the CPU take it; another build may run those of CUDA on tensors of the CPU."""
    return x.is_cpu and _namespace == "fastloss"


profiler: Any = None
"""While `fastloss.profile` is active: called with an operation and its tensors, gives the record of this call."""

_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _apply(function: type[Function], *args: Any) -> Any:
    if _functorch_active():
        return function.apply(*args)
    return function.direct(*args)


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110  any() of a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def wanted_bits(op: Op, tensors: Sequence[Tensor | None]) -> int:
    """The inputs that are to be differentiated, a bit for each."""
    transformed = not torch.compiler.is_compiling() and _functorch_active()
    return sum(
        1 << i for i in op.wrt if _differentiable(tensors[i]) and (transformed or tensors[i].requires_grad)
    )


def _differentiable(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


class Plan:
    """What forward and backward of one call agree on."""

    fuse = False  # forward writes the gradients
    inplace = False  # backward writes the gradient over the input
    wanted = 0  # the inputs, as bits, whose gradients forward makes
    ready: Sequence[Tensor] | None = None  # gradients made in forward
    needed: Sequence[bool] | None = None  # the inputs whose gradients backward is asked for
    record: Any = None  # the profiler's of this call

    def __init__(self, operators: SimpleNamespace):
        self.operators = operators


class Op:
    """A differentiable function of `tensors` tensors (None allowed where the schema allows it) and options.

    `outputs` of the operator's results are the function's, the rest is what backward needs. `fake` computes all
    results of `fwd` for shapes alone. A function with one output returns it bare, else a tuple.
    """

    backward_options: slice = slice(None)
    traced_extra: tuple = ()  # what forward takes after the options, where a tracer follows it
    saved: int | None = None  # how many of the results after the outputs backward needs; None: all

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        tensors: int,
        wrt: Sequence[int] = (0,),
        outputs: int = 1,
    ):
        self.name, self.reference, self.fake = name, reference, fake
        self.tensors, self.wrt, self.outputs = tensors, tuple(wrt), outputs
        self._operators: dict[str, SimpleNamespace] = {}
        self._function = _eager_function(self)
        self._traced = _traced_function(self)
        self._plain = self.operators().fwd
        _register("fastloss", self)

    def operators(self) -> SimpleNamespace:
        found = self._operators.get(_namespace)
        if found is None:
            library = getattr(torch.ops, _namespace)
            found = SimpleNamespace(
                fwd=getattr(library, f"{self.name}_fwd").default,
                bwd=getattr(library, f"{self.name}_bwd").default if self.wrt else None,
                into=getattr(getattr(library, f"{self.name}_bwd_into", None), "default", None),
            )
            self._operators[_namespace] = found
        return found

    def __call__(self, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any) -> Any:
        """Apply to `tensors`. `how` is for `plan` alone: what changes the way to the gradients, never the results."""
        if torch.compiler.is_compiling():
            return self._compiled(tensors, options)
        if profiler is not None:
            return self._profiled(profiler(self, tensors), tensors, options, *how)
        operators = self.operators()
        if _functorch_active() or (torch.is_grad_enabled() and _requires_grad(tensors)):
            plan = self.plan(operators, tensors, options, *how)
            return self._unwrap(_apply(self._function, *tensors, *options, plan))
        return self._unwrap(self.run_forward(Plan(operators), tensors, options))

    def _profiled(
        self, record: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any
    ) -> Any:
        operators = self.operators()
        with record.forward():
            if _functorch_active() or (torch.is_grad_enabled() and _requires_grad(tensors)):
                plan = record.plan = self.plan(operators, tensors, options, *how)
                plan.record = record
                return self._unwrap(record.made(_apply(self._function, *tensors, *options, plan)))
            return self._unwrap(record.made(self.run_forward(Plan(operators), tensors, options)))

    def _unwrap(self, results: Any) -> Any:
        if isinstance(results, Tensor):
            return results
        return results[0] if self.outputs == 1 else tuple(results[: self.outputs])

    def _compiled(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        if _requires_grad([t for i, t in enumerate(tensors) if i not in self.wrt]):
            return self.reference(*tensors, *options)  # whose operations the compiler fuses itself
        if not (torch.is_grad_enabled() and _requires_grad(tensors)):
            return self._unwrap(self._plain(*tensors, *options, *self.traced_extra))
        return self._unwrap(self._traced.apply(*tensors, *options))

    # ---- what a kind of operator may do its own way

    def plan(
        self, operators: SimpleNamespace, tensors: Sequence[Tensor | None], options: Sequence[Any]
    ) -> Plan:
        return Plan(operators)

    def run_forward(self, plan: Plan, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        return plan.operators.fwd(*tensors, *options)

    def keep(self, plan: Plan, saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those results of forward that autograd is to save; others the plan may hold."""
        return saved

    def run_backward(self, plan: Plan, grads, tensors, saved, options) -> Sequence[Tensor | None]:
        """Gradients of the tensors in `wrt`, without a graph of their own."""
        results = plan.operators.bwd(*grads, *tensors, *saved, *options[self.backward_options])
        return [results] if isinstance(results, Tensor) else list(results)

    def fake_backward(self, *args: Any) -> Any:
        """All results of `bwd` for shapes alone."""
        first = self.outputs
        like = [args[first + i] for i in self.wrt]  # what is absent has an empty gradient
        grads = [args[first].new_empty([0]) if x is None else torch.empty_like(x) for x in like]
        return grads[0] if len(grads) == 1 else tuple(grads)

    def differentiable_again(self, plan: Plan) -> None:
        """Raises where the gradient cannot be differentiated."""

    def flops(self, shapes: Sequence[torch.Size | None], needed: Sequence[bool]) -> int:
        """Of the matrix products behind the outputs and the gradients that are needed; 0 where there are none."""
        return 0


class FusedOp(Op):
    """A loss whose forward pass also writes the gradients, where the loss is one number: the data is at hand.

    `fwd` takes `with_gradient` after the options and gives, after the outputs and what backward needs, buffers
    of the gradients of `wrt` for an upstream gradient of 1. The first backward takes them if its upstream
    gradient is 1, else `bwd_into` fills them again from the inputs; both ways give the same bits. On the CPU,
    where looking is free, a function whose upstream gradients are not 1 stops doing so. `reduction` is the place
    of the reduction among the options.
    """

    traced_extra = (False,)
    reduction: int

    def __init__(self, *args, **kwargs):
        self._expect_unit = threading.local()  # does the upstream gradient tend to be 1?
        super().__init__(*args, **kwargs)

    def plan(self, operators, tensors, options):
        plan = Plan(operators)
        plan.fuse = (
            options[self.reduction] != 0
            and (not tensors[0].is_cpu or getattr(self._expect_unit, "value", True))
            and not _functorch_active()
            and _requires_grad([tensors[i] for i in self.wrt])
        )
        return plan

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options, plan.fuse)

    def keep(self, plan, saved):
        if plan.fuse:
            plan.ready = list(saved[self.saved :])
        return saved[: self.saved]

    def run_backward(self, plan, grads, tensors, saved, options):
        (g,) = grads
        rest = (*tensors, *saved, *options[self.backward_options])
        ready, plan.ready = plan.ready, None
        if options[self.reduction] != 0 and g.is_cpu and type(g) is Tensor and not _functorch_active():
            unit = self._expect_unit.value = g.item() == 1
            if unit and ready is not None:
                return ready
        if ready is None:
            results = plan.operators.bwd(g, *rest)
            return [results] if isinstance(results, Tensor) else list(results)
        plan.operators.into(g, *ready, *rest, True)
        return ready


class PythonOp(Op):
    """An operator of which Python calls the kernels, chunk by chunk: `schemas` by kind, "fwd" and perhaps "bwd"."""

    schemas: ClassVar[dict[str, str]]

    def implement(self, kind: str, operators: Any, where: str) -> Callable[..., Any]:
        """What runs; `where` is "cpu", "cuda", or "simt", a build in which the CPU runs the CUDA kernels."""
        raise NotImplementedError

    def operators(self) -> SimpleNamespace:
        found = self._operators.get(_namespace)
        if found is None:
            operators, library = getattr(torch.ops, _namespace), torch.library.Library(_namespace, "FRAGMENT")
            found = SimpleNamespace(fwd=None, bwd=None, into=None, all=operators)
            for kind, schema in self.schemas.items():
                name = f"{self.name}_{kind}"
                library.define(name + schema)
                for key, where in (("CPU", "cpu" if _namespace == "fastloss" else "simt"), ("CUDA", "cuda")):
                    library.impl(name, self.implement(kind, operators, where), key)
                setattr(found, kind, getattr(operators, name).default)
            found.library = library  # its registrations live as long as it does
            self._operators[_namespace] = found
        return found


def _register(namespace: str, op: Op) -> None:
    """Fake kernels and batching rules of an operator's pair."""
    fwd, bwd = f"{namespace}::{op.name}_fwd", f"{namespace}::{op.name}_bwd"
    torch.library.register_fake(fwd, op.fake)
    operators = op.operators()
    torch.library.register_vmap(fwd, _each_sample(operators.fwd))
    if operators.bwd is None:
        return
    torch.library.register_fake(bwd, op.fake_backward)
    torch.library.register_vmap(bwd, _each_sample(operators.bwd))
    if operators.into is not None:
        torch.library.register_fake(f"{namespace}::{op.name}_bwd_into", lambda *_: None)


def _each_sample(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A batching rule: one call for each sample."""

    def rule(info, in_dims, *args):
        results = [
            operator(
                *(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _traced_function(op: Op) -> type[Function]:
    """The function as a tracer may follow it: nothing but the two operators."""
    operators = op.operators()
    fwd, bwd, wrt = operators.fwd, operators.bwd, op.wrt
    tensors, outputs = op.tensors, op.outputs
    # two numbers, because the compiler of torch 2.11 cannot follow a slice that stands outside the function
    first, last = op.backward_options.start, op.backward_options.stop
    extra, saved_only = op.traced_extra, op.saved

    class Traced(Function):
        @staticmethod
        def forward(*args):
            return fwd(*args, *extra)

        @staticmethod
        def setup_context(ctx, inputs, output):
            results = (output,) if isinstance(output, Tensor) else output
            if len(results) > outputs:  # the compiler knows no empty call of it
                ctx.mark_non_differentiable(*results[outputs:])
            ctx.save_for_backward(*inputs[:tensors], *results[outputs:][:saved_only])
            ctx.options = inputs[tensors:]

        @staticmethod
        def backward(ctx, *grads):
            results = bwd(*grads[:outputs], *ctx.saved_tensors, *ctx.options[first:last])
            results = (results,) if isinstance(results, Tensor) else results
            full = [None] * (tensors + len(ctx.options))
            for position, grad in zip(wrt, results):
                full[position] = grad
            return tuple(full)

    Traced.__name__ = Traced.__qualname__ = f"{op.name}_traced"
    return Traced


def _eager_function(op: Op) -> type[Function]:
    n = op.tensors

    def by_reference(tensors, options, needed: Sequence[bool], grads: Sequence[Tensor | None]):
        """Gradients by the reference's differentiable operations, for the tensors that are needed."""

        def outputs(*free: Tensor):
            it = iter(free)
            values = op.reference(
                *(next(it) if f else t for t, f in zip(tensors, needed, strict=True)), *options
            )
            values = (values,) if isinstance(values, Tensor) else tuple(values)
            return tuple(v for v, g in zip(values, grads, strict=True) if g is not None)

        values, pull = torch.func.vjp(outputs, *(t for t, f in zip(tensors, needed, strict=True) if f))
        it = iter(
            pull(
                tuple(g.to(v.dtype) for v, g in zip(values, [g for g in grads if g is not None], strict=True))
            )
        )
        return [next(it) if f else None for f in needed]

    class Gradient(Function):
        """The gradients of `wrt`, as a function that can be differentiated again."""

        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            *flat, options, plan = args
            grads, tensors, saved = flat[: op.outputs], flat[op.outputs :][:n], flat[op.outputs + n :]
            return tuple(op.run_backward(plan, grads, tensors, saved, options))

        @staticmethod
        def setup_context(ctx, inputs, output):
            *flat, ctx.options, _ = inputs
            ctx.rest = len(inputs) - op.outputs - n
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*flat[: op.outputs + n])

        @staticmethod
        def backward(ctx, *upstream):
            free = ctx.saved_tensors
            if all(u is None for u in upstream):
                return (None,) * len(ctx.needs_input_grad)
            needed = ctx.needs_input_grad[: len(free)]
            wanted = [i in op.wrt and _differentiable(free[op.outputs + i]) for i in range(n)]

            def first(*some: Tensor):
                it = iter(some)
                full = [next(it) if f else t for t, f in zip(free, needed, strict=True)]
                found = by_reference(full[op.outputs :], ctx.options, wanted, full[: op.outputs])
                return tuple(found[i] for i, u in zip(op.wrt, upstream, strict=True) if u is not None)

            _, pull = torch.func.vjp(first, *(t for t, f in zip(free, needed, strict=True) if f))
            it = iter(pull(tuple(u for u in upstream if u is not None)))
            return (*(next(it) if f else None for f in needed), *([None] * ctx.rest))

    def gradients(ctx, grads: Sequence[Tensor | None]):
        grads = grads[: op.outputs]
        saved = ctx.saved_tensors
        tensors, saved = saved[:n], saved[n:]
        needed = ctx.needs_input_grad[:n]
        found: list[Tensor | None] = [None] * n
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if any(needed[i] for i in op.wrt):
            ctx.plan.needed = needed
            if torch.is_grad_enabled():
                op.differentiable_again(ctx.plan)
                mine = _apply(Gradient, *grads, *tensors, *saved, ctx.options, ctx.plan)
            else:
                mine = op.run_backward(ctx.plan, grads, tensors, saved, ctx.options)
            for i, g in zip(op.wrt, mine, strict=True):
                found[i] = g if needed[i] else None
        others = [f and i not in op.wrt for i, f in enumerate(needed)]
        if any(others):
            for i, g in enumerate(by_reference(tensors, ctx.options, others, grads)):
                found[i] = g if others[i] else found[i]
        return (*found, *([None] * (len(ctx.needs_input_grad) - n)))

    class Forward(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return op.run_forward(args[-1], args[:n], args[n:-1])

        @staticmethod
        def setup_context(ctx, inputs, output):
            results = (output,) if isinstance(output, Tensor) else output
            ctx.options, ctx.plan = inputs[n:-1], inputs[-1]
            ctx.mark_non_differentiable(*results[op.outputs :])
            ctx.set_materialize_grads(False)  # else autograd fills zeros of the size of every other result
            ctx.save_for_backward(*inputs[:n], *op.keep(ctx.plan, results[op.outputs :]))

        @staticmethod
        def backward(ctx, *grads):
            if ctx.plan.record is None:
                return gradients(ctx, grads)
            with ctx.plan.record.backward(ctx, grads):
                return ctx.plan.record.made(gradients(ctx, grads))

    for function in (Forward, Gradient):
        # Function.apply inspects the signature of forward on every call (20 us); the C++ method behind it does not
        function.direct = super(Function, function).apply
    Forward.__name__ = Forward.__qualname__ = f"{op.name}_function"
    Gradient.__name__ = Gradient.__qualname__ = f"{op.name}_gradient"
    return Forward
