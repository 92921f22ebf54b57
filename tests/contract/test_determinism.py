"""The same call gives the same bits: at any time, with any number of threads, next to any other rows."""

from __future__ import annotations

import pytest
import torch
from support import (
    Answer,
    assert_same_bits,
    differentiable,
    exact,
    fused,
    has_reductions,
    make,
    requiring,
    same_bits,
    some_cases,
    some_dtypes,
    tensors,
    upstream_like,
)

from fastloss._ops import autograd

ROWS = 6


def batched_shapes(loss):
    """The listed shapes with `ROWS` rows, where that number means the batch and nothing else."""
    return [(ROWS, *s[1:]) for s in loss.shapes if len(s) > 1 and ROWS not in s[1:]]


@some_dtypes
@some_cases
def test_run_to_run(loss, case, dtype, device):
    for shape in loss.shapes:
        kwargs = make(loss, case, dtype, device, shape)
        names = differentiable(loss, kwargs)
        first = fused(loss, kwargs, names)
        assert_same_bits(fused(loss, kwargs, names), first, "a second run")


@some_dtypes
@some_cases
def test_number_of_threads(loss, case, dtype, threads):
    """Many rows so that the work is shared out, few long ones so that a row itself might be."""
    many = {(97, *s[1:]) for s in loss.shapes if len(s) > 1 and s[-1] < 2000}
    for shape in sorted(many) + [s for s in loss.shapes if s[-1] >= 2000]:
        kwargs = make(loss, case, dtype, "cpu", shape)
        names = differentiable(loss, kwargs)
        answers = []
        for n in (1, 2, 3, 7):
            threads(n)
            answers.append(fused(loss, kwargs, names))
        for answer in answers[1:]:
            assert_same_bits(answer, answers[0], f"more threads than one, shape {shape}")


def rows_of(kwargs, index):
    """The call for these rows only; tensors whose first dimension is not the batch are shared."""
    picked = {name: v[index] for name, v in tensors(kwargs).items() if v.ndim and v.shape[0] == ROWS}
    return kwargs | picked, picked.keys()


def is_row_wise(loss, case):
    """Asked of the reference: does a row's loss leave the other rows out of account?"""
    more = {"reduction": "none"} if has_reductions(loss) else {}
    kwargs = make(loss, case, shape=batched_shapes(loss)[0], **more)
    value = exact(loss, kwargs, []).value
    if value.shape[:1] != (ROWS,):
        return False
    some = torch.tensor([ROWS - 1, 0, 2])
    few = exact(loss, rows_of(kwargs, some)[0], []).value
    return torch.allclose(few, value[some], rtol=1e-12)


def row_wise_answer(loss, kwargs, upstream, index):
    few, picked = rows_of(kwargs, index)
    names = [name for name in differentiable(loss, kwargs) if name in picked]
    return fused(loss, requiring(few, names), names, upstream[index])


def same_rows(got: Answer, whole: Answer, index) -> bool:
    pairs = zip(got.parts(), whole.parts(), strict=True)
    return all(same_bits(x, y[index]) for (_, x), (_, y) in pairs)


@some_dtypes
@some_cases
def test_other_rows_of_the_batch(loss, case, dtype, device):
    """Alone, at the front, at the back, among others: a row's loss and gradient are the same bits."""
    if not is_row_wise(loss, case):
        return
    if loss.multiplies and (device == "cuda" or autograd.namespace() != autograd.LIBRARY):
        pytest.skip("the products are torch's, whose bits depend on how many rows there are")
    more = {"reduction": "none"} if has_reductions(loss) else {}
    for shape in batched_shapes(loss):
        kwargs = make(loss, case, dtype, device, shape, **more)
        upstream = upstream_like(fused(loss, kwargs, []).value)
        whole = row_wise_answer(loss, kwargs, upstream, torch.arange(ROWS))
        for rows in ([ROWS - 1], [1], [2, 5, 2, 0, 4]):
            index = torch.tensor(rows, device=device)
            got = row_wise_answer(loss, kwargs, upstream, index)
            assert same_rows(got, whole, index), f"rows {rows} of shape {shape}"


@some_dtypes
@some_cases
def test_alignment_of_rows(loss, case, dtype, device):
    """A row's bits do not depend on where in memory it starts."""
    for shape in batched_shapes(loss):
        kwargs = make(loss, case, dtype, device, shape)
        names = differentiable(loss, kwargs)
        expected = fused(loss, kwargs, names)
        for offset in (1, 2, 5):
            moved = {}
            for name in names:
                x = kwargs[name].detach()
                moved[name] = x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
            assert_same_bits(fused(loss, kwargs | moved, names), expected, f"moved by {offset} elements")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@some_cases
def test_recycled_memory(loss, case, dtype, device):
    """Outputs are written whole: what their memory held before (here NaN) does not show."""
    shape = max(loss.shapes, key=lambda s: torch.Size(s).numel())
    kwargs = make(loss, case, dtype, device, (ROWS * shape[0], *shape[1:]) if device == "cuda" else shape)
    names = differentiable(loss, kwargs)
    first = fused(loss, kwargs, names)
    kept = Answer(first.value.clone(), {k: v.clone() for k, v in first.grads.items()})
    for grad in first.grads.values():
        grad.fill_(torch.nan)
    del first, grad
    assert_same_bits(fused(loss, kwargs, names), kept, "recycled memory")
