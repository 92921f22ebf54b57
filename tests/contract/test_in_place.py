"""`inplace_backward`: the gradient in the memory of the logits, right or refused before anything is written."""

from __future__ import annotations

import threading

import pytest
import torch
from support import (
    copied,
    differentiable,
    evaluate,
    every_in_place_case,
    fused,
    make,
    requiring,
    same_bits,
    some_dtypes,
)
from support.layouts import LAYOUTS, expanded, lay
from torch.utils.checkpoint import checkpoint

import fastloss.functional as F
from fastloss._ops import rowwise
from fastloss._registry.inputs import in_place


@some_dtypes
@every_in_place_case
def test_in_place_backward_takes_the_inputs_memory(loss, case, dtype, device):
    """Same numbers, no second tensor; and the overwritten input is not used by mistake afterwards."""
    kwargs = make(loss, case, dtype, device)
    names = differentiable(loss, kwargs)
    pure, call = copied(kwargs), in_place(loss.function)
    expected = fused(loss, pure, names)
    with torch.no_grad():
        torch.testing.assert_close(call(**kwargs), expected.value)
    assert all(same_bits(kwargs[n], pure[n]) for n in names), "written although nothing needs a gradient"

    value = call(**kwargs)
    inputs = [kwargs[n] for n in names]
    grads = torch.autograd.grad(value, inputs, torch.ones_like(value), retain_graph=True)
    assert any(g.data_ptr() == x.data_ptr() for g, x in zip(grads, inputs, strict=True))
    torch.testing.assert_close(value.detach(), expected.value)
    ones = evaluate(loss.function, pure, names, torch.ones_like(value))
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, ones.grads[name])
    with pytest.raises(RuntimeError):
        torch.autograd.grad(value, inputs, torch.ones_like(value))


@pytest.mark.parametrize("inplace", [False, True])
@every_in_place_case
def test_in_place_backward_is_of_one_call(loss, case, inplace, device, monkeypatch):
    """A second thread calls the same operator the other way while the first is on its way to it."""
    entered, overtaken = threading.Event(), threading.Event()
    first, second = (make(loss, case, device=device, seed=seed) for seed in range(2))
    (name, *_) = differentiable(loss, first)
    plan = rowwise.RowOp.plan

    def paused(*args):
        if threading.current_thread().name == "first" and not entered.is_set():
            entered.set()
            assert overtaken.wait(60)
        return plan(*args)

    monkeypatch.setattr(rowwise.RowOp, "plan", paused)

    def taken(kwargs, inplace):
        call = in_place(loss.function) if inplace else loss.function
        (grad,) = torch.autograd.grad(call(**kwargs).sum(), kwargs[name])
        return grad.data_ptr() == kwargs[name].data_ptr()

    found = []
    thread = threading.Thread(target=lambda: found.append(taken(first, inplace)), name="first")
    thread.start()
    assert entered.wait(60)
    found.append(taken(second, not inplace))
    overtaken.set()
    thread.join()
    assert found == [not inplace, inplace]


@every_in_place_case
def test_beside_every_other_gradient(loss, case, device):
    """Weights and soft targets are differentiated from the logits before these are overwritten."""
    kwargs = make(loss, case, device=device)
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    expected = evaluate(loss.function, kwargs, names)
    found = evaluate(in_place(loss.function), kwargs, names)
    for name in names:
        torch.testing.assert_close(found.grads[name], expected.grads[name])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@every_in_place_case
def test_in_every_layout(loss, case, layout, device):
    kwargs = make(loss, case, torch.float32, device)
    (name, *_) = differentiable(loss, kwargs)
    x = lay(kwargs[name], layout)
    laid = requiring(kwargs | {name: x}, [name])
    call = in_place(loss.function)
    if layout is expanded:
        before = x.clone()
        with pytest.raises(RuntimeError, match="share no memory"):
            call(**laid)
        assert torch.equal(x, before)
        return
    ones = evaluate(loss.function, kwargs | {name: x.clone()}, [name], torch.ones(()))
    value = call(**laid)
    (grad,) = torch.autograd.grad(value, laid[name], torch.ones_like(value))
    torch.testing.assert_close(grad, ones.grads[name])


def drawn():
    torch.manual_seed(0)
    return torch.randn(6, 7), torch.arange(6)


def wanted(x, y, factor=1.0):
    x = x.clone().requires_grad_()
    (factor * F.cross_entropy(x, y)).backward()
    return x.grad


@pytest.mark.parametrize(
    "overlapping",
    [
        lambda x: x[:1].expand(6, 7),
        lambda x: x.flatten().unfold(0, 7, 1)[:6],
        lambda x: x.as_strided((6, 7), (6, 1)),
    ],
    ids=["expanded", "unfolded", "overlapping rows"],
)
def test_memory_that_rows_share_is_refused(overlapping):
    x, y = drawn()
    logits = overlapping(x.requires_grad_() * 1)
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match="share no memory"):
        F.cross_entropy(logits, y, inplace_backward=True)
    assert torch.equal(logits.detach(), before)


def test_leaves_are_refused_with_their_views():
    x, y = drawn()
    leaf = x.clone().requires_grad_()
    for logits in (leaf, leaf.view(6, 7), leaf[:], torch.nn.Parameter(x.clone())):
        with pytest.raises(RuntimeError, match="leaf"):
            F.cross_entropy(logits, y, inplace_backward=True)
    assert torch.equal(leaf.detach(), x)
    F.cross_entropy(x.clone(), y, inplace_backward=True)  # nothing is differentiated, nothing is written


def test_who_needs_the_logits_too_gets_an_error():
    """Before ours runs they are there; afterwards autograd knows that they are gone."""
    x, y = drawn()
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    squares = logits.square().sum()
    loss = F.cross_entropy(logits, y, inplace_backward=True)
    squares.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * x + wanted(x, y))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_second_derivatives_batches_and_transforms_are_refused():
    x, y = drawn()

    def logits():
        return x.clone().requires_grad_() * 1

    with pytest.raises(RuntimeError, match="differentiated again"):
        z = logits()
        torch.autograd.grad(F.cross_entropy(z, y, inplace_backward=True), z, create_graph=True)
    with pytest.raises(RuntimeError, match="batched"):
        z = logits()
        value = F.cross_entropy(z, y, inplace_backward=True)
        torch.autograd.grad(value, z, torch.ones(3), is_grads_batched=True)
    assert torch.equal(z.detach(), x)
    with pytest.raises(RuntimeError, match="plain eager code"):
        torch.func.grad(lambda z: F.cross_entropy(z * 1, y, inplace_backward=True))(x)
    compiled = torch.compile(
        lambda z: F.cross_entropy(z * 1, y, inplace_backward=True), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="inplace_backward=True"):
        compiled(x.clone().requires_grad_())


def test_hooks_and_checkpoints():
    x, y = drawn()
    leaf, seen = x.clone().requires_grad_(), []
    logits = leaf * 1
    logits.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    (3 * F.cross_entropy(logits, y, inplace_backward=True)).backward()
    torch.testing.assert_close(seen[0], wanted(x, y, 3.0))
    torch.testing.assert_close(leaf.grad, 2 * wanted(x, y, 3.0))

    leaf = x.clone().requires_grad_()

    def head(x):
        return F.cross_entropy(x * 1, y, inplace_backward=True)

    for reentrant in (False, True):
        leaf.grad = None
        checkpoint(head, leaf, use_reentrant=reentrant).backward()
        torch.testing.assert_close(leaf.grad, wanted(x, y))
        assert torch.equal(leaf.detach(), x)
    leaf.grad = None
    with torch.autograd.graph.save_on_cpu():
        value = head(leaf)
    value.backward()
    torch.testing.assert_close(leaf.grad, wanted(x, y))


def test_of_two_threads_one_gets_the_memory():
    x, y = drawn()
    logits = x.clone().requires_grad_() * 1
    value = F.cross_entropy(logits, y, inplace_backward=True)
    results = []

    def backward():
        try:
            results.append(torch.autograd.grad(value, logits, retain_graph=True)[0])
        except RuntimeError:
            results.append(None)

    threads = [threading.Thread(target=backward) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (grad,) = (g for g in results if g is not None)
    torch.testing.assert_close(grad, wanted(x, y))
