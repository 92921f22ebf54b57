"""Rows that on CUDA consist of parts (csrc/cuda/kernels/row_reader.cuh): a cluster of blocks takes a part each, or
one block all of them; the bits are the same. On a CPU they are just long rows."""

from __future__ import annotations

import math

import pytest
import torch
from support import same_bits
from support.layouts import unaligned

from fastloss import reference
from fastloss._ops import autograd
from fastloss.functional import cross_entropy, poly1_cross_entropy, softmax_focal_loss

BYTES = 256 << 10  # of a part, at most; a row of half as much again is still whole
# bytes of a row: two parts, the second of which is shorter; two whole ones; four; four longer than what stays on the
# chip
LENGTHS = {
    "two": BYTES * 3 // 2 + 1008,
    "two_whole": 2 * BYTES,
    "four": 2 * BYTES + 16,
    "long": 4 * BYTES + 20000,
}
CLUSTERS = (2, 1, 0)  # at once; 0: a device without
LOSSES = (cross_entropy, softmax_focal_loss, poly1_cross_entropy)

every_length = pytest.mark.parametrize("length", LENGTHS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
shorter_lengths = pytest.mark.parametrize("length", ["two", "four"])


@pytest.fixture
def clusters(monkeypatch):
    """Sets how many clusters the shim has at once; a GPU has what it has."""
    return lambda count: monkeypatch.setenv("SIMT_CLUSTERS", str(count))


def parts_of(length: str, dtype: torch.dtype) -> list[range]:
    """The classes of each part."""
    size = LENGTHS[length]
    classes, parts, line = size // dtype.itemsize, 2 if size <= 2 * BYTES else 4, 128 // dtype.itemsize
    each = -(-classes // (parts * line)) * line
    return [range(k * each, min((k + 1) * each, classes)) for k in range(parts)]


def draw(length: str, dtype: torch.dtype, device: str, rows: int = 5, seed: int = 0):
    classes = LENGTHS[length] // dtype.itemsize
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, classes, generator=g) * 3).to(device, dtype)
    return x, torch.randint(classes, (rows,), generator=g).to(device)


def run(function, x, *args, **kwargs):
    leaf = x.detach().requires_grad_()
    value = function(leaf, *args, reduction="none", **kwargs)
    (grad,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), grad


def assert_near(got, x, *args, function=reference.cross_entropy, **kwargs):
    """Of the same logits in float64; NaN where it is NaN."""
    value, grad = run(function, x.double(), *args, **kwargs)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[x.dtype]
    torch.testing.assert_close(got[0].double(), value, rtol=rtol, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got[1].double(), grad, rtol=max(rtol, 1e-4), atol=1e-9, equal_nan=True)


def assert_same(got, expected, what):
    for name, x, y in zip(("loss", "gradient"), got, expected, strict=True):
        assert same_bits(x, y), f"{what}: the {name} differs"


@every_dtype
@every_length
@pytest.mark.parametrize("function", LOSSES)
def test_every_way_gives_the_same_bits(function, length, dtype, device, clusters):
    x, target = draw(length, dtype, device)
    expected = run(function, x, target)
    for count in CLUSTERS[1:]:
        clusters(count)
        assert_same(run(function, x, target), expected, f"{count} clusters at once")
        with torch.no_grad():
            assert same_bits(function(x, target, reduction="none"), expected[0]), "without a gradient"
    assert_same(run(function, unaligned(x), target), expected, "unaligned")
    clusters(CLUSTERS[0])
    with torch.no_grad():
        assert same_bits(function(x, target, reduction="none"), expected[0]), "without a gradient"
    one = run(function, x[3:4], target[3:4])
    assert_same(one, (expected[0][3:4], expected[1][3:4]), "a row alone")
    leaf = x.detach().requires_grad_()
    value = function(leaf, target, reduction="none")
    (twice,) = torch.autograd.grad(value, leaf, torch.full_like(value, 2))
    normal = expected[1].abs() > 1e-30
    assert torch.equal(twice[normal], 2 * expected[1][normal]), "the backward pass alone"


@every_dtype
@every_length
def test_target_in_every_part(length, dtype, device):
    """At the ends of every part, and as the maximum."""
    ends = [j for part in parts_of(length, dtype) for j in (part[0], part[-1])]
    for top in (False, True):
        x, target = draw(length, dtype, device, len(ends), seed=1)
        target.copy_(torch.tensor(ends))
        if top:
            x.scatter_(1, target[:, None], 30)
        assert_near(run(cross_entropy, x, target), x, target)


@every_dtype
@shorter_lengths
@pytest.mark.parametrize("count", CLUSTERS)
def test_rows_that_do_not_count(length, dtype, count, device, clusters):
    """Ignored, of a weight of 0, or of a class that does not exist, between others: at every place of a cluster's
    turns."""
    clusters(count)
    x, target = draw(length, dtype, device, 9, seed=2)
    all_rows = run(cross_entropy, x, target)
    weight = torch.ones(9, device=device)
    for off in ([0, 1, 5], [2, 3, 4, 8], [6, 7, 8], range(9), [0, 2, 4, 6, 8]):
        off = list(off)
        some, sample_weight = target.clone(), weight.clone()
        some[off[::2]] = -100
        sample_weight[off[1::2]] = 0
        value, grad = run(cross_entropy, x, some, sample_weight=sample_weight)
        on = [r for r in range(9) if r not in off]
        assert not value[off].any() and not grad[off].any()
        assert_same((value[on], grad[on]), (all_rows[0][on], all_rows[1][on]), f"without {off}")


@every_dtype
@shorter_lengths
def test_infinities_and_nan(length, dtype, device, clusters):
    parts = parts_of(length, dtype)
    x, target = draw(length, dtype, device, 2 * len(parts) + 4, seed=3)
    rows = iter(range(len(x)))
    for part in parts:  # a part without a class; all the others without one
        x[r := next(rows), part[0] : part[-1] + 1] = -math.inf
        target[r] = (part[0] + len(part)) % x.shape[1]
        x[r := next(rows), : part[0]] = -math.inf
        x[r, part[-1] + 1 :] = -math.inf
        target[r] = part[1]
    x[next(rows), parts[1][5]] = math.nan
    x[r := next(rows)] = -math.inf  # nothing but the target
    x[r, target[r]] = 1.5
    expected = run(cross_entropy, x, target)
    assert_near(expected, x, target)
    x[next(rows), parts[-1][-1]] = math.inf
    x[next(rows)] = -math.inf
    expected = run(cross_entropy, x, target)
    assert expected[0][-2:].isnan().all()
    assert_same(run(cross_entropy, unaligned(x), target), expected, "unaligned")
    clusters(0)
    assert_same(run(cross_entropy, x, target), expected, "without clusters")


@every_dtype
@shorter_lengths
@pytest.mark.parametrize("count", CLUSTERS)
def test_sums_that_underflow(length, dtype, count, device, clusters):
    """The target so far above that the others' exponentials are flushed, in each part; and rows between."""
    clusters(count)
    parts = parts_of(length, dtype)
    x, target = draw(length, dtype, device, 2 * len(parts) + 1, seed=4)
    for k, part in enumerate(parts):
        target[2 * k] = part[7]
        x[2 * k, part[7]] = 104
    value, grad = run(cross_entropy, x, target)
    margin = x.double().scatter(1, target[:, None], -math.inf).logsumexp(1) - x.double().gather(
        1, target[:, None]
    ).squeeze(1)
    rtol = {torch.float32: 3e-3, torch.bfloat16: 2**-7}[dtype]  # near the smallest numbers
    torch.testing.assert_close(
        value.double(), torch.nn.functional.softplus(margin, threshold=math.inf), rtol=rtol, atol=0
    )
    torch.testing.assert_close(
        grad.double().gather(1, target[:, None]).squeeze(1), -margin.sigmoid(), rtol=rtol, atol=0
    )


@every_dtype
@every_length
def test_in_place(length, dtype, device, clusters):
    """The gradient takes the place of the logits, of which the blocks of a cluster read one: the target's."""
    x, target = draw(length, dtype, device, 7, seed=5)
    for row, part in zip((0, 2, 4, 6), parts_of(length, dtype) * 2, strict=False):
        target[row] = part[3]
        x[row, part[3]] = 104
    target[3] = -100
    value, grad = run(cross_entropy, x, target)
    for count in CLUSTERS:
        clusters(count)
        logits, loss = x.clone(), x.new_empty(len(x), dtype=torch.float32)
        autograd.kernels().cross_entropy_rows(
            logits, loss, target, None, None, None, -100, 1.0, 0.0, [0.0, 0.0], True
        )
        if device == "cuda" or autograd.namespace() != autograd.LIBRARY:
            assert_same((loss.to(dtype), logits), (value, grad), f"{count} clusters at once")
        else:  # the CPU's kernel is another one
            torch.testing.assert_close((loss.to(dtype), logits), (value, grad))
