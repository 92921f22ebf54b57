"""Promises of the contrastive losses beyond the general contract."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from support import assert_right, evaluate, fused, make, same_bits, some_dtypes

import fastloss.functional as F
from fastloss import reference
from fastloss._ops import similarity
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs
from fastloss._registry import losses
from fastloss.losses.contrastive import contrastive_softmax

NAMES = (
    "clip_loss",
    "siglip_loss",
    "info_nce",
    "nt_xent_loss",
    "sup_con_loss",
    "pair_nt_xent_loss",
    "multiple_negatives_ranking_loss",
)
every = pytest.mark.parametrize("loss", losses(*NAMES), ids=lambda loss: loss.name)


def features(rows, columns=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return TF.normalize(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def with_options(loss, temperature, rows, columns=16):
    """A call at this temperature, on features of length 1."""
    (first, *rest) = list(make(loss, next(iter(loss.cases)), torch.float32, shape=(2, columns)))
    kwargs = {first: features(rows, columns)}
    if rest[0] == "labels":
        kwargs["labels"] = torch.arange(rows) % max(rows // 4, 2)
    else:
        kwargs[rest[0]] = features(rows, columns, 1)
    scale = {
        "clip_loss": "logit_scale",
        "siglip_loss": "logit_scale",
        "multiple_negatives_ranking_loss": "scale",
    }
    if loss.name in scale:
        return kwargs | {scale[loss.name]: torch.tensor(1 / temperature)}
    return kwargs | {"temperature": torch.tensor(temperature)}


@every
@pytest.mark.parametrize("rows", [1, 2, 70, 400])
def test_cold(loss, rows, device):
    """At temperature 0.005 exponents span 400: finite, and as accurate as PyTorch."""
    kwargs = with_options(loss, 0.005, rows)
    for what, part in assert_right(loss, kwargs).parts():
        assert part.isfinite().all(), what


@every
def test_rows_far_apart(loss, device):
    """Rows a hundred orders of magnitude below their neighbours in a tile keep their digits."""
    kwargs = make(loss, next(iter(loss.cases)), torch.float32, shape=(50, 8))
    first = next(iter(kwargs))
    if loss.name == "multiple_negatives_ranking_loss":
        kwargs["scale"] = torch.tensor(250.0, requires_grad=True)
    elif loss.name not in ("clip_loss", "siglip_loss"):
        kwargs["temperature"] = torch.tensor(0.004, requires_grad=True)
    else:
        x = kwargs[first].detach()
        kwargs[first] = (x * torch.linspace(-60, 60, 50).unsqueeze(1)).requires_grad_()
    assert_right(loss, kwargs)


def test_small_losses_keep_their_digits(device):
    """All positives win by 30 or more: PyTorch's own answer is 0."""
    x = torch.eye(20)
    for loss, want in (
        (F.clip_loss(x, x, 30.0), math.log1p(19 * math.exp(-30))),
        (F.info_nce(x, x, temperature=1 / 30), math.log1p(19 * math.exp(-30))),
        (F.nt_xent_loss(x, x, temperature=1 / 30), math.log1p(38 * math.exp(-30))),
        (F.siglip_loss(x, x, 60.0, -30.0), 20 * math.log1p(math.exp(-30))),
    ):
        assert loss.item() == pytest.approx(want, rel=1e-5)


def test_alone(device):
    """One pair has nothing to be told from; a class of one does not count."""
    x, y = features(1).requires_grad_(), features(1, seed=1)
    for loss in (F.clip_loss(x, y, 10.0), F.info_nce(x, y), F.nt_xent_loss(x, y) * 0):
        loss.backward()
        assert loss == 0
        assert x.grad.count_nonzero() == 0
    z = features(6).requires_grad_()
    for function in (F.sup_con_loss, F.pair_nt_xent_loss):
        loss = function(z, torch.arange(6))
        loss.backward()
        assert loss == 0
        assert z.grad.count_nonzero() == 0
        with_single = function(z.detach(), torch.tensor([0, 0, 1, 1, 2, 2**40]), reduction="none")
        assert (with_single[4:] == 0).all()
        assert (with_single[:4] > 0).all()


def test_large_and_negative_labels():
    """Only whether labels are equal matters."""
    x = features(30)
    small = torch.arange(30) % 7
    for labels in (small - 3, (small + 1) * 2**40 + 1, small * 2**24 + 1):
        for function in (F.sup_con_loss, F.pair_nt_xent_loss):
            assert torch.equal(function(x, labels), function(x, small))


def test_only_one_class(device):
    """No negatives: a pair's probability is 1."""
    x = features(5).requires_grad_()
    loss = F.pair_nt_xent_loss(x, torch.zeros(5, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert x.grad.count_nonzero() == 0


@every
def test_threads_and_tiles(loss, threads):
    """More than one block of rows and of columns, shared out in any way."""
    kwargs = with_options(loss, 0.1, 450)
    names = [name for name in loss.wrt if isinstance(kwargs.get(name), torch.Tensor)]
    answers = []
    for n in (1, 2, 5):
        threads(n)
        answers.append(fused(loss, kwargs, names))
    for other in answers[1:]:
        for (what, a), (_, b) in zip(answers[0].parts(), other.parts(), strict=True):
            assert same_bits(a, b), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_that_share_only_keys(dtype):
    """On the CPU a row's bits do not depend on its neighbours."""
    q, k = features(50, dtype=dtype), features(400, seed=1, dtype=dtype)
    labels, key_labels = torch.arange(50) % 5, torch.arange(400) % 8
    calls = (
        lambda x, pick: F.info_nce(x, q[pick], k, temperature=0.01, reduction="none"),
        lambda x, pick: F.sup_con_loss(
            x, labels[pick], reduction="none", keys=k, key_labels=key_labels, label_offset=None
        ),
    )
    for call in calls:
        answers = []
        for pick in (slice(None), slice(20, 23)):
            x = q[pick].clone().requires_grad_()
            loss = call(x, pick)
            answers.append((loss, *torch.autograd.grad(loss.sum(), x)))
        for whole, few in zip(*answers, strict=True):
            assert same_bits(whole[20:23], few)


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize("same_is_positive", [False, True])
def test_what_sums_of_exponentials_are_over(same_is_positive, with_positives, device):
    """The rule for what entries count as, with every pair of its flags."""
    torch.manual_seed(0)
    ids = torch.arange(70, device=device) % 9
    mark = torch.arange(70, device=device) if same_is_positive else torch.randperm(70).to(device)
    drawn = [torch.randn(70, 8, dtype=torch.float64, device=device) for _ in range(2)]
    attrs = SoftmaxAttrs(
        normalize=True,
        labels_are_positives=same_is_positive,
        positives_in_denominator=with_positives,
        columns=not same_is_positive,
    )
    found = []
    for function in (contrastive_softmax, reference.contrastive.softmax_rows):
        x, y = (t.clone().requires_grad_() for t in drawn)
        inputs = SoftmaxInputs(x, y, x.new_tensor(3.0), target_col=mark, row_ids=ids, col_ids=ids)
        row, col, positive = function(inputs, attrs)
        grads = torch.autograd.grad(row.sum() + col.square().sum() + positive.sin().sum(), (x, y))
        found.append((row, col, positive, *grads))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("function", [F.sup_con_loss, F.pair_nt_xent_loss], ids=lambda f: f.__name__)
def test_keys_of_several_processes(function, device):
    """The batch as keys of its own rows, and rows taken from it, are the batch with itself."""
    x, labels = features(12), torch.arange(12) % 4
    whole = function(x, labels, reduction="none")
    torch.testing.assert_close(function(x, labels, keys=x, key_labels=labels, reduction="none"), whole)
    part = function(x[3:8], labels[3:8], keys=x, key_labels=labels, label_offset=3, reduction="none")
    torch.testing.assert_close(part, whole[3:8])


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_scale_and_bias_as_open_clip_holds_them(name, device):
    """Numbers, tensors without dimensions, and of one element and another type; each gets its gradient."""
    function = getattr(F, name)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = features(9, dtype=dtype), features(9, seed=1, dtype=dtype)
        plain = function(x, y, 10.0, -10.0)
        scale = torch.full((1,), 10.0, requires_grad=True)
        bias = torch.full((), -10.0, dtype=torch.float64, requires_grad=True)
        loss = function(x, y, scale, bias)
        assert loss.dtype == dtype
        assert torch.equal(loss, plain)
        loss.backward()
        assert (scale.grad.shape, scale.grad.dtype) == ((1,), torch.float32)
        assert bias.grad.dtype == torch.float64
        wide = evaluate(
            getattr(reference, name),
            {"image_features": x.double(), "text_features": y.double(), "logit_scale": scale.detach().double(),
             "logit_bias": bias.detach()},
            ["logit_scale", "logit_bias"],
            torch.ones((), dtype=torch.float64),
        )  # fmt: skip
        torch.testing.assert_close(scale.grad.double(), wide.grads["logit_scale"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias.grad, wide.grads["logit_bias"], rtol=1e-4, atol=1e-6)


def test_gathered_blocks_add_up_to_the_whole(device):
    """SigLIP over several processes: own texts with an offset, the neighbours' without positives."""
    x, y = features(6), features(10, seed=1)
    whole = F.siglip_loss(x, y, 10.0, -5.0, label_offset=3, reduction="sum")
    parts = [
        F.siglip_loss(x, y[3:9], 10.0, -5.0, reduction="sum"),
        F.siglip_loss(x, y[:3], 10.0, -5.0, reduction="sum", label_offset=None),
        F.siglip_loss(x, y[9:], 10.0, -5.0, reduction="sum", label_offset=None),
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_info_nce_among_more_keys(device):
    """Keys gathered from several processes: the cross-entropy with shifted labels."""
    q, k = features(5).requires_grad_(), features(12, seed=1).requires_grad_()
    loss = F.info_nce(q, k, temperature=0.2, label_offset=4, normalize=False)
    want = TF.cross_entropy(q @ k.t() / 0.2, torch.arange(5) + 4)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(
        torch.autograd.grad(loss, (q, k)), torch.autograd.grad(want, (q, k)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_bad_arguments():
    x, y = features(4), features(5, seed=1)
    with pytest.raises(ValueError, match="text_features"):
        F.clip_loss(x, y, 1.0)
    with pytest.raises(ValueError, match="text_features"):
        F.siglip_loss(x, y[:, 1:], 1.0)
    with pytest.raises(ValueError, match="label_offset"):
        F.siglip_loss(x, y, 1.0, label_offset=2)
    with pytest.raises(ValueError, match="logit_scale"):
        F.clip_loss(x, x, torch.ones(2))
    with pytest.raises(TypeError, match="logit_bias"):
        F.siglip_loss(x, x, 1.0, "0")
    with pytest.raises(ValueError, match="temperature"):
        F.info_nce(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="negative_mode"):
        F.info_nce(x, x, x, negative_mode="both")
    with pytest.raises(ValueError, match="labels"):
        F.sup_con_loss(x, torch.arange(3))
    with pytest.raises(RuntimeError, match="labels"):
        F.sup_con_loss(x, torch.rand(4))
    with pytest.raises(TypeError, match="key_labels"):
        F.sup_con_loss(x, torch.arange(4), keys=y)
    with pytest.raises(ValueError, match="key_labels"):
        F.pair_nt_xent_loss(x, torch.arange(4), key_labels=torch.arange(4))
    with pytest.raises(ValueError, match="label_offset"):
        F.sup_con_loss(x, torch.arange(4), keys=y, key_labels=torch.arange(5), label_offset=2)
    with pytest.raises(ValueError, match="positive"):
        F.multiple_negatives_ranking_loss(y, x)
    with pytest.raises(ValueError, match="sample_weight"):
        F.nt_xent_loss(x, x, sample_weight=torch.ones(8))
    with pytest.raises(RuntimeError, match="text_features"):
        F.clip_loss(x, x.double(), 1.0)


@pytest.mark.slow
def test_peak_memory():
    """Proportional to the features: no matrix of similarities, which here would take 64 MiB."""
    code = """
import torch, fastloss.functional as F
def peak():
    line, = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
x, y = torch.randn(4096, 32).requires_grad_(), torch.randn(4096, 32).requires_grad_()
labels = torch.arange(4096) // 4
calls = [lambda x, y: F.clip_loss(x, y, 1.0), lambda x, y: F.siglip_loss(x, y, 1.0),
         lambda x, y: F.sup_con_loss(x, labels), lambda x, y: F.pair_nt_xent_loss(x, labels)]
calls[0](x[:64], y[:64])
before = peak()
for call in calls:
    call(x, y).backward()
    assert peak() - before < 24, peak() - before
"""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(F.__file__).parents[1]), *filter(None, sys.path)])
    }
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("function", [F.clip_loss, F.siglip_loss], ids=lambda f: f.__name__)
def test_weights_that_lie_apart(function, device):
    """The mean is divided by the sum of the weights, and not of what lies between them."""
    weight = torch.tensor([0.5, -7.0, 1.5, 9.0, 1.0, 4.0], device=device)[::2]
    x, y = (features(3, seed=seed).to(device) for seed in (1, 2))
    assert same_bits(
        function(x, y, 3.0, sample_weight=weight), function(x, y, 3.0, sample_weight=weight.clone())
    )


@every
@some_dtypes
def test_several_blocks(loss, dtype, device, monkeypatch):
    """Rows and columns are summed over blocks of a matrix, the last of which are smaller."""
    shape = (131, *loss.shapes[-1][1:])
    for case in loss.cases:
        whole = assert_right(loss, make(loss, case, dtype, device, shape))
        with monkeypatch.context() as patch:
            patch.setattr(similarity, "BUDGET", 16 << 10)
            rows, cols = similarity.block_shape(131, 131, 4)
            assert 131 % rows and 131 % cols and rows < 66 and cols < 128
            kwargs = make(loss, case, dtype, device, shape)
            parts = assert_right(loss, kwargs)
            again = assert_right(loss, kwargs)
        for (name, a), (_, b), (_, c) in zip(parts.parts(), again.parts(), whole.parts(), strict=True):
            assert same_bits(a, b), name
            assert a.shape == c.shape, name


def test_shape_of_blocks():
    assert similarity.block_shape(65536, 65536, 4) == (8192, 8192)
    assert similarity.block_shape(1000, 3000, 4) == (1000, 3000)
    for m in (1, 5, 8191, 40000, 1 << 20):
        for n in (1, 7, 8193, 65537, 1 << 20):
            for itemsize in (4, 8):
                rows, cols = similarity.block_shape(m, n, itemsize)
                assert rows <= m and cols <= n and rows * -(-cols // 8) * 8 * itemsize <= similarity.BUDGET
                assert rows == m or rows % 128 == 0
                assert cols == n or cols % 8 == 0
                rows, cols = similarity.block_shape(m, n, itemsize, True)
                assert cols == n and 1 <= rows <= m


def test_far_apart_in_float64(device):
    """log(1 + e^d) where d is 20 and more: torch's own softplus leaves e^-d out, which float64 sees."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for scale in (19.0, 21.0, 30.0, 100.0):
        beyond = math.log1p(math.exp(-scale))
        for value in (
            F.info_nce(x, y, temperature=1 / scale, reduction="none")[1],
            F.info_nce(x[1:], y[1:], y[:1], 1 / scale, "none")[0],
            F.info_nce(x, y, y.flip(0).unsqueeze(1), 1 / scale, "none", "paired")[1],
            F.multiple_negatives_ranking_loss(x, y, scale=scale, reduction="none")[1],
            reference.info_nce(x, y, temperature=1 / scale, reduction="none")[1],
        ):
            assert value.item() - scale == pytest.approx(beyond, abs=4e-15 * scale)
        both = F.clip_loss(x, y, scale, reduction="none")[1].item()
        assert both == pytest.approx(0.5 * (scale + beyond) + 0.5 * math.log(2), rel=1e-15)
        points = torch.tensor([[0.0], [scale], [0.0], [scale]], dtype=torch.float64)
        gap = F.batch_hard_triplet_loss(points, torch.tensor([0, 0, 1, 1]), None)
        assert gap.item() - scale == pytest.approx(beyond, abs=4e-15 * scale)


def test_paired_negatives_at_a_low_temperature():
    """Logits of some hundred: the gradient has the error of their differences, not of their logsumexp."""
    generator = torch.Generator().manual_seed(0)
    worst = {"ours": 0.0, "eager": 0.0}
    for _ in range(40):
        q, k = (torch.randn(8, 16, generator=generator) for _ in range(2))
        negatives = torch.randn(8, 5, 16, generator=generator)

        def gradient(call, dtype, q=q, k=k, negatives=negatives):
            leaf = q.to(dtype).requires_grad_()
            loss = call(leaf, k.to(dtype), negatives.to(dtype), 0.005, "sum", "paired")
            return torch.autograd.grad(loss, leaf)[0].double()

        exact = gradient(reference.info_nce, torch.float64)
        for name, call in (("ours", F.info_nce), ("eager", eager_info_nce)):
            worst[name] += (gradient(call, torch.float32) - exact).abs().max().item()
    assert worst["ours"] < 1.5 * worst["eager"]


def eager_info_nce(query, positive_key, negative_keys, temperature, reduction, negative_mode):
    """As info-nce-pytorch has it."""
    q, k, negatives = (TF.normalize(x, dim=-1) for x in (query, positive_key, negative_keys))
    of_negatives = (negatives @ q.unsqueeze(-1)).squeeze(-1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), of_negatives], 1) / temperature
    return TF.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long), reduction=reduction)
