"""Every way of asking PyTorch for a derivative."""

from __future__ import annotations

import pytest
import torch
from support import (
    Answer,
    copied,
    differentiable,
    fused,
    has_reductions,
    make,
    of_tensors,
    requiring,
    same_bits,
    some_cases,
    some_dtypes,
    tensors,
    tiny_shape,
    upstream_like,
)
from torch.autograd import grad, gradcheck, gradgradcheck


def call(loss, kwargs):
    """The loss as a function of its differentiable inputs, and those inputs."""
    names = differentiable(loss, kwargs)
    return of_tensors(loss, kwargs, names), tuple(kwargs[name] for name in names)


@some_cases
def test_gradcheck(loss, case, device):
    function, inputs = call(loss, make(loss, case, device=device, shape=tiny_shape(loss)))
    assert gradcheck(function, inputs)


@some_cases
def test_gradgradcheck(loss, case, device):
    function, inputs = call(loss, make(loss, case, device=device, shape=tiny_shape(loss)))
    assert gradgradcheck(function, inputs)


@some_dtypes
@some_cases
def test_create_graph_gives_the_same_gradient(loss, case, dtype, device):
    function, inputs = call(loss, make(loss, case, dtype, device))
    value = function(*inputs)
    upstream = upstream_like(value)
    plain = grad(value, inputs, upstream, retain_graph=True)
    for first, second in zip(plain, grad(value, inputs, upstream, create_graph=True), strict=True):
        assert second.requires_grad
        torch.testing.assert_close(second.detach(), first)


# ---- torch.func -----------------------------------------------------------------------------------------


@some_cases
def test_func_grad(loss, case, device):
    kwargs = make(loss, case, device=device)
    function, inputs = call(loss, kwargs)
    got = torch.func.grad(lambda *x: function(*x).sum(), argnums=tuple(range(len(inputs))))(*inputs)
    for a, b in zip(got, grad(function(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@some_cases
def test_func_jacrev(loss, case, device):
    kwargs = make(loss, case, device=device, shape=tiny_shape(loss))
    function, inputs = call(loss, kwargs)
    got = torch.func.jacrev(function, argnums=tuple(range(len(inputs))))(*inputs)
    expected = torch.autograd.functional.jacobian(function, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def batch_of_calls(loss, case, device, n=3):
    """`n` calls that differ in every tensor, and the same stacked along a new first dimension."""
    calls = [make(loss, case, device=device, seed=seed) for seed in range(n)]
    names = list(tensors(calls[0]))
    return calls, names, [torch.stack([kwargs[name].detach() for kwargs in calls]) for name in names]


@some_cases
def test_vmap(loss, case, device):
    calls, names, stacked = batch_of_calls(loss, case, device)
    got = torch.func.vmap(of_tensors(loss, calls[0], names))(*stacked)
    expected = torch.stack([loss.function(**kwargs).detach() for kwargs in calls])
    torch.testing.assert_close(got, expected)


@some_cases
def test_vmap_over_one_argument(loss, case, device):
    """The others are shared, and the mapped dimension is not the first."""
    calls, names, stacked = batch_of_calls(loss, case, device)
    for i, name in enumerate(names):
        got = torch.func.vmap(of_tensors(loss, calls[0], [name]), in_dims=-1)(stacked[i].movedim(0, -1))
        expected = torch.stack([loss.function(**calls[0] | {name: kwargs[name]}) for kwargs in calls])
        torch.testing.assert_close(got, expected.detach())


@some_cases
def test_vmap_of_grad(loss, case, device):
    calls, names, stacked = batch_of_calls(loss, case, device)
    wrt = differentiable(loss, calls[0])
    places = tuple(names.index(name) for name in wrt)
    one = of_tensors(loss, calls[0], names)
    got = torch.func.vmap(torch.func.grad(lambda *x: one(*x).sum(), argnums=places))(*stacked)
    expected = [grad(loss.function(**kwargs).sum(), [kwargs[n] for n in wrt]) for kwargs in calls]
    for a, b in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


@some_cases
def test_grad_of_vmap(loss, case, device):
    calls, names, stacked = batch_of_calls(loss, case, device)
    wrt = differentiable(loss, calls[0])
    for name, x in zip(names, stacked, strict=True):
        x.requires_grad_(name in wrt)
    value = torch.func.vmap(of_tensors(loss, calls[0], names))(*stacked)
    upstream = upstream_like(value)
    got = grad(value, [x for x in stacked if x.requires_grad], upstream)
    expected = [
        grad(loss.function(**kwargs), [kwargs[n] for n in wrt], up)
        for kwargs, up in zip(calls, upstream, strict=True)
    ]
    for a, b in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


# ---- one graph, used in unusual ways --------------------------------------------------------------------


@some_dtypes
@some_cases
def test_second_backward(loss, case, dtype, device):
    """It gives the same bits in other memory, and what the first gave is left alone."""
    function, inputs = call(loss, make(loss, case, dtype, device))
    value = function(*inputs)
    upstream = upstream_like(value)
    first = grad(value, inputs, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.add_(1)  # an optimiser or a hook may do this
    second = grad(value, inputs, upstream, retain_graph=True)
    third = grad(value, inputs, 2 * upstream)
    for a, b, c, saved in zip(first, second, third, kept, strict=True):
        assert same_bits(b, saved)
        assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
        assert same_bits(a, saved + 1)
        torch.testing.assert_close(c, 2 * saved)


@some_cases
def test_backward_twice_without_retain_graph_raises(loss, case, device):
    function, inputs = call(loss, make(loss, case, device=device))
    value = function(*inputs).sum()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


@some_cases
def test_gradient_accumulates(loss, case, device):
    kwargs = make(loss, case, torch.float32, device)
    function, inputs = call(loss, kwargs)
    once = grad(function(*inputs).sum(), inputs)
    for x in inputs:
        x.grad = torch.ones_like(x)
    function(*inputs).sum().backward()
    function(*inputs).sum().backward()
    for x, g in zip(inputs, once, strict=True):
        torch.testing.assert_close(x.grad, 1 + g + g)


@some_cases
def test_two_losses_share_their_inputs(loss, case, device):
    kwargs = make(loss, case, torch.float32, device)
    function, inputs = call(loss, kwargs)
    once = grad(function(*inputs).sum(), inputs)
    both = function(*inputs).sum() + 2 * function(*inputs).sum() + sum(x.sum() for x in inputs)
    for g, expected in zip(grad(both, inputs), once, strict=True):
        torch.testing.assert_close(g, 3 * expected + 1)


@some_cases
def test_inside_a_larger_graph(loss, case, device):
    """Inputs that are not leaves, a scaled loss, hooks on both sides."""
    kwargs = make(loss, case, torch.float32, device)
    function, leaves = call(loss, kwargs)
    once = grad(function(*leaves).sum(), leaves)
    seen = []
    inputs = [x * 1 for x in leaves]
    for x in inputs:
        x.register_hook(lambda g: seen.append(g) or g * 10)
    value = function(*inputs)
    value.register_hook(lambda g: g * 0.5)
    (value * 3).sum().backward()
    assert len(seen) == len(leaves)
    for leaf, expected in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 15 * expected)


@some_cases
def test_each_row_has_its_own_upstream(loss, case, device):
    if not has_reductions(loss):
        return
    kwargs = make(loss, case, device=device, reduction="none")
    function, inputs = call(loss, kwargs)
    value = function(*inputs)
    upstream = upstream_like(value)
    by_rows = [grad(v, inputs, retain_graph=True) for v in value.flatten()]
    pairs = (zip(upstream.flatten(), grads, strict=True) for grads in zip(*by_rows, strict=True))
    expected = [sum(u * g for u, g in pair) for pair in pairs]
    for g, e in zip(grad(value, inputs, upstream), expected, strict=True):
        torch.testing.assert_close(g, e)


# ---- no gradient wanted ---------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradient(loss, case, mode, device):
    kwargs = make(loss, case, torch.float32, device)
    with mode():
        quiet = loss.function(**kwargs)
        made_inside = loss.function(**copied(kwargs))
    assert not quiet.requires_grad
    assert quiet.grad_fn is None
    expected = loss.function(**kwargs)
    assert expected.requires_grad
    assert same_bits(quiet, expected)
    assert same_bits(made_inside, expected)


@some_cases
def test_no_graph_without_requires_grad(loss, case, device):
    kwargs = requiring(make(loss, case, torch.float32, device), [])
    value = loss.function(**kwargs)
    assert not value.requires_grad
    assert isinstance(fused(loss, kwargs, []), Answer)


@some_cases
def test_gradient_only_for_what_needs_it(loss, case, device):
    kwargs = make(loss, case, torch.float32, device)
    names = differentiable(loss, kwargs)
    for name in names:
        one = requiring(kwargs, [name])
        loss.function(**one).sum().backward()
        assert one[name].grad is not None
        assert all(one[other].grad is None for other in names if other != name)
