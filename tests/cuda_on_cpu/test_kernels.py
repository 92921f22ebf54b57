"""Every registered loss through the CUDA kernels, executed by the CPU in one build of the shim.

Here that is the plain build; test_kernels_sanitized.py runs this file again in processes of their own for the
others, named by FASTLOSS_SIMT_MODE.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import (
    assert_right,
    assert_same_bits,
    differentiable,
    dtype_id,
    fused,
    make,
)
from support.layouts import contiguous, lay, unaligned
from support.pairs import covering

import fastloss._ops.autograd
from fastloss._registry import Loss, losses

from . import build

MODE = os.environ.get("FASTLOSS_SIMT_MODE", "plain")
SCHEDULES = (1, 5)  # beside 0
ALL_TURNS = (
    (torch.float32, unaligned),
    (torch.bfloat16, unaligned),
    (torch.float64, contiguous),
    (torch.float16, unaligned),
)
TURNS = ALL_TURNS if MODE == "plain" else ALL_TURNS[:2]  # what the others are compiled for
# The gradient of a chunk of logits takes the place of these. Where rows are no multiple of 16 bytes, a thread reads
# words of which a neighbour writes bytes: it drops those, but the race checker sees words. It gets rows of whole words.
CHUNKED = ("linear", "angular_margin")
MOST_ELEMENTS = 6000  # of a shape that every case runs on; the first case runs on all


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with fastloss._ops.autograd.use_namespace(build.load(MODE)):
        yield


@pytest.fixture
def schedule(monkeypatch):
    return lambda seed: monkeypatch.setenv("SIMT_ORDER", str(seed))


def shapes(loss: Loss, case: str) -> list[tuple[int, ...]]:
    first = case == "plain" and loss.name == "cross_entropy"
    small = [shape for shape in loss.shapes if first or math.prod(shape) <= MOST_ELEMENTS]
    small = small or [min(loss.shapes, key=math.prod)]
    if MODE == "race" and loss.family in CHUNKED:
        return [(*shape[:-1], -(-shape[-1] // 16) * 16) for shape in small]
    return small


def calls() -> Iterator[Any]:
    """Of the first loss, which goes through every branch of the row driver, every pair of case, type and layout; of the
    others all cases, all types and both layouts, each at least once, on tensors mostly that no 16-byte access fits."""
    for loss in losses():
        cases = list(loss.cases)
        if loss.name == "cross_entropy":
            dtypes = [dtype for dtype, _ in TURNS]
            every = list(itertools.product(cases, dtypes, (contiguous, unaligned)))
            numbers = list(itertools.product(range(len(cases)), range(len(dtypes)), range(2)))
            chosen = [every[i] for i in covering(numbers)]
        else:
            n = max(len(cases), len(TURNS))
            chosen = [(cases[i % len(cases)], *TURNS[i % len(TURNS)]) for i in range(n)]
        for case, dtype, layout in chosen:
            name = f"{loss.name}-{case}-{dtype_id(dtype)}-{layout.__name__}"
            yield pytest.param(loss, case, dtype, layout, id=name)


@pytest.mark.parametrize(("loss", "case", "dtype", "layout"), list(calls()))
def test_right_under_every_schedule(loss, case, dtype, layout, schedule):
    for shape in shapes(loss, case):

        def arguments(shape=shape):
            drawn = make(loss, case, dtype, shape=shape)
            return {k: lay(v, layout) if isinstance(v, torch.Tensor) else v for k, v in drawn.items()}

        kwargs = arguments()
        names = differentiable(loss, kwargs)
        schedule(0)
        answer = assert_right(loss, kwargs)
        for seed in SCHEDULES:
            schedule(seed)
            again = fused(loss, arguments(), names)
            assert_same_bits(answer, again, f"{shape}, schedule {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("size", [(384 << 10) + 1008, (512 << 10) + 16])
def test_clusters_in_place(size, dtype, schedule):
    """Rows of 2 and 4 parts; of some the target is so far above that the row is summed again, one does not count."""
    g = torch.Generator().manual_seed(0)
    rows, classes = 5, size // dtype.itemsize
    x = torch.randn(rows, classes, generator=g).to(dtype)
    target = torch.tensor([classes - 1, 7, -100, classes // 2, 3])
    x[[1, 4], target[[1, 4]]] = 100
    answers = []
    for seed in (0, *SCHEDULES):
        schedule(seed)
        logits, loss = x.clone(), torch.empty(rows)
        fastloss._ops.autograd.kernels().cross_entropy_rows(
            logits, loss, target, None, None, None, -100, 1.0, 0.0, [0.0, 0.0], True
        )
        answers.append((loss, logits))
    leaf = x.double().requires_grad_()
    value = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    value.sum().backward()
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for loss, grad in answers:
        assert torch.equal(loss, answers[0][0]) and torch.equal(grad, answers[0][1])
        torch.testing.assert_close(loss.double(), value.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=rtol, atol=1e-9)


if MODE == "asan":

    def test_end_of_an_unaligned_tensor_is_guarded():
        poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
        poisoned.argtypes = [ctypes.c_void_p]
        x = unaligned(torch.zeros(3, 33))
        assert x.data_ptr() % 16
        assert not poisoned(x.data_ptr() + x.nbytes - 1)
        assert poisoned(x.data_ptr() + x.nbytes)


def test_there_are_losses():
    assert losses()
