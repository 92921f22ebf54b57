"""Linear cross-entropy against torch's, chunks, rows left out, frozen inputs, and the memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import same_bits

import fastloss
from fastloss import memory, reference
from fastloss._ops import chunked_linear
from fastloss.functional import linear_cross_entropy

MiB = 1 << 20
beside_torchs = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch's own, with its options, came after 2.11"
)


def problem(rows=37, features=24, classes=301, dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64)
    w = torch.randn(classes, features, generator=g, dtype=torch.float64) * features**-0.5
    b = torch.randn(classes, generator=g, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=g)
    return *(t.to(device, dtype).requires_grad_() for t in (x, w, b)), target.to(device)


def gradients(value, *inputs, upstream=None):
    return torch.autograd.grad(value, inputs, torch.ones_like(value) if upstream is None else upstream)


@beside_torchs
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "ignored", "probabilities", "weight", "smoothing"])
def test_parity(kind, reduction, device):
    x, w, b, target = problem(device=device)
    options = {"linear_bias": b, "reduction": reduction}
    if kind == "ignored":
        target[::3] = 7
        options["ignore_index"] = 7
    elif kind == "probabilities":
        target = torch.randn(37, 301, dtype=torch.float64, device=device).softmax(1)
    elif kind == "weight":
        options["weight"] = torch.rand(301, dtype=torch.float64, device=device)
    elif kind == "smoothing":
        options["label_smoothing"] = 0.2
    ours, theirs = (
        linear_cross_entropy(x, w, target, **options),
        F.linear_cross_entropy(x, w, target, **options),
    )
    torch.testing.assert_close(ours, theirs)
    upstream = torch.rand_like(theirs)
    for a, e in zip(
        gradients(ours, x, w, b, upstream=upstream),
        gradients(theirs, x, w, b, upstream=upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@beside_torchs
def test_one_row_without_batch(device):
    x, w, b, target = problem(1, device=device)
    for one in (target[0], torch.rand(301, dtype=torch.float64, device=device).softmax(0)):
        for reduction in ("none", "mean"):
            ours, theirs = (
                f(x[0], w, one, linear_bias=b, reduction=reduction)
                for f in (linear_cross_entropy, F.linear_cross_entropy)
            )
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "wider probabilities"])
def test_sequences(kind, reduction, device):
    """Hidden states [B, T, H] are as many rows."""
    x, w, b, classes = problem(12, device=device, dtype=torch.float32)
    weight = torch.arange(12.0, device=device)
    target = classes
    if kind != "classes":
        wide = torch.float64 if kind == "wider probabilities" else torch.float32
        target = torch.rand(12, w.shape[0], device=device).softmax(-1).to(wide)
    options = {"linear_bias": b, "reduction": reduction, "z_loss": 0.1}
    rows = linear_cross_entropy(x, w, target, sample_weight=weight, **options)
    (slope,) = gradients(rows, x)
    together = [t.detach().view(3, 4, *t.shape[1:]) for t in (x, target, weight)]
    together[0].requires_grad_()
    for function in (linear_cross_entropy, reference.linear_cross_entropy):
        got = function(together[0], w, together[1], sample_weight=together[2], **options)
        assert got.shape == ((3, 4) if reduction == "none" else ())
        torch.testing.assert_close(got, rows.view_as(got))
        torch.testing.assert_close(gradients(got, together[0])[0].view_as(x), slope)
    for wrong in (classes.view(4, 3), classes):
        with pytest.raises(RuntimeError, match="target: expected"):
            linear_cross_entropy(together[0], w, wrong)
    with pytest.raises(ValueError, match="sample_weight"):
        linear_cross_entropy(together[0], w, together[1], sample_weight=weight)


@beside_torchs
def test_more_dimensions(device):
    x, _, _, _ = problem(5, 6, device=device)
    w, b = (
        torch.randn(4, 2, 3, 6, dtype=torch.float64, device=device),
        torch.randn(4, 2, 3, dtype=torch.float64),
    )
    target = torch.randint(4, (5, 2, 3)).to(device)
    ours, theirs = (
        f(x, w, target, linear_bias=b.to(device)) for f in (linear_cross_entropy, F.linear_cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x))


@beside_torchs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_chunks_change_no_row(dtype, device, monkeypatch):
    """Whatever is in a chunk: a row's loss and its gradient are the same bits, and the weight's numerically."""
    x, w, b, target = problem(1000, 20, 70, dtype, device)
    target[::5] = -100
    answers = []
    for size in (0, 7, 100, 384, 768):
        options = (
            torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None) if size else None
        )
        value = linear_cross_entropy(x, w, target, linear_bias=b, reduction="none", options=options)
        answers.append((value.detach(), *gradients(value, x, w, b)))
    for answer in answers[1:]:
        assert same_bits(answer[0], answers[0][0])
        assert same_bits(answer[1], answers[0][1])
        torch.testing.assert_close(answer[2:], answers[0][2:])
    if device == "cpu" and fastloss._ops.autograd.namespace() == fastloss._ops.autograd.LIBRARY:
        assert same_bits(answers[-1][2], answers[-2][2]), "whole panels add up alike"


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen(frozen, device, monkeypatch):
    """Nothing is computed for what needs no gradient, and the others' are the same bits."""
    x, w, b, target = problem(device=device)
    all_ = gradients(linear_cross_entropy(x, w, target, linear_bias=b), x, w, b)
    wanted = []
    real = chunked_linear.rows_of_a_chunk
    monkeypatch.setattr(chunked_linear, "rows_of_a_chunk", lambda *a: wanted.append(a) or real(*a))
    inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((x, w, b))]
    value = linear_cross_entropy(inputs[0], inputs[1], target, linear_bias=inputs[2])
    function = value.grad_fn
    assert function.plan.needs_grad_mask == 7 - (1 << frozen)
    assert function.plan.precomputed_grads[1 + frozen].numel() == 0
    value.backward()
    assert len(wanted) == 1, "the logits are made once"
    for i, (t, g) in enumerate(zip(inputs, all_, strict=True)):
        assert t.grad is None if i == frozen else same_bits(t.grad, g)


def test_ignored_rows_are_left_out(monkeypatch):
    x, w, _, target = problem(400, 8, 50)
    target[torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.5] = -100
    seen = []
    real = chunked_linear.PackedProducts.logits
    monkeypatch.setattr(
        chunked_linear.PackedProducts,
        "logits",
        lambda self, out, x: seen.append(len(x)) or real(self, out, x),
    )
    got = gradients(linear_cross_entropy(x, w, target), x, w)
    assert sum(seen) == int((target != -100).sum())
    keep = target != -100
    expected = gradients(F.cross_entropy(F.linear(x[keep], w), target[keep]), x, w)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_all_rows_ignored(dtype, device):
    x, w, b, target = problem(dtype=dtype, device=device)
    value = linear_cross_entropy(x, w, torch.full_like(target, -100), linear_bias=b)
    assert value.isnan()
    assert all(g.eq(0).all() for g in gradients(value, x, w, b))


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_classes_of_weight_0(soft, device):
    x, w, b, target = problem(device=device)
    target = torch.where(target % 2 == 0, 1, target)
    if soft:
        target = F.one_hot(target, w.shape[0]).to(x.dtype) * 0.5 + 0.5 / w.shape[0]
    weight = torch.ones(w.shape[0], dtype=x.dtype, device=x.device).index_fill(
        0, target.new_ones(1).long(), 0
    )
    ours = linear_cross_entropy(x, w, target, linear_bias=b, weight=weight)
    theirs = F.cross_entropy(F.linear(x, w, b), target, weight)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(gradients(ours, x, w, b), gradients(theirs, x, w, b), strict=True):
        torch.testing.assert_close(a, e)


def test_small_gradients_of_float16_survive(device):
    """The loss of many rows, scaled up as mixed precision does: probabilities / rows alone would be 0."""
    x, w, _, target = problem(2000, 8, 300, torch.float16, device)
    scale = torch.tensor(2.0**14, dtype=torch.float16, device=device)
    got = gradients(linear_cross_entropy(x, w, target), x, w, upstream=scale)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = gradients(reference.linear_cross_entropy(*wide, target), *wide, upstream=scale.double())
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() < 2e-3 * e.norm()


@beside_torchs
def test_weight_gradient_is_summed_in_float32():
    """A bfloat16 sum over chunks would stall: each chunk adds less than half a unit."""
    rows = 192 * 40
    x = torch.ones(rows, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1, chunking_method=None)
    linear_cross_entropy(x, w, target, reduction="sum", options=options).backward()
    assert w.grad[:, 0].tolist() == [-rows / 2, rows / 2]


@beside_torchs
@pytest.mark.parametrize("direct", [0, 1 << 24], ids=["direct", "summed"])
@pytest.mark.parametrize("upstream", [1.0, 0.75])
@pytest.mark.parametrize("size", [0, 7])
def test_bfloat16_gradients(size, upstream, direct, device, monkeypatch):
    """On CUDA forward leaves that of a large weight divided and in bfloat16, of one product where one chunk does."""
    monkeypatch.setattr(chunked_linear, "DIRECT", direct)
    x, w, b, target = problem(50, 16, 90, torch.bfloat16, device)
    options = (
        torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None) if size else None
    )
    value = linear_cross_entropy(x, w, target, linear_bias=b, options=options)
    if device == "cuda" or fastloss._ops.autograd.namespace() != fastloss._ops.autograd.LIBRARY:
        assert value.grad_fn.plan.precomputed_grads[2].dtype == (torch.float32 if direct else torch.bfloat16)
    scale = torch.tensor(upstream, dtype=torch.bfloat16, device=device)
    got = gradients(value, x, w, b, upstream=scale)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    exact = reference.linear_cross_entropy(*wide[:2], target, linear_bias=wide[2])
    for g, e in zip(got, gradients(exact, *wide, upstream=scale.double()), strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - e).norm() < 8e-3 * e.norm()


def test_gradients_of_one_are_left_alone(device):
    """In the type of the sums they are multiplied in place, if at all: twice the same bits, and the product's."""
    x, w, _, target = problem(50, 16, 91, torch.float32, device)
    ones = gradients(linear_cross_entropy(x, w, target), x, w)
    again = gradients(linear_cross_entropy(x, w, target), x, w, upstream=torch.ones((), device=device))
    third = gradients(linear_cross_entropy(x, w, target), x, w, upstream=torch.tensor(0.3, device=device))
    for one, same, part in zip(ones, again, third, strict=True):
        assert same_bits(one, same)
        assert same_bits(part, one * torch.tensor(0.3, device=device))


def test_chunks_on_cuda():
    """As large as the weight in float32, from 116 MiB to 1 GiB, and then at most 4096 rows."""

    def rows(classes, features, dtype=torch.bfloat16, limit=0):
        return chunked_linear.rows_of_a_chunk(classes, features, dtype, False, limit)

    assert rows(128256, 4096) == 4096
    assert rows(262144, 4096) == 2048
    assert rows(128256, 4096, torch.float32) == 2048
    assert rows(32000, 256) == (116 << 20) // (32000 * 2 + 64) // 128 * 128
    assert rows(1000, 64) == (116 << 20) // 2064 // 128 * 128
    assert rows(128256, 4096, limit=384) == 384


@beside_torchs
def test_options_of_torch():
    x, w, _, target = problem(dtype=torch.bfloat16)
    options = torch.nn.LinearCrossEntropyOptions
    for fine in (options(), options(acc_dtype=torch.float32), options(allow_retain_graph=True)):
        assert same_bits(linear_cross_entropy(x, w, target, options=fine), linear_cross_entropy(x, w, target))
    with pytest.raises(ValueError, match="acc_dtype"):
        linear_cross_entropy(x, w, target, options=options(acc_dtype=torch.float64))
    with pytest.raises(TypeError, match="options"):
        linear_cross_entropy(x, w, target, options={"batch_chunk_size": 3})


def test_buffers_go_back_to_the_pool():
    x, w, _, target = problem(600, 300, 2000, torch.float32)
    before = memory.stats()["in_use_bytes"]
    value = linear_cross_entropy(x, w, target)
    held = memory.stats()["in_use_bytes"] - before
    assert w.nbytes <= held <= w.nbytes + 4 * MiB, "the chunk's buffers are given back, the gradients held"
    del value
    assert memory.stats()["in_use_bytes"] == before


CHILD = """
import gc, os, torch
from fastloss.functional import linear_cross_entropy
def high():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
def call(rows, classes):
    x = torch.randn(rows, 16, requires_grad=True)
    w = (torch.randn(classes, 16) / 4).requires_grad_()
    target = torch.randint(classes, (rows,))
    open("/proc/self/clear_refs", "w").write("5")
    before = resident()
    linear_cross_entropy(x, w, target).backward()
    return high() - before - (x.nbytes + w.nbytes) / 2**20
call(64, 100)
print(call(700, 200_000))
"""


def test_memory_is_bounded():
    """At most 128 MiB beyond the gradients: the logits would be 534."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.fail("the kernel lets nobody reset the high-water mark of the resident memory")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(fastloss.__file__).parents[1]), *sys.path])}
    child = subprocess.run(
        [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 128
