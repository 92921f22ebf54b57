"""Derivatives by every road that leads past the plain backward pass: forward mode, transforms, compilers, graphs.

Each road gives the number that repeated plain backward passes give, and none drops it.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support import (
    differentiable,
    fullest_case,
    make,
    of_tensors,
    one_of_each_driver,
    requiring,
    small_shape,
    some_cases,
    tensors,
    tiny_shape,
)
from support.layouts import lay, strided, transposed
from torch.autograd import functional
from torch.fx.experimental.proxy_tensor import make_fx

import fastloss.functional as F


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scalar(loss, kwargs, names):
    """The sum of the loss as a function of the named arguments."""
    function = of_tensors(loss, requiring(kwargs, []), names)
    return lambda *inputs: function(*inputs).sum()


def problem(loss, case, dtype=torch.float64):
    """A function of several inputs, the inputs, and directions for them."""
    kwargs = make(loss, case, dtype, shape=tiny_shape(loss))
    names = differentiable(loss, kwargs)
    inputs = tuple(kwargs[name].detach() for name in names)
    generator = torch.Generator().manual_seed(1)
    directions = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs)
    return scalar(loss, kwargs, names), inputs, directions


def gradient(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def gradient_and_product(function, inputs, directions):
    """The gradient, and the Hessian's product with the directions, by two backward passes."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    products = torch.autograd.grad(along, leaves, materialize_grads=True)
    return [g.detach() for g in grads], products


def dot(grads, directions):
    return sum((g * v).sum() for g, v in zip(grads, directions, strict=True))


def assert_all_close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())


# ---- forward mode ---------------------------------------------------------------------------------------


@some_cases
def test_dual_numbers(loss, case):
    """A tangent of one input and of all; the value stays what it is."""
    function, inputs, directions = problem(loss, case)
    grads = gradient(function, inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, directions, strict=True)]
        value, tangent = forward_ad.unpack_dual(function(*duals))
        torch.testing.assert_close(tangent, dot(grads, directions))
        torch.testing.assert_close(value, function(*inputs))
        for i, dual in enumerate(duals):
            one = [dual if j == i else x for j, x in enumerate(inputs)]
            tangent = forward_ad.unpack_dual(function(*one)).tangent
            torch.testing.assert_close(tangent, (grads[i] * directions[i]).sum())


@some_cases
def test_tangent_of_the_gradient(loss, case):
    """Forward over reverse, by dual numbers and by torch.func.jvp."""
    function, inputs, directions = problem(loss, case)
    grads, products = gradient_and_product(function, inputs, directions)
    every = tuple(range(len(inputs)))
    got = torch.func.jvp(torch.func.grad(function, argnums=every), inputs, directions)
    assert_all_close(got[0], grads)
    assert_all_close(got[1], products)
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in inputs]
        duals = [forward_ad.make_dual(x, v) for x, v in zip(leaves, directions, strict=True)]
        tangents = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(function(*duals), leaves)]
        assert_all_close(
            [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)], products
        )


@some_cases
def test_gradient_of_the_tangent(loss, case):
    """Reverse over forward."""
    function, inputs, directions = problem(loss, case)
    _, products = gradient_and_product(function, inputs, directions)
    along = torch.func.grad(
        lambda *x: torch.func.jvp(function, x, directions)[1], argnums=tuple(range(len(inputs)))
    )
    assert_all_close(along(*inputs), products)


@some_cases
def test_linearize(loss, case):
    function, inputs, directions = problem(loss, case)
    value, product = torch.func.linearize(function, *inputs)
    torch.testing.assert_close(value, function(*inputs))
    torch.testing.assert_close(product(*directions), dot(gradient(function, inputs), directions))


# ---- batched gradients ----------------------------------------------------------------------------------


@some_cases
def test_jacobians_and_hessians_of_every_strategy(loss, case):
    kwargs = make(loss, case, shape=tiny_shape(loss))
    names = differentiable(loss, kwargs)[:1]
    function = of_tensors(loss, requiring(kwargs, []), names)
    x = kwargs[names[0]].detach()
    expected = functional.jacobian(function, x)
    for found in (
        functional.jacobian(function, x, vectorize=True),
        functional.jacobian(function, x, vectorize=True, strategy="forward-mode"),
        torch.func.jacfwd(function)(x),
        torch.func.jacrev(function)(x),
    ):
        torch.testing.assert_close(found, expected)

    def total(x):
        return function(x).sum()

    expected = functional.hessian(total, x)
    for found in (
        functional.hessian(total, x, vectorize=True),
        functional.hessian(total, x, vectorize=True, outer_jacobian_strategy="forward-mode"),
        torch.func.hessian(total)(x),
        torch.func.jacrev(torch.func.jacrev(total))(x),
        torch.func.jacrev(torch.func.jacfwd(total))(x),
    ):
        torch.testing.assert_close(found, expected)


@some_cases
def test_batched_upstream_gradients(loss, case):
    kwargs = make(loss, case, shape=tiny_shape(loss))
    names = differentiable(loss, kwargs)
    leaves = [kwargs[name] for name in names]
    value = loss.function(**kwargs)
    upstream = torch.stack([torch.full_like(value, u) for u in (1.0, 0.5, -2.0)])
    for create_graph in (False, True):
        got = torch.autograd.grad(
            value, leaves, upstream, is_grads_batched=True, retain_graph=True, create_graph=create_graph
        )
        each = [torch.autograd.grad(value, leaves, u, retain_graph=True) for u in upstream]
        assert_all_close(got, [torch.stack(g) for g in zip(*each, strict=True)])


# ---- torch.compile --------------------------------------------------------------------------------------


def roads(function, directions):
    """Transforms of the function by name, and which plain result each gives: gradient, slope or product."""
    every = tuple(range(len(directions)))
    grad = torch.func.grad(function, argnums=every)

    def beside_others(*inputs):
        """A gradient in which the loss's part would not be missed."""
        more = torch.func.grad(lambda *x: function(*x) + sum(t.sum() for t in x), argnums=every)(*inputs)
        return tuple(g - 1 for g in more)

    def each_sample(*inputs):
        stacked = torch.func.vmap(grad)(*(torch.stack([x, x]) for x in inputs))
        return tuple(g[1] for g in stacked)

    return {
        "grad": (grad, "gradient"),
        "grad beside others": (beside_others, "gradient"),
        "vmap of grad": (each_sample, "gradient"),
        "vjp": (lambda *x: torch.func.vjp(function, *x)[1](torch.ones((), dtype=x[0].dtype)), "gradient"),
        "jvp": (lambda *x: (torch.func.jvp(function, x, directions)[1],), "slope"),
        "jvp of grad": (lambda *x: torch.func.jvp(grad, x, directions)[1], "product"),
    }


@fullest_case
def test_compiled_transforms(loss, case):
    """One graph for each, and never a zero in the place of a derivative."""
    function, inputs, directions = problem(loss, case)
    grads, products = gradient_and_product(function, inputs, directions)
    expected = {"gradient": grads, "slope": [dot(grads, directions)], "product": products}
    for road, which in roads(function, directions).values():
        compiled = torch.compile(road, backend="aot_eager", fullgraph=True)
        assert_all_close(compiled(*inputs), expected[which])


@one_of_each_driver
@pytest.mark.slow
def test_transforms_compiled_by_inductor(loss):
    function, inputs, directions = problem(loss, next(iter(loss.cases)))
    grads, products = gradient_and_product(function, inputs, directions)
    expected = {"gradient": grads, "slope": [dot(grads, directions)], "product": products}
    for road, which in roads(function, directions).values():
        assert_all_close(torch.compile(road, fullgraph=True)(*inputs), expected[which])


@fullest_case
def test_compiled_with_inputs_that_are_permuted_in_memory(loss, case):
    """As a model gives them that has the batch in another place: transposed, and every second element."""
    kwargs = make(loss, case, torch.float32, shape=small_shape(loss))
    names = differentiable(loss, kwargs)
    options = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Tensor)}
    function = functools.partial(loss.function, **options)
    for layout in (transposed, strided):
        results = []
        for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            laid = {k: lay(v, layout) if k in names else v.detach() for k, v in tensors(kwargs).items()}
            leaves = {
                k: v.requires_grad_(k in names) if v.is_floating_point() else v for k, v in laid.items()
            }
            value = call(**leaves)
            value.sum().backward()
            results.append([value, *(leaves[name].grad for name in names)])
        assert_all_close(*results)


# ---- graphs ---------------------------------------------------------------------------------------------


class Trained(torch.nn.Module):
    """A model whose parameters are the loss's inputs."""

    def __init__(self, function, inputs) -> None:
        super().__init__()
        self.function = function
        self.inputs = torch.nn.ParameterList(inputs)

    def forward(self, one):
        return self.function(*(x * one for x in self.inputs))


@fullest_case
def test_exported_program_trains(loss, case):
    function, inputs, _ = problem(loss, case, torch.float32)
    one = torch.ones(())
    program = torch.export.export(Trained(function, inputs), (one,), strict=False).module()
    program(one).backward()
    assert_all_close([p.grad for p in program.parameters()], gradient(function, inputs))


@some_cases
def test_traced_with_its_gradient(loss, case):
    function, inputs, _ = problem(loss, case)

    def step(*inputs):
        value = function(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    leaves = [x.clone().requires_grad_() for x in inputs]
    graph = make_fx(step)(*leaves)
    assert_all_close(graph(*leaves), [function(*inputs), *gradient(function, inputs)])


# ---- operators ------------------------------------------------------------------------------------------


def test_operators_without_derivative_refuse_to_be_differentiated():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.ops.fastloss.row_reduce(x, None)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        torch.ops.fastloss.row_reduce(forward_ad.make_dual(x.detach(), torch.ones(3)), None)
    assert torch.ops.fastloss.row_reduce(x.detach(), None).shape == ()
    with torch.no_grad():
        assert not torch.ops.fastloss.row_reduce(x, None).requires_grad


def test_every_operator_has_an_autograd_kernel():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastloss::")]
    assert len(names) > 100
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), name


def test_gradient_called_as_an_operator_is_not_differentiated_in_silence():
    x = torch.randn(3, 4, requires_grad=True)
    _, state, _ = torch.ops.fastloss.cross_entropy_fwd(
        x, torch.tensor([0, 1, 2]), None, None, -100, 1, 1.0, 0.0, [0.0, 0.0], False, False
    )
    gradient = torch.ops.fastloss.cross_entropy_bwd(
        torch.ones(()), x, torch.tensor([0, 1, 2]), None, None, state, 1.0, 0.0, [0.0, 0.0]
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated alone"):
        gradient.sum().backward()


# ---- odd tensors ----------------------------------------------------------------------------------------


def test_tensors_that_the_dispatcher_resolves():
    """Lazily negated numbers, subclasses, and tensors without memory are not read past the dispatcher."""
    z = torch.randn(4, 6, dtype=torch.complex64)
    negated, y = z.conj().imag, torch.arange(4)
    assert negated.is_neg()
    torch.testing.assert_close(F.cross_entropy(negated, y), F.cross_entropy(negated.clone(), y))
    torch.testing.assert_close(
        F.mse_loss(negated, negated * 2), F.mse_loss(z.conj().imag.clone(), negated * 2)
    )
    assert F.cross_entropy(torch._efficientzerotensor(4, 6), y).item() == pytest.approx(math.log(6))

    class Named(torch.Tensor):
        pass

    x = torch.randn(4, 6)
    named = x.as_subclass(Named).requires_grad_()
    F.cross_entropy(named, y).backward()
    plain = x.clone().requires_grad_()
    F.cross_entropy(plain, y).backward()
    torch.testing.assert_close(named.grad.as_subclass(torch.Tensor), plain.grad)


def test_sparse_tensors_are_refused():
    with pytest.raises((NotImplementedError, RuntimeError)):
        F.mse_loss(torch.eye(3).to_sparse(), torch.eye(3))
