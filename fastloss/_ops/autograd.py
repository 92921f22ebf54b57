"""Turn a forward and a backward pass into one differentiable function.

The autograd of every loss, on one process (`Op`, whose passes are the operators `<name>_fwd` and `<name>_bwd`) and
over several (`Differentiable`, whose passes are Python). The convention:

    fwd(*tensors, *options) -> (*outputs, *saved)
    bwd(*grads of outputs, *tensors, *saved, *backward options) -> gradients of the tensors in `wrt`

The rules:

* The operators differentiate the tensors in `wrt`. Any other tensor that requires a gradient, and every second
  derivative, goes through the loss's reference, which is plain PyTorch and takes `(*tensors, *options)`.
* torch.compile and torch.export see the two operators; torch.func and vmap the same functions as eager code.
* Tensors that autograd may still need are never overwritten.
"""

from __future__ import annotations

import contextlib
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._ops import abi

REDUCTIONS = abi.enum("Reduction")
HALF_TYPES = (torch.bfloat16, torch.float16)

LIBRARY = "fastloss"
"""The namespace of the compiled library."""
_namespace = LIBRARY


@contextlib.contextmanager
def use_namespace(namespace: str) -> Iterator[None]:
    """Run the operators registered under another namespace: a second build of the same kernels."""
    global _namespace
    before, _namespace = _namespace, namespace
    try:
        yield
    finally:
        _namespace = before


def namespace() -> str:
    """Return the namespace in use."""
    return _namespace


def kernels() -> Any:
    """Return the operators of the namespace in use."""
    return getattr(torch.ops, _namespace)


def runs_on_cpu(x: Tensor, operators: Any = None) -> bool:
    """Return whether CPU kernels take `x`; another build may run CUDA kernels on CPU tensors."""
    return x.is_cpu and (_namespace if operators is None else operators.name) == LIBRARY


profiler: Any = None
"""While `fastloss.profile` is active: a function from an operation and its tensors to the record of this call."""

functorch_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _apply(function: Any, *args: Any) -> Any:
    if functorch_active():
        return function.apply(*args)
    return function.direct(*args)


def requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110  any() of a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def needs_grad_mask(op: Differentiable, tensors: Sequence[Tensor | None]) -> int:
    """Return the bit mask of the tensors that need a gradient; inside a transform, of all that can have one."""
    transformed = not torch.compiler.is_compiling() and functorch_active()
    return sum(
        1 << i for i in op.wrt if _differentiable(tensors[i]) and (transformed or tensors[i].requires_grad)
    )


def _differentiable(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def _tuple(results: Any) -> Sequence[Any]:
    return (results,) if isinstance(results, Tensor) else results


class Plan:
    """The state that forward and backward of one call share."""

    fuse = False  # forward writes the gradients
    inplace = False  # backward writes the gradient over the input
    needs_grad_mask = 0  # bit mask of the inputs whose gradients forward computes
    precomputed_grads: Sequence[Tensor] | None = None  # gradients computed in forward
    needed: Sequence[bool] | None = None  # the inputs whose gradients backward must return
    record: Any = None  # the profiler's record of this call

    def __init__(self, operators: SimpleNamespace):
        self.operators = operators


class Differentiable:
    """A differentiable function of `tensors` tensors (some may be None) and options, by two passes in Python.

    The first `outputs` results of the forward pass are the function's, the others are state for backward. A function
    with one output returns a tensor, else a tuple. Without a `reference` it can be differentiated once, and only with
    respect to the tensors in `wrt`. Compilers do not trace it.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any] | None,
        *,
        tensors: int,
        wrt: Sequence[int] = (0,),
        outputs: int = 1,
    ):
        self.name, self.reference = name, reference
        self.tensors, self.wrt, self.outputs = tensors, tuple(wrt), outputs
        self._operators: dict[str, SimpleNamespace] = {}
        self._function = _eager_function(self)

    def operators(self) -> SimpleNamespace:
        """Return the operators of the passes in the namespace in use; `all` is the whole namespace."""
        found = self._operators.get(_namespace)
        if found is None:
            found = self._operators[_namespace] = SimpleNamespace(all=kernels())
        return found

    def __call__(self, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any) -> Any:
        """Apply to `tensors`. `how` goes to `plan`: it changes how gradients are computed, never their values."""
        if torch.compiler.is_compiling():
            return self._compiled(tensors, options)
        if profiler is not None:
            return self._profiled(profiler(self, tensors), tensors, options, *how)
        operators = self.operators()
        if functorch_active() or (torch.is_grad_enabled() and requires_grad(tensors)):
            plan = self.plan(operators, tensors, options, *how)
            return self._unwrap(_apply(self._function, *tensors, *options, plan))
        return self._unwrap(self.run_forward(Plan(operators), tensors, options))

    def _profiled(
        self, record: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any
    ) -> Any:
        operators = self.operators()
        with record.forward():
            if functorch_active() or (torch.is_grad_enabled() and requires_grad(tensors)):
                plan = record.plan = self.plan(operators, tensors, options, *how)
                plan.record = record
                return self._unwrap(record.note(_apply(self._function, *tensors, *options, plan)))
            return self._unwrap(record.note(self.run_forward(Plan(operators), tensors, options)))

    def _unwrap(self, results: Any) -> Any:
        if isinstance(results, Tensor):
            return results
        return results[0] if self.outputs == 1 else tuple(results[: self.outputs])

    def _compiled(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        return torch.compiler.disable(self.__call__)(tensors, options)  # here: it imports the compiler

    # ---- overridable

    def plan(
        self, operators: SimpleNamespace, tensors: Sequence[Tensor | None], options: Sequence[Any]
    ) -> Plan:
        """Plan a call that is to be differentiated."""
        return Plan(operators)

    def run_forward(self, plan: Plan, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        """Return the outputs, then the state for backward."""
        raise NotImplementedError

    def save_for_backward(self, plan: Plan, saved: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the results of forward that autograd saves; the plan may hold others."""
        return saved

    def run_backward(self, plan: Plan, grads, tensors, saved, options) -> Sequence[Tensor | None]:
        """Return the gradients of the tensors in `wrt`, without a graph of their own."""
        raise NotImplementedError

    def differentiable_again(self, plan: Plan) -> None:
        """Raise if the gradient cannot be differentiated again."""

    def flops(self, shapes: Sequence[torch.Size | None], needed: Sequence[bool]) -> int:
        """Return the FLOPs of the GEMMs behind the outputs and the gradients that are needed (0 if none)."""
        return 0


class Op(Differentiable):
    """A differentiable function whose passes are two operators of the dispatcher.

    `fake` computes the results of `fwd` as empty tensors. torch.compile and torch.export see the two operators.
    """

    backward_options: slice = slice(None)
    traced_extra: tuple = ()  # arguments of forward after the options, for tracers
    saved: int | None = None  # the number of results after the outputs that backward needs; None: all

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
        super().__init__(name, reference, tensors=tensors, wrt=wrt, outputs=outputs)
        self.fake = fake
        self._traced = _traced_function(self)
        self._plain = self.operators().fwd
        _register(LIBRARY, self)

    def operators(self) -> SimpleNamespace:
        found = self._operators.get(_namespace)
        if found is None:
            library = kernels()
            found = SimpleNamespace(
                fwd=getattr(library, f"{self.name}_fwd").default,
                bwd=getattr(library, f"{self.name}_bwd").default if self.wrt else None,
                into=getattr(getattr(library, f"{self.name}_bwd_into", None), "default", None),
                all=library,
            )
            self._operators[_namespace] = found
        return found

    def _compiled(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        if requires_grad([t for i, t in enumerate(tensors) if i not in self.wrt]):
            return self.reference(*tensors, *options)  # the compiler fuses the operations of the reference
        if not (torch.is_grad_enabled() and requires_grad(tensors)):
            return self._unwrap(self._plain(*tensors, *options, *self.traced_extra))
        return self._unwrap(self._traced.apply(*tensors, *options))

    def traced_passes(self) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
        """Return traceable functions without a plan: forward, the selection of saved results, and backward."""
        operators = self.operators()
        fwd, bwd, extra, saved_only = operators.fwd, operators.bwd, self.traced_extra, self.saved
        # two integers, because the compiler of torch 2.11 cannot trace a slice from outside the function
        first, last = self.backward_options.start, self.backward_options.stop

        def forward(*args):
            return fwd(*args, *extra)

        def save(results, options):
            return results[:saved_only]

        def backward(grads, tensors, saved, options):
            return _tuple(bwd(*grads, *tensors, *saved, *options[first:last]))

        return forward, save, backward

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options)

    def run_backward(self, plan, grads, tensors, saved, options):
        return _tuple(plan.operators.bwd(*grads, *tensors, *saved, *options[self.backward_options]))

    def fake_backward(self, *args: Any) -> Any:
        """Return the results of `bwd` as empty tensors, from shapes alone."""
        first = self.outputs
        like = [args[first + i] for i in self.wrt]  # an absent tensor has an empty gradient
        grads = [args[first].new_empty([0]) if x is None else torch.empty_like(x) for x in like]
        return grads[0] if len(grads) == 1 else tuple(grads)


class FusedOp(Op):
    """A loss whose forward pass also writes the gradients if the loss is a scalar: the data is at hand.

    `fwd` takes `with_gradient` after the options and returns, after the outputs and the state for backward, buffers of
    the gradients of `wrt` for an upstream gradient of 1. The first backward returns them if its upstream gradient is 1,
    else `bwd_into` recomputes them from the inputs; both ways give the same bits. On the CPU, where reading the
    upstream gradient costs nothing, a function whose upstream gradients are not 1 stops fusing. `reduction` is the
    position of the reduction among the options.
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
            and not functorch_active()
            and requires_grad([tensors[i] for i in self.wrt])
        )
        return plan

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options, plan.fuse)

    def save_for_backward(self, plan, saved):
        if plan.fuse:
            plan.precomputed_grads = list(saved[self.saved :])
        return saved[: self.saved]

    def run_backward(self, plan, grads, tensors, saved, options):
        (g,) = grads
        args = (*tensors, *saved, *options[self.backward_options])
        precomputed, plan.precomputed_grads = plan.precomputed_grads, None
        if options[self.reduction] != 0 and g.is_cpu and type(g) is Tensor and not functorch_active():
            unit = self._expect_unit.value = g.item() == 1
            if unit and precomputed is not None:
                return precomputed
        if precomputed is None:
            return _tuple(plan.operators.bwd(g, *args))
        plan.operators.into(g, *precomputed, *args, True)
        return precomputed


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float", list[float]: "float[]",
}  # fmt: skip


def _arguments(fields: type | None) -> list[str]:
    """Return the fields of a NamedTuple class as schema arguments."""
    hints = {} if fields is None else typing.get_type_hints(fields)
    return [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in hints.items()]


class PythonOp(Op):
    """An operator implemented in Python over kernels, block by block. Its signature is written once, as named tuples.

    `Inputs` are the tensors and `Attrs` the attributes of a call, `Outputs` and `State` the results of forward: the
    function's and the state for backward. `Gradients` are the results of backward; without them there is no operator
    `bwd`. The operators take the fields one by one, `forward` and `backward` as named tuples. With `masked` both
    operators take `needs_grad_mask` after the attributes.

    The reference takes `(inputs, attrs)`.
    """

    Inputs: ClassVar[type[Any]]
    Attrs: ClassVar[type[Any] | None] = None
    Outputs: ClassVar[type[Any]]
    State: ClassVar[type[Any] | None] = None
    Gradients: ClassVar[type[Any] | None] = None
    masked: ClassVar[bool] = False

    def __init__(self, name: str, reference: Callable[..., Any] | None, *, wrt: Sequence[int] = ()):
        tensors, outputs = len(self.Inputs._fields), len(self.Outputs._fields)
        attrs = len(self.Attrs._fields) if self.Attrs else 0
        self._last_attr = tensors + attrs

        def of_fields(*args):
            return reference(*self._inputs_and_attrs(args))

        def fake(*args):
            results = tuple(self.shapes(*self._inputs_and_attrs(args), *args[self._last_attr :]))
            return results[0] if len(results) == 1 else results

        super().__init__(name, of_fields, fake, tensors=tensors, wrt=wrt, outputs=outputs)

    def _inputs_and_attrs(self, args: Sequence[Any]) -> tuple[Any, Any]:
        inputs, attrs = args[: self.tensors], args[self.tensors : self._last_attr]
        return self.Inputs(*inputs), self.Attrs(*attrs) if self.Attrs else None

    def schemas(self) -> dict[str, str]:
        """Return the schemas of `fwd` and, if there are `Gradients`, `bwd`."""
        mask = ["int needs_grad_mask"] if self.masked else []
        inputs, attrs, state = _arguments(self.Inputs), _arguments(self.Attrs) + mask, _arguments(self.State)
        results = ", ".join(_arguments(self.Outputs) + state)
        found = {"fwd": f"({', '.join(inputs + attrs)}) -> ({results})"}
        if self.Gradients:
            grads = [f"Tensor? {name}_grad" for name in self.Outputs._fields]
            results = ", ".join(f"Tensor grad_{name}" for name in self.Gradients._fields)
            found["bwd"] = f"({', '.join(grads + inputs + state + attrs)}) -> ({results})"
        return found

    def implement(self, kind: str, operators: Any) -> Callable[..., Any]:
        """Return the implementation of a pass for the dispatcher, over the kernels `operators`."""
        tensors, last_attr, first = self.tensors, self._last_attr, self.outputs
        as_inputs, as_attrs = self.Inputs._make, self.Attrs._make if self.Attrs else lambda _: None
        forward = self.forward
        if kind == "fwd":

            def run(*args):
                return forward(
                    operators, as_inputs(args[:tensors]), as_attrs(args[tensors:last_attr]), *args[last_attr:]
                )
        else:
            last = first + tensors
            end = last + (len(self.State._fields) if self.State else 0)
            end_attrs = end + last_attr - tensors

            def run(*args):
                state = self.State(*args[last:end]) if self.State else None
                inputs, attrs = as_inputs(args[first:last]), as_attrs(args[end:end_attrs])
                grads = self.Outputs(*args[:first])
                return self.backward(operators, grads, inputs, state, attrs, *args[end_attrs:])

        return torch.no_grad()(run)

    # An operator names the arguments of these methods itself, `mask` among them if it is masked.
    def shapes(self, *args: Any, **kwargs: Any) -> Iterable[Tensor]:
        """Return for `inputs, attrs[, mask]` the results of `forward` as empty tensors."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return for `operators, inputs, attrs[, mask]` the fields of `Outputs` and `State`."""
        raise NotImplementedError

    def backward(self, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        """Return for `operators, grads, inputs, state, attrs[, mask]` the `Gradients`; unneeded ones are empty."""
        raise NotImplementedError

    def operators(self) -> SimpleNamespace:
        found = self._operators.get(_namespace)
        if found is None:
            operators, library = kernels(), torch.library.Library(_namespace, "FRAGMENT")
            found = SimpleNamespace(fwd=None, bwd=None, into=None, all=operators)
            for kind, schema in self.schemas().items():
                name = f"{self.name}_{kind}"
                library.define(name + schema)
                for device in ("CPU", "CUDA"):
                    library.impl(name, self.implement(kind, operators), device)
                setattr(found, kind, getattr(operators, name).default)
            found.library = library  # registrations live as long as the library object
            self._operators[_namespace] = found
        return found


def _register(namespace: str, op: Op) -> None:
    """Register fake kernels and batching rules of an operator's two passes."""
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
    """Return a batching rule that calls the operator once for each sample."""

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
    """Return the autograd function for tracers: operators, and arithmetic on their results."""
    run_forward, save, run_backward = op.traced_passes()
    wrt, tensors, outputs = op.wrt, op.tensors, op.outputs

    class Traced(Function):
        @staticmethod
        def forward(*args):
            return run_forward(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            results = (output,) if isinstance(output, Tensor) else output
            ctx.options = inputs[tensors:]
            if len(results) > outputs:  # the compiler cannot trace it without arguments
                ctx.mark_non_differentiable(*results[outputs:])
            ctx.save_for_backward(*inputs[:tensors], *save(results[outputs:], ctx.options))

        @staticmethod
        def backward(ctx, *grads):
            saved = ctx.saved_tensors
            results = run_backward(grads[:outputs], saved[:tensors], saved[tensors:], ctx.options)
            full = [None] * (tensors + len(ctx.options))
            for position, grad in zip(wrt, results):
                full[position] = grad
            return tuple(full)

    Traced.__name__ = Traced.__qualname__ = f"{op.name}_traced"
    return Traced


def _eager_function(op: Differentiable) -> type[Function]:
    n = op.tensors

    def by_reference(tensors, options, needed: Sequence[bool], grads: Sequence[Tensor | None]):
        """Return the gradients of the `needed` tensors by the reference's differentiable operations."""

        def outputs(*free: Tensor):
            it = iter(free)
            values = op.reference(
                *(next(it) if f else t for t, f in zip(tensors, needed, strict=True)), *options
            )
            values = (values,) if isinstance(values, Tensor) else tuple(values)
            return tuple(v for v, g in zip(values, grads, strict=True) if g is not None)

        values, pull = torch.func.vjp(outputs, *(t for t, f in zip(tensors, needed, strict=True) if f))[:2]
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
            ctx.others = len(inputs) - op.outputs - n
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*flat[: op.outputs + n])

        @staticmethod
        def backward(ctx, *upstream):
            free = ctx.saved_tensors
            if all(u is None for u in upstream):
                return (None,) * len(ctx.needs_input_grad)
            needed = ctx.needs_input_grad[: len(free)]
            differentiated = [i in op.wrt and _differentiable(free[op.outputs + i]) for i in range(n)]

            def first(*some: Tensor):
                it = iter(some)
                full = [next(it) if f else t for t, f in zip(free, needed, strict=True)]
                found = by_reference(full[op.outputs :], ctx.options, differentiated, full[: op.outputs])
                return tuple(found[i] for i, u in zip(op.wrt, upstream, strict=True) if u is not None)

            _, pull = torch.func.vjp(first, *(t for t, f in zip(free, needed, strict=True) if f))[:2]
            it = iter(pull(tuple(u for u in upstream if u is not None)))
            return (*(next(it) if f else None for f in needed), *([None] * ctx.others))

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
            ctx.save_for_backward(*inputs[:n], *op.save_for_backward(ctx.plan, results[op.outputs :]))

        @staticmethod
        def backward(ctx, *grads):
            if ctx.plan.record is None:
                return gradients(ctx, grads)
            with ctx.plan.record.backward(ctx, grads):
                return ctx.plan.record.note(gradients(ctx, grads))

    functions: tuple[Any, ...] = (Forward, Gradient)
    for function in functions:
        # Function.apply inspects the signature of forward on every call (20 us); the C++ method behind it does not
        function.direct = super(Function, function).apply
    Forward.__name__ = Forward.__qualname__ = f"{op.name}_function"
    Gradient.__name__ = Gradient.__qualname__ = f"{op.name}_gradient"
    return Forward
