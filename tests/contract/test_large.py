"""More than 2^31 logits: offsets do not fit 32 bits."""

from __future__ import annotations

import pytest
import torch

from fastloss._registry.inputs import in_place
from fastloss.functional import cross_entropy

ROWS, CLASSES = 65537, 32800


@pytest.mark.large
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace_backward"])
def test_more_than_two_to_the_31_logits(inplace, real_device):
    """All rows but a few are ignored; those beyond element 2^31 must be found and written.

    The memory of the others is never touched, so that on a CPU this costs time and not 9 GB of pages.
    """
    assert ROWS * CLASSES > 2**31
    x = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16, device=real_device)
    t = torch.full((ROWS,), -100, dtype=torch.long, device=real_device)
    rows = torch.tensor([0, ROWS // 2, ROWS - 2, ROWS - 1], device=real_device)
    g = torch.Generator().manual_seed(0)
    x[rows] = torch.randn(4, CLASSES, generator=g).to(real_device, torch.bfloat16)
    t[rows] = torch.tensor([0, 5, CLASSES - 2, CLASSES - 1], device=real_device)
    few = x[rows].clone().requires_grad_()
    expected = cross_entropy(few, t[rows])
    expected.backward()

    x.requires_grad_()
    got = in_place(cross_entropy)(input=x, target=t) if inplace else cross_entropy(x, t)
    assert torch.equal(got, expected)
    got.backward()
    assert (x.grad.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x.grad[rows], few.grad)
    assert not x.grad[1].any()
    assert not x.grad[-3].any()


@pytest.mark.large
def test_one_row_beyond_two_to_the_31_bytes(real_device):
    """One class dimension of 2^30 + 7: a single row does not fit 31 bits in bytes."""
    classes = 2**30 + 7
    x = torch.zeros(1, classes, dtype=torch.bfloat16, device=real_device)
    x[0, -1] = 25.0
    t = torch.tensor([classes - 1], device=real_device)
    x.requires_grad_()
    got = cross_entropy(x, t)
    exact = torch.tensor((classes - 1) / torch.tensor(25.0, dtype=torch.float64).exp().item()).log1p()
    torch.testing.assert_close(got.item(), exact.item(), rtol=2**-7, atol=0.0)
    got.backward()
    assert x.grad[0, -1] < 0
    assert x.grad[0, classes // 2] > 0
