"""Rows of every length for which a device has its own code path, more of them than concurrent blocks.

On CUDA short rows lie in registers, longer ones in shared memory while the next one is on its way, the longest in that
of 2 or 4 blocks, or are read twice in part; which thread adds what must depend on none of that but the length.
"""

from __future__ import annotations

import pytest
import torch
from support import assert_right, assert_same_bits, differentiable, fused, requiring

from fastloss._registry import InputSampler, losses

# bytes of a row: about the ends of each way
LENGTHS = (
    500,
    512,
    528,
    1024,
    1040,
    2048,
    2064,
    8192,
    8208,
    16384,
    16400,
    32768,
    32784,
    131072,
    131088,
    262144,
    262160,
    300000,
    393216,
    393232,
    524288,
    524304,
    1100000,
)
DTYPES = (torch.float32, torch.bfloat16)
CASES = {
    "cross_entropy": ("plain", "smoothing"),
    "softmax_focal_loss": ("plain",),
    "selective_log_softmax": ("plain",),
    "entropy_from_logits": ("plain",),
}


def calls():
    for loss in losses(*CASES):
        for case in CASES[loss.name]:
            yield pytest.param(loss, case, id=f"{loss.name}-{case}")


def call(loss, case, dtype, classes, device, rows=11):
    kwargs = loss.call(case, InputSampler(dtype, device), (rows, classes))
    if "ignore_index" in kwargs or loss.name in ("cross_entropy", "softmax_focal_loss"):
        kwargs["target"][[0, 4, rows - 1]] = kwargs.get("ignore_index", -100)
    return requiring(kwargs, differentiable(loss, kwargs))


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("size", LENGTHS)
@pytest.mark.parametrize(("loss", "case"), list(calls()))
def test_every_length(loss, case, size, dtype, device):
    classes = size // dtype.itemsize
    kwargs = call(loss, case, dtype, classes, device)
    names = differentiable(loss, kwargs)
    value = fused(loss, kwargs, []).value
    upstream = torch.linspace(0.5, 1.5, value.numel()).view_as(value).to(device, dtype)
    got = assert_right(loss, kwargs, upstream)
    ones = fused(loss, kwargs, names, torch.ones_like(got.value))
    name = names[0]
    x = kwargs[name].detach()
    for offset in (1, 8):
        moved = x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        again = fused(loss, requiring(kwargs | {name: moved}, names), names, torch.ones_like(got.value))
        assert_same_bits(again, ones, f"moved by {offset} elements")


@pytest.mark.parametrize("scale", [-0.5, 0.0, -3.0])
@pytest.mark.parametrize("classes", [7, 1000, 20000])
def test_scale_that_is_not_positive(scale, classes, device):
    """The largest logit is then the least number of the row, or any."""
    (loss,) = losses("cross_entropy")
    kwargs = loss.call("plain", InputSampler(torch.float32, device), (5, classes)) | {"logit_scale": scale}
    assert_right(loss, requiring(kwargs, differentiable(loss, kwargs)))
