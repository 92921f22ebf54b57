"""Derivatives of an operator by every road to it: what the dispatcher calls where an argument is differentiated.

A loss called from Python in the plain way goes past the dispatcher (`autograd.Op`). Every other road, torch.compile,
torch.export, torch.func, forward-mode differentiation, fake tensors, or a call of `torch.ops.fastloss` by anybody,
reaches the kernels that `register` puts under the key `Autograd`:

* `fwd` is differentiated by `bwd`; inputs outside of `wrt`, and tangents, go through the loss's reference.
* `bwd` is differentiated, and has tangents, by the reference.
* Any other operator of the library refuses to be differentiated.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

if TYPE_CHECKING:
    from fastloss._ops.autograd import Op

_below_autograd = torch._C._AutoDispatchBelowAutograd
_after_autograd = torch._C._after_autograd_keyset
functorch_active = torch._C._are_functorch_transforms_active

_libraries: dict[str, Any] = {}  # registrations live as long as the library object
_backward_of = threading.local()
"""`options`: those of the call whose `bwd` runs on this thread, of which its arguments are only a part."""

_ALONE = "{}: cannot be differentiated alone, only as the gradient of a loss"


def requires_grad(tensors: Sequence[Any]) -> bool:
    for t in tensors:  # noqa: SIM110  any() of a generator takes three times as long
        if t is not None and t.requires_grad:
            return True
    return False


def as_tuple(results: Any) -> Sequence[Any]:
    return (results,) if isinstance(results, Tensor) else results


def has_tangent(tensors: Sequence[Any]) -> bool:
    """Return whether a tensor carries the tangent of forward-mode differentiation.

    Asked of the tensors, because code that torch.compile made opens a level unknown to `torch.autograd.forward_ad`.
    """
    if not torch._C._is_fwd_grad_enabled():
        return False
    floating = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
    return any(torch._VF._unpack_dual(t, 0)[1] is not None for t in floating)


def _alias(t: Tensor) -> Tensor:
    """Return `t` as a tensor to differentiate with respect to: the graph behind it goes on to `t`."""
    alias = t.view_as(t)
    if alias.requires_grad:
        return alias
    if not functorch_active():
        return alias.requires_grad_()
    before = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        return alias.requires_grad_()
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(before)


def _selected(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [v for v, w in zip(values, wanted, strict=True) if w]


def _gradients(
    values: Sequence[Tensor], of: Sequence[Tensor], upstream: Sequence[Tensor], create_graph: bool
) -> list[Tensor | None]:
    """Return the gradients of the values that have one; None for what none of them depends on."""
    pairs = [(v, g.to(v.dtype)) for v, g in zip(values, upstream, strict=True) if v.requires_grad]
    if not pairs:
        return [None] * len(of)
    some, above = zip(*pairs, strict=True)
    return list(torch.autograd.grad(some, of, above, create_graph=create_graph, allow_unused=True))


def reference_outputs(op: Op, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Sequence[Tensor]:
    return as_tuple(op.reference(*tensors, *options))


def reference_gradients(
    op: Op,
    tensors: Sequence[Tensor | None],
    options: Sequence[Any],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the `wanted` tensors by the reference's operations, differentiable in any way."""
    with torch.enable_grad():
        own = [_alias(t) if w else t for t, w in zip(tensors, wanted, strict=True)]
        given = [g is not None for g in grads]
        values = _selected(reference_outputs(op, own, options), given)
        free = _selected(own, wanted)
        found = _gradients(values, free, _selected(grads, given), create_graph=True)
        it = iter(torch.zeros_like(x) if g is None else g for x, g in zip(free, found, strict=True))
    return [next(it) if w else None for w in wanted]


def _apply(function: Any, *args: Any) -> Any:
    """Apply a function of one level of transforms, as the dispatcher asks for it."""
    if not functorch_active():
        return function.direct(*args)
    with enable_single_level_autograd_function():
        return function.direct(*args)


def _below(operator: Any, keyset: Any, args: Sequence[Any], **kwargs: Any) -> Any:
    """Run the operator without autograd; transforms of torch.func around this one still differentiate it."""
    with _below_autograd():
        if not functorch_active():
            return operator.redispatch(keyset & _after_autograd, *args, **kwargs)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # off inside an autograd function
            return operator.redispatch(keyset & _after_autograd, *args, **kwargs)


def without_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with autograd off for the operators that it calls."""

    def call(*args: Any) -> Any:
        with _below_autograd():
            return function(*args)

    return call


@contextlib.contextmanager
def _options_of(options: Sequence[Any]) -> Iterator[None]:
    before = getattr(_backward_of, "options", None)
    _backward_of.options = options
    try:
        yield
    finally:
        _backward_of.options = before


def backward(
    op: Op,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    options: Sequence[Any],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of the `needed` tensors, by the operator `bwd` and the reference; they have a graph."""
    found: list[Tensor | None] = [None] * op.tensors
    others = [w and i not in op.wrt for i, w in enumerate(needed)]
    if any(others):
        found = reference_gradients(op, tensors, options, grads, others)
    if any(needed[i] for i in op.wrt):
        if op.masked:
            options = (*options[:-1], sum(1 << i for i in op.wrt if needed[i]))
        with _options_of(options):
            results = as_tuple(op.operators().bwd(*grads, *tensors, *saved, *options[op.backward_options]))
        for i, grad in zip(op.wrt, results, strict=True):
            found[i] = grad if needed[i] else None
    return found


def _forward_function(op: Op) -> type[Function]:
    """Return `fwd` as an autograd function, whose gradient is `bwd`."""
    n, outputs = op.tensors, op.outputs

    class Forward(Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, operator, keyset = args
            results = _below(operator, keyset, inputs)
            outs = as_tuple(results)
            if len(outs) > outputs:
                ctx.mark_non_differentiable(*outs[outputs:])
            ctx.set_materialize_grads(False)  # else autograd fills zeros of the size of every other result
            ctx.options = op.options_of(inputs)
            ctx.like = [(o.shape, o.dtype, o.device) for o in outs[:outputs]]
            ctx.save_for_backward(*inputs[:n], *outs[outputs:][: op.saved])
            return results

        @staticmethod
        def backward(ctx, *grads):
            none = (None,) * len(ctx.needs_input_grad)
            upstream = list(grads[:outputs])
            if all(g is None for g in upstream):
                return none
            if not op.takes_no_grad:
                upstream = [
                    torch.zeros(shape, dtype=dtype, device=device) if g is None else g
                    for g, (shape, dtype, device) in zip(upstream, ctx.like, strict=True)
                ]
            saved = ctx.saved_tensors
            found = backward(op, upstream, saved[:n], saved[n:], ctx.options, ctx.needs_input_grad[:n])
            return (*found, *none[n:])

    Forward.__name__ = Forward.__qualname__ = f"{op.name}_forward"
    Forward.direct = super(Function, Forward).apply  # type: ignore[attr-defined]
    return Forward


def _backward_function(op: Op) -> type[Function]:
    """Return `bwd` as an autograd function, whose gradient is the reference's."""
    n, outputs = op.tensors, op.outputs
    free = outputs + n

    class Backward(Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, ctx.options, operator, keyset = args
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[:free])
            return _below(operator, keyset, inputs)

        @staticmethod
        def backward(ctx, *upstream):
            none = (None,) * len(ctx.needs_input_grad)
            if all(u is None for u in upstream):
                return none
            if ctx.options is None:
                raise RuntimeError(_ALONE.format(f"{op.name}_bwd"))
            tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[:free]
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                own = [_alias(t) if w else t for t, w in zip(tensors, needed, strict=True)]
                wanted = _differentiated(op, own[outputs:], ctx.options)
                first = reference_gradients(op, own[outputs:], ctx.options, own[:outputs], wanted)
                asked = [u is not None and wanted[i] for i, u in zip(op.wrt, upstream, strict=True)]
                values = _selected([first[i] for i in op.wrt], asked)
                mine = _selected(own, needed)
                found = _gradients(values, mine, _selected(upstream, asked), create_graph)
            it = iter(torch.zeros_like(x) if g is None else g for x, g in zip(mine, found, strict=True))
            return (*(next(it) if w else None for w in needed), *none[free:])

    Backward.__name__ = Backward.__qualname__ = f"{op.name}_backward"
    Backward.direct = super(Function, Backward).apply  # type: ignore[attr-defined]
    return Backward


def _differentiated(op: Op, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> list[bool]:
    """Return which tensors have a gradient among the results of `bwd`."""
    mask = options[-1] if op.masked else -1
    return [i in op.wrt and t is not None and bool(mask >> i & 1) for i, t in enumerate(tensors)]


def _forward_kernel(op: Op, operator: Any) -> Callable[..., Any]:
    n, outputs, function = op.tensors, op.outputs, _forward_function(op)
    constant = [i for i in range(n) if i not in op.wrt]

    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = args[:n]
        tangent = has_tangent(tensors)
        wanted = torch.is_grad_enabled() and requires_grad(tensors)
        if not (tangent or wanted) or op.reference is None:  # without a reference: integers
            return _below(operator, keyset, args)
        if tangent or requires_grad([tensors[i] for i in constant]):
            results = as_tuple(_below(operator, keyset, args))
            values = reference_outputs(op, tensors, op.options_of(args))
            values = [v.to(r.dtype) for v, r in zip(values, results[:outputs], strict=True)]
            return values[0] if len(results) == 1 else (*values, *results[outputs:])
        if op.masked:
            at = n + op.options - 1
            mask = sum(1 << i for i in op.wrt if tensors[i] is not None and tensors[i].requires_grad)
            mask = op.forward_mask(op.options_of(args), mask | args[at])
            args = (*args[:at], mask, *args[at + 1 :])
        return _apply(function, *args, operator, keyset)

    return kernel


def _backward_kernel(op: Op, operator: Any) -> Callable[..., Any]:
    outputs, function = op.outputs, _backward_function(op)
    free = outputs + op.tensors

    def kernel(keyset: Any, *args: Any) -> Any:
        tangent = has_tangent(args[:free])
        if not (tangent or (torch.is_grad_enabled() and requires_grad(args[:free]))):
            return _below(operator, keyset, args)
        options = getattr(_backward_of, "options", None)
        if not tangent:
            return _apply(function, *args, options, operator, keyset)
        if options is None:
            raise RuntimeError(_ALONE.format(operator.name()))
        tensors = args[outputs:free]
        wanted = _differentiated(op, tensors, options)
        found = reference_gradients(op, tensors, options, args[:outputs], wanted)
        results = [tensors[0].new_empty(0) if found[i] is None else found[i] for i in op.wrt]
        return results[0] if len(results) == 1 else tuple(results)

    return kernel


def _refusal(operator: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if has_tangent(tensors) or (torch.is_grad_enabled() and requires_grad(tensors)):
            raise RuntimeError(
                f"{operator.name()}: has no derivative; detach its arguments, or call the loss"
            )
        return _below(operator, keyset, args, **kwargs)

    return kernel


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


def _implement(namespace: str, name: str, kernel: Callable[..., Any]) -> None:
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    _libraries[namespace].impl(name, kernel, "Autograd", with_keyset=True)


def register_autograd(namespace: str, op: Op, operators: Any) -> None:
    """Register the derivatives of an operator's passes."""
    _implement(namespace, f"{op.name}_fwd", _forward_kernel(op, operators.fwd))
    if operators.bwd is not None:
        _implement(namespace, f"{op.name}_bwd", _backward_kernel(op, operators.bwd))


def register(namespace: str, op: Op) -> None:
    """Register the derivatives, fake kernels and batching rules of an operator's passes."""
    operators = op.operators()
    fwd, bwd = f"{namespace}::{op.name}_fwd", f"{namespace}::{op.name}_bwd"
    torch.library.register_fake(fwd, op.fake)
    torch.library.register_vmap(fwd, _each_sample(operators.fwd))
    register_autograd(namespace, op, operators)
    if operators.bwd is not None:
        torch.library.register_fake(bwd, op.fake_backward)
        torch.library.register_vmap(bwd, _each_sample(operators.bwd))
    if operators.into is not None:
        torch.library.register_fake(f"{namespace}::{op.name}_bwd_into", lambda *_: None)


def refuse_others(namespace: str) -> None:
    """Register a refusal for every operator of the library that has no derivative."""
    for full_name in torch._C._dispatch_get_all_op_names():
        if full_name.startswith(f"{namespace}::") and not torch._C._dispatch_has_kernel_for_dispatch_key(
            full_name, "Autograd"
        ):
            name = full_name.removeprefix(f"{namespace}::")
            _implement(namespace, name, _refusal(getattr(getattr(torch.ops, namespace), name).default))
