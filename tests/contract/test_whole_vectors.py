"""Elementwise losses of rows that 16 bytes divide: several whole blocks, inputs that are broadcast along them.

On CUDA such calls take 16 bytes of every input at a time, and where nothing is broadcast a path of their own.
"""

from __future__ import annotations

import pytest
import torch
from support import assert_right, assert_same_bits, differentiable, dtype_id, fused, make, requiring
from support.layouts import unaligned

from fastloss._registry import losses

SHAPE = (6, 2048)
FAMILIES = ("elementwise", "preference", "policy")


def calls():
    for loss in losses():
        if loss.family in FAMILIES:
            for case in loss.cases:
                yield pytest.param(loss, case, id=f"{loss.name}-{case}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("loss", "case"), list(calls()))
def test_whole_vectors(loss, case, dtype, device):
    kwargs = make(loss, case, dtype, device, SHAPE)
    names = differentiable(loss, kwargs)
    expected = assert_right(loss, kwargs)
    for name in names:
        moved = unaligned(kwargs[name].detach())
        again = fused(loss, requiring(kwargs | {name: moved}, names), names)
        assert_same_bits(again, expected, f"{name} moved by one element")
