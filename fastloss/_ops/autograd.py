"""Turn a forward and a backward pass into one differentiable function.

The autograd of every loss, on one process (`Op`, whose passes are the operators `<name>_fwd` and `<name>_bwd`) and
over several (`Differentiable`, whose passes are Python). The convention:

    fwd(*tensors, *options) -> (*outputs, *saved)
    bwd(*grads of outputs, *tensors, *saved, *backward options) -> gradients of the tensors in `wrt`

The rules:

* The operators differentiate the tensors in `wrt`. Any other tensor that requires a gradient, every second derivative
  and every tangent goes through the loss's reference, which is plain PyTorch and takes `(*tensors, *options)`.
* A plain call, dense tensors and no transform around it, runs the kernels without the dispatcher. For anything else
  the call is that of the operator `fwd`, whose derivatives are those of `derivatives`.
* Tensors that autograd may still need are never overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fastloss._ops import abi, derivatives
from fastloss._ops.derivatives import as_tuple

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

functorch_active = derivatives.functorch_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_profiled = torch._C._autograd._profiler_enabled
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_Parameter, _strided = torch.nn.Parameter, torch.strided


def is_observed() -> bool:
    """Return whether a transform of torch.func, a mode or forward-mode differentiation surrounds the call."""
    return functorch_active() or _dispatch_modes() != 0 or forward_ad._current_level >= 0


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether kernels can read all tensors: no subclass, layout or bit that the dispatcher resolves."""
    for t in tensors:
        if t is not None:
            kind = type(t)
            if (kind is not Tensor and kind is not _Parameter) or t.layout is not _strided:
                return False
            if t.is_neg() or t._is_zerotensor() or _is_batched(t):
                return False
    return True


def contiguous_like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the shape of `x`."""
    return x.new_empty(x.shape)


class Plan:
    """The state that forward and backward of one call share."""

    fuse = False  # forward writes the gradients
    inplace: list | None = None  # backward writes the gradient over the input; emptied when it has
    needs_grad_mask = 0  # bit mask of the inputs whose gradients forward computes
    precomputed_grads: Sequence[Tensor] | None = None  # gradients computed in forward
    needed: Sequence[bool] | None = None  # the inputs whose gradients backward must return
    record: Any = None  # the profiler's record of this call

    def __init__(self, operators: Any):
        self.operators = operators


class Differentiable:
    """A function of `tensors` tensors (some may be None) and options, differentiable once, by two passes in Python.

    The first `outputs` results of the forward pass are the function's, the others are state for backward. A function
    with one output returns a tensor, else a tuple. It is differentiated with respect to the tensors in `wrt`. Compilers
    do not trace it.
    """

    def __init__(self, name: str, *, tensors: int, wrt: Sequence[int] = (0,), outputs: int = 1):
        self.name, self.tensors, self.wrt, self.outputs = name, tensors, tuple(wrt), outputs
        self._bits = sum(1 << i for i in self.wrt)
        self._function = _eager_function(self)

    def __call__(self, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any) -> Any:
        """Apply to `tensors`. `how` goes to `plan`: it changes how gradients are computed, never their values."""
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self.__call__)(tensors, options)  # here: it imports the compiler
        return self._run(SimpleNamespace(all=kernels()), tensors, options, self._needed(tensors), *how)

    @staticmethod
    def _needed(tensors: Sequence[Tensor | None]) -> int:
        """Return the bit mask of the tensors that require a gradient."""
        return sum(1 << i for i, t in enumerate(tensors) if t is not None and t.requires_grad)

    def _run(
        self, operators: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], needed: int, *how: Any
    ) -> Any:
        """Run the passes; `needed` is the bit mask of the tensors that require a gradient."""
        graph = needed != 0 and torch.is_grad_enabled()
        if profiler is not None:
            return self._profiled(operators, tensors, options, needed if graph else 0, *how)
        if graph:
            plan = self.plan(operators, tensors, options, needed, *how)
            return self._unwrap(self._function.direct(*tensors, *options, plan))
        return self._unwrap(self.run_forward(Plan(operators), tensors, options))

    def _profiled(
        self, operators: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], needed: int, *how: Any
    ) -> Any:
        record = profiler(self, tensors)
        with record.forward():
            if needed:
                plan = record.plan = self.plan(operators, tensors, options, needed, *how)
                plan.record = record
                return self._unwrap(record.note(self._function.direct(*tensors, *options, plan)))
            return self._unwrap(record.note(self.run_forward(Plan(operators), tensors, options)))

    def _unwrap(self, results: Any) -> Any:
        if isinstance(results, Tensor):
            return results
        return results[0] if self.outputs == 1 else tuple(results[: self.outputs])

    # ---- overridable

    def plan(
        self, operators: Any, tensors: Sequence[Tensor | None], options: Sequence[Any], needed: int
    ) -> Plan:
        """Plan a call that is to be differentiated, with respect to the tensors of the bit mask `needed`."""
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

    def gradients(
        self, plan: Plan, grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], saved: Sequence[Tensor],
        options: Sequence[Any], needed: Sequence[bool],
    ) -> Sequence[Tensor | None]:  # fmt: skip
        """Return the gradients of the tensors that are needed."""
        if torch.is_grad_enabled():
            self.differentiable_again(plan)
        plan.needed = needed
        found: list[Tensor | None] = [None] * self.tensors
        for i, g in zip(self.wrt, self.run_backward(plan, grads, tensors, saved, options), strict=True):
            found[i] = g if needed[i] else None
        return found

    def differentiable_again(self, plan: Plan) -> None:
        """Raise: the gradient cannot be differentiated again."""
        raise NotImplementedError(f"{self.name}: the gradient cannot be differentiated again")

    def flops(self, shapes: Sequence[torch.Size | None], needed: Sequence[bool]) -> int:
        """Return the FLOPs of the GEMMs behind the outputs and the gradients that are needed (0 if none)."""
        return 0


class Kernels:
    """The passes of an operator for tensors of one type of device, past the dispatcher.

    While torch's profiler runs they are called by the dispatcher, which tells it their names.
    """

    def __init__(self, operators: Any, device: str, profiled: bool):
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))

        def direct(operator: Any) -> Any:
            if operator is None:
                return None
            if profiled:
                return derivatives.without_autograd(operator)
            return functools.partial(operator._handle.redispatch_boxed, keyset)

        self.fwd, self.bwd, self.into = (direct(o) for o in (operators.fwd, operators.bwd, operators.into))
        self.all = operators.all


class Op(Differentiable):
    """A differentiable function whose passes are two operators of the dispatcher.

    `fake` computes the results of `fwd` as empty tensors, `gradient_like` the gradient of a tensor, with the strides
    that the kernels give it: by default those of the tensor. With `masked` the last option is the bit mask of the
    tensors of which backward returns the gradients; a call leaves it out.
    """

    backward_options: slice = slice(None)
    traced_extra: tuple = ()  # arguments of forward after the options, for the dispatcher
    saved: int | None = None  # the number of results after the outputs that backward needs; None: all
    masked: bool = False

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        tensors: int,
        wrt: Sequence[int] = (0,),
        outputs: int = 1,
        gradient_like: Callable[[Tensor], Tensor] = torch.empty_like,
    ):
        super().__init__(name, tensors=tensors, wrt=wrt, outputs=outputs)
        self.reference, self.fake, self.gradient_like = reference, fake, gradient_like
        self._operators: dict[str, Any] = {}
        self._kernels: dict[tuple[str, bool, bool], Kernels] = {}
        operators = self.operators()
        self._fwd = operators.fwd
        self.options = len(self._fwd._schema.arguments) - tensors - len(self.traced_extra)
        self.takes_no_grad = operators.bwd is not None and all(
            isinstance(a.type, torch.OptionalType) for a in operators.bwd._schema.arguments[:outputs]
        )
        derivatives.register(LIBRARY, self)

    def operators(self) -> Any:
        """Return the operators of the passes in the namespace in use; `all` is the whole namespace."""
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
            if _namespace != LIBRARY:  # another build of the kernels is differentiated in the same way
                derivatives.register_autograd(_namespace, self, found)
        return found

    def options_of(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return the options among the arguments of `fwd`."""
        return args[self.tensors : self.tensors + self.options]

    def __call__(self, tensors: Sequence[Tensor | None], options: Sequence[Any], *how: Any) -> Any:
        if torch.compiler.is_compiling() or is_observed():
            return self._dispatched(tensors, options, *how)
        needed, bit = 0, 1
        for t in tensors:
            if t is not None:  # as `are_plain`, and which require a gradient
                kind = type(t)
                if (kind is not Tensor and kind is not _Parameter) or t.layout is not _strided:
                    return self._dispatched(tensors, options, *how)
                if t.is_neg() or t._is_zerotensor():
                    return self._dispatched(tensors, options, *how)
                if t.requires_grad:
                    needed |= bit
            bit += bit
        first = tensors[0]
        if not (first.is_cpu or first.is_cuda):
            return self._dispatched(tensors, options, *how)
        key = _namespace, first.is_cpu, _is_profiled()
        operators = self._kernels.get(key)
        if operators is None:
            operators = self._kernels[key] = Kernels(self.operators(), first.device.type, key[-1])
        if self.masked:
            options = (*options, needed & self._bits)
        return self._run(operators, tensors, options, needed, *how)

    def _dispatched(self, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Any:
        """Call the operator, which sees to its derivatives itself."""
        if self.masked:
            options = (*options, 0)
        fwd = self._fwd if _namespace == LIBRARY else self.operators().fwd
        return self._unwrap(fwd(*tensors, *options, *self.traced_extra))

    def run_forward(self, plan, tensors, options):
        return plan.operators.fwd(*tensors, *options)

    def run_backward(self, plan, grads, tensors, saved, options):
        return as_tuple(plan.operators.bwd(*grads, *tensors, *saved, *options[self.backward_options]))

    def gradients(self, plan, grads, tensors, saved, options, needed):
        if torch.is_grad_enabled() or is_observed() or not (are_plain(grads) and are_plain(tensors)):
            self.differentiable_again(plan)
            return derivatives.backward(self, grads, tensors, self.saved_state(saved), options, needed)
        found: list[Tensor | None] = [None] * self.tensors
        others = [w and i not in self.wrt for i, w in enumerate(needed)]
        if any(others):  # before backward, which may overwrite a tensor
            found = derivatives.reference_gradients(self, tensors, options, grads, others)
        if any(needed[i] for i in self.wrt):
            plan.needed = needed
            for i, g in zip(self.wrt, self.run_backward(plan, grads, tensors, saved, options), strict=True):
                if needed[i]:
                    found[i] = g
        return found

    def saved_state(self, saved: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the state that `bwd` takes, from what `save_for_backward` saved."""
        return saved

    def differentiable_again(self, plan):
        pass

    def forward_mask(self, options: Sequence[Any], mask: int) -> int:
        """Return the mask that `fwd` takes, from that of the tensors that require a gradient."""
        return mask

    def fake_backward(self, *args: Any) -> Any:
        """Return the results of `bwd` as empty tensors, from shapes alone."""
        first = self.outputs
        like = [args[first + i] for i in self.wrt]  # an absent tensor has an empty gradient
        grads = [args[first].new_empty([0]) if x is None else self.gradient_like(x) for x in like]
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

    def plan(self, operators, tensors, options, needed):
        plan = Plan(operators)
        plan.fuse = (
            options[self.reduction] != 0
            and (not tensors[0].is_cpu or getattr(self._expect_unit, "value", True))
            and needed & self._bits != 0
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
        if options[self.reduction] != 0 and g.is_cpu:
            unit = self._expect_unit.value = g.item() == 1
            if unit and precomputed is not None:
                return precomputed
        if precomputed is None:
            return as_tuple(plan.operators.bwd(g, *args))
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
    masked = False

    def __init__(self, name: str, reference: Callable[..., Any], *, wrt: Sequence[int] = ()):
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

        return derivatives.without_autograd(run)

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

    def fake_backward(self, *args):
        like = args[self.outputs : self.outputs + self.tensors]
        mask = args[-1] if self.masked else -1
        grads = [
            like[0].new_empty([0]) if t is None or not mask >> i & 1 else t.new_empty(t.shape)
            for i, t in enumerate(like)
            if i in self.wrt
        ]
        return grads[0] if len(grads) == 1 else tuple(grads)

    def operators(self) -> Any:
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
            if _namespace != LIBRARY:  # another build of the kernels is differentiated in the same way
                derivatives.register_autograd(_namespace, self, found)
        return found


def _eager_function(op: Differentiable) -> Any:
    n = op.tensors

    class Forward(Function):
        @staticmethod
        def forward(ctx, *args):
            tensors, ctx.options, ctx.plan = args[:n], args[n:-1], args[-1]
            results = op.run_forward(ctx.plan, tensors, ctx.options)
            found = as_tuple(results)
            if len(found) > op.outputs:
                ctx.mark_non_differentiable(*found[op.outputs :])
            ctx.set_materialize_grads(False)  # else autograd fills zeros of the size of every other result
            ctx.save_for_backward(*tensors, *op.save_for_backward(ctx.plan, found[op.outputs :]))
            return results

        @staticmethod
        def backward(ctx, *grads):
            if ctx.plan.record is None:
                return gradients(ctx, grads)
            with ctx.plan.record.backward(ctx, grads):
                return ctx.plan.record.note(gradients(ctx, grads))

    def gradients(ctx, grads: Sequence[Tensor | None]):
        grads = grads[: op.outputs]
        none = (None,) * len(ctx.needs_input_grad)
        if all(g is None for g in grads):
            return none
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:n]
        return (*op.gradients(ctx.plan, grads, saved[:n], saved[n:], ctx.options, needed), *none[n:])

    # Function.apply inspects the signature of forward on every call (20 us); the C++ method behind it does not
    Forward.direct = super(Function, Forward).apply  # type: ignore[attr-defined]
    Forward.__name__ = Forward.__qualname__ = f"{op.name}_function"
    return Forward
