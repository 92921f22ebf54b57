"""Losses of logits [N, C, d1, ...]: a row's classes are far apart in memory, and its neighbours are other rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import dtype_id, same_bits
from support.layouts import unaligned
from support.operators import Operators, past_the_dispatcher

from fastloss._ops import autograd
from fastloss.functional import cross_entropy, poly1_cross_entropy, softmax_focal_loss

# Several images that share a block of rows; rows of one image in several blocks; the last block not full; more classes
# than fit into a block's shared memory; numbers of rows that 16 bytes do not divide.
SHAPES = [(128, 3, 2, 4), (2, 19, 8, 24), (3, 5, 40), (1, 400, 8, 16), (2, 3, 7, 9)]
LOSSES = {
    "plain": cross_entropy,
    "smoothed": partial(cross_entropy, label_smoothing=0.1, z_loss=1e-3),
    "softcap": partial(cross_entropy, softcap=5.0),
    "negative": partial(cross_entropy, logit_scale=-0.5),
    "focal": softmax_focal_loss,
    "poly1": poly1_cross_entropy,
}


def draw(shape, dtype, device):
    g = torch.Generator().manual_seed(1)
    x = 4 * torch.randn(shape, generator=g)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    t.view(-1)[::7] = -100
    return x.to(device, dtype), t.to(device), torch.rand(t.shape, generator=g).to(device, dtype)


def answer(loss, x, t, upstream, **options):
    leaf = x.detach().requires_grad_()
    value = loss(leaf, t, **options)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype) if value.ndim else None)
    return value.detach(), gradient


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_rows_of_images(loss, shape, dtype, reduction, device):
    """The same bits wherever the logits start, and what rows of neighbouring classes give."""
    x, t, upstream = draw(shape, dtype, device)
    found = answer(loss, x, t, upstream, reduction=reduction)
    for name, got, expected in zip(
        ("loss", "gradient"), answer(loss, unaligned(x), t, upstream, reduction=reduction), found
    ):
        assert same_bits(got, expected), name
    rows = x.movedim(1, -1).reshape(-1, shape[1])
    value, gradient = answer(loss, rows, t.flatten(), upstream.flatten(), reduction=reduction)
    torch.testing.assert_close(found[0], value.view(found[0].shape))
    torch.testing.assert_close(found[1], gradient.view(*t.shape, -1).movedim(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_their_gradient_in_place(shape, dtype, device):
    x, t, upstream = draw(shape, dtype, device)
    expected = answer(cross_entropy, x, t, upstream, reduction="none")
    leaf = x.clone().requires_grad_()
    value = cross_entropy(leaf * 1, t, reduction="none", inplace_backward=True)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    assert same_bits(value.detach(), expected[0])
    assert same_bits(gradient, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("rows", [8, 200, 203])
def test_a_transposed_matrix(rows, dtype, device):
    x, t, upstream = draw((rows, 21), dtype, device)
    columns = x.t().contiguous().t()
    found = answer(cross_entropy, columns, t, upstream, reduction="none")
    for got, expected in zip(found, answer(cross_entropy, x, t, upstream, reduction="none")):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(
        answer(cross_entropy, unaligned(x.t().contiguous()).t(), t, upstream, reduction="none"), found
    ):
        assert same_bits(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_types_reduced(dtype, reduction, device):
    """The loss has the type of the logits, and so has the gradient that comes back to it."""
    x, t, _ = draw((9000 if reduction == "mean" else 90, 5), dtype, device)
    leaf = x.requires_grad_()
    value = cross_entropy(leaf, t, reduction=reduction)
    assert value.dtype == dtype
    torch.testing.assert_close(value, cross_entropy(x.float(), t, reduction=reduction).to(dtype))
    (unit,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (expected,) = torch.autograd.grad(cross_entropy(x.float(), t, reduction=reduction), leaf)
    torch.testing.assert_close(unit, expected.to(dtype))
    (quarter,) = torch.autograd.grad(value * 0.25, leaf)
    torch.testing.assert_close(quarter, unit * 0.25, rtol=0, atol=1e-7)


def test_half_types_reduced_without_a_conversion(simt_library):
    """On CUDA a "mean" launches no kernel but those of the loss; the upstream gradient is read in its own dtype."""
    x, t, _ = draw((6, 5), torch.bfloat16, "cpu")
    leaf = x.requires_grad_()
    with autograd.use_namespace(simt_library), past_the_dispatcher():
        with Operators() as forward:
            value = cross_entropy(leaf, t)
        upstream = torch.ones_like(value)
        with Operators() as backward:
            torch.autograd.grad(value, leaf, upstream)
    assert not forward.launches, forward.launches
    assert backward.launches.keys() <= {"_local_scalar_dense"}  # where it lies on the CPU it is looked at
