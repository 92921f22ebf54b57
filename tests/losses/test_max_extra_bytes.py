"""`max_extra_bytes` of the losses of hidden states: kept, refused where it cannot be, without effect on the values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import same_bits

import fastloss
from fastloss import nn
from fastloss._ops import autograd, chunked_linear
from fastloss.functional import (
    arcface_loss,
    cosface_loss,
    harmonic_loss,
    linear_cross_entropy,
    linear_dpo_loss,
)
from fastloss.losses.token_statistics import linear_token_stats

MiB = 1 << 20
ROWS, FEATURES, CLASSES = 40, 6, 50


def problem(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(CLASSES, FEATURES, generator=generator).to(device, dtype).requires_grad_()
    return x, w, torch.randint(CLASSES, (ROWS,), generator=generator).to(device)


def of_logits(x, w, y, limit):
    return linear_cross_entropy(x, w, y, reduction="none", max_extra_bytes=limit)


def of_statistics(x, w, y, limit):
    return linear_token_stats(x, w, y, max_extra_bytes=limit).logp


def of_pairs(x, w, y, limit):
    (a, b), (i, j) = x.view(2, 4, -1, FEATURES), y.view(2, 4, -1)
    zeros = torch.zeros(4, device=x.device)
    return linear_dpo_loss(a, b, w, i, j, zeros, zeros, reduction="none", max_extra_bytes=limit)


def of_angles(x, w, y, limit):
    return arcface_loss(x, w, y, reduction="none", max_extra_bytes=limit)


def of_centres(x, w, y, limit):
    return arcface_loss(x, w.view(-1, 2, FEATURES), y // 2, reduction="none", max_extra_bytes=limit)


def of_cosines(x, w, y, limit):
    return cosface_loss(x, w, y, reduction="none", max_extra_bytes=limit)


def of_distances(x, w, y, limit):
    return harmonic_loss(x, w, y, reduction="none", max_extra_bytes=limit)


# with how many numbers of a row stand beside each other at once, and how many features the products have
LOSSES = {
    of_logits: (CLASSES, FEATURES),
    of_statistics: (2 * CLASSES, FEATURES),
    of_pairs: (2 * CLASSES, FEATURES),
    of_angles: (CLASSES, FEATURES),
    of_centres: (CLASSES + 3 * CLASSES // 2, FEATURES),
    of_cosines: (CLASSES, FEATURES),
    of_distances: (2 * CLASSES, FEATURES + 2),
}
every_loss_of_hidden_states = pytest.mark.parametrize("call", LOSSES, ids=lambda call: call.__name__)


def least(call, device):
    """The fewest bytes for one row, and what each further row takes."""
    width, features = LOSSES[call]
    row = (width + 4 * features) * 4 + 64
    return row + (12 * MiB if autograd.runs_on_cpu(torch.empty(0, device=device)) else 0), row


@every_loss_of_hidden_states
def test_chunks_keep_it(call, device, monkeypatch):
    """No chunk has more rows than it allows, forward or backward; the values are the same bits."""
    x, w, y = problem(device=device)
    expected = call(x, w, y, None)
    gradients = torch.autograd.grad(expected.sum(), (x, w))
    sizes = []
    products = chunked_linear.products_for(autograd.kernels(), x)
    real = products.logits
    monkeypatch.setattr(products, "logits", lambda self, out, x: sizes.append(len(out)) or real(self, out, x))
    lowest, row = least(call, device)
    for rows in (1, 7, 1000):
        sizes.clear()
        got = call(x, w, y, lowest + (rows - 1) * row + row // 2)
        found = torch.autograd.grad(got.sum(), (x, w))
        assert max(sizes) == min(rows, ROWS)
        if products is not chunked_linear.BlasProducts:
            assert same_bits(got, expected)
        torch.testing.assert_close((got, *found), (expected, *gradients))


@every_loss_of_hidden_states
def test_too_few_for_a_row(call, device):
    x, w, y = problem(device=device)
    lowest, _ = least(call, device)
    call(x, w, y, lowest)
    for limit in (lowest - 1, 0, -5):
        with pytest.raises(ValueError, match=rf"max_extra_bytes: expected at least {lowest}, .* got {limit}"):
            call(x, w, y, limit)
    for wrong in (1.5e9, True, "1 GiB"):
        with pytest.raises(TypeError, match="max_extra_bytes: expected an int"):
            call(x, w, y, wrong)


def test_logits_that_are_made_all_at_once():
    x, w, _ = problem()
    y = torch.zeros(ROWS, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_extra_bytes: expected None"):
        linear_cross_entropy(x, w.view(5, 10, FEATURES), y, max_extra_bytes=1 << 30)


@pytest.mark.parametrize(("classes", "features"), [(128256, 4096), (32000, 256), (262144, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_plan_on_cuda(classes, features, dtype):
    """The logits of a chunk and two copies of its rows fit, and no whole unit of rows is left out."""

    def rows(limit):
        most = chunked_linear.rows_within(limit, classes, classes, features, dtype, False)
        return chunked_linear.rows_of_a_chunk(classes, features, dtype, False, most)

    row = (classes + 4 * features) * dtype.itemsize + 64
    for limit in (4 * MiB, 100 * MiB, 500 * MiB):
        assert rows(limit) * (classes + 2 * features) * dtype.itemsize <= limit
        assert rows(limit) + (128 if rows(limit) >= 128 else 1) > min(limit, chunked_linear.BUDGET) // row
    assert rows(8 << 30) == rows(chunked_linear.NO_LIMIT)


def test_with_the_chunk_size_of_torchs_options(monkeypatch):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has it since 2.13")
    limits = []
    real = chunked_linear.rows_of_a_chunk
    monkeypatch.setattr(chunked_linear, "rows_of_a_chunk", lambda *a: limits.append(a[-1]) or real(*a))
    x, w, y = problem()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5, chunking_method=None)
    lowest, row = least(of_logits, "cpu")
    for given in (
        {"max_extra_bytes": lowest + row},
        {"options": options, "max_extra_bytes": lowest + row},
        {"options": options, "max_extra_bytes": lowest + 20 * row},
        {"options": options},
        {},
    ):
        linear_cross_entropy(x, w, y, **given)
    assert limits[:-1] == [2, 2, 5, 5] and limits[-1] > ROWS


def test_module_passes_it_on():
    x, _, y = problem()
    layer = nn.LinearCrossEntropyLoss(FEATURES, CLASSES, max_extra_bytes=5)
    with pytest.raises(ValueError, match="max_extra_bytes"):
        layer(x, y)
    assert "max_extra_bytes=5" in repr(layer)


CHILD = """
import os, sys, torch
from fastloss.functional import linear_cross_entropy
from fastloss.losses.token_statistics import linear_token_stats
def high():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) << 10
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def call(rows, classes, limit):
    x = torch.randn(rows, 16, requires_grad=True)
    w = (torch.randn(classes, 16) / 4).requires_grad_()
    target = torch.randint(classes, (rows,))
    open("/proc/self/clear_refs", "w").write("5")
    before = resident()
    if sys.argv[1] == "statistics":
        linear_token_stats(x, w, target, max_extra_bytes=limit).logp.sum().backward()
    else:
        linear_cross_entropy(x, w, target, max_extra_bytes=limit).backward()
    return high() - before - x.nbytes - w.nbytes
call(64, 100, None)
print(call(200, 100_000, int(sys.argv[2])))
"""


@pytest.mark.parametrize("kind", ["loss", "statistics"])
@pytest.mark.parametrize("limit", [16 * MiB, 40 * MiB])
def test_memory_on_the_cpu(kind, limit):
    """As the system sees it, beyond the gradients: the logits would be 76 MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.fail("the kernel lets nobody reset the high-water mark of the resident memory")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(fastloss.__file__).parents[1]), *sys.path])}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(limit)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) <= limit, child.stdout
