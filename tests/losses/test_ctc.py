"""CTC: torch's own results, all alignments by hand, inputs without alignment, lengths and blanks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as TF
from support import same_bits
from torch.autograd import grad

import fastloss.functional as F


def speech(steps, batch, classes, width, blank=0, device="cpu", dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, batch, classes, generator=g, dtype=dtype)
    labels = torch.randint(classes - 1, (batch, width), generator=g)
    inputs = steps - torch.randint(min(3, steps), (batch,), generator=g)
    lengths = torch.randint(width + 1, (batch,), generator=g)
    targets = labels + (labels >= blank)
    return x.to(device).requires_grad_(), *(t.to(device) for t in (targets, inputs, lengths))


SIZES = [(1, 1, 3, 1, 0), (12, 4, 7, 4, 0), (50, 5, 30, 20, 3), (40, 2, 5, 18, 4), (7, 3, 4, 0, 0)]


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("size", SIZES)
def test_as_torch(size, reduction, zero_infinity, device):
    """Also where a target is too long for its input: infinite and NaN, or 0."""
    x, targets, inputs, lengths = speech(*size, device=device)
    options = (size[-1], reduction, zero_infinity)
    true = TF.ctc_loss(x.log_softmax(-1), targets, inputs, lengths, *options)
    upstream = torch.linspace(0.5, 1.5, true.numel(), dtype=true.dtype, device=device).view(true.shape)
    slope = grad(true, x, upstream)[0]
    row = torch.cat([t[:n] for t, n in zip(targets, lengths.tolist(), strict=True)])
    for got in (
        F.ctc_loss(x.log_softmax(-1), targets, inputs, lengths, *options),
        F.ctc_loss(x, targets, inputs, lengths, *options, from_logits=True),
        F.ctc_loss(x, row, inputs.tolist(), lengths.tolist(), *options, from_logits=True),
    ):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad(got, x, upstream)[0], slope, rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("target", [[], [1], [1, 1], [1, 2], [2, 1, 2]])
def test_sum_over_all_alignments(target, device):
    steps, classes = 5, 3
    x, *_ = speech(steps, 1, classes, 1, device=device)
    p = x[:, 0].softmax(-1)
    total = 0.0
    for path in itertools.product(range(classes), repeat=steps):
        if [k for k, _ in itertools.groupby(path) if k != 0] == target:
            total = total + math.prod(p[t, k] for t, k in enumerate(path))
    labels = torch.tensor([target], dtype=torch.int64, device=device).view(1, len(target))
    got = F.ctc_loss(x, labels, [steps], [len(target)], reduction="sum", from_logits=True)
    torch.testing.assert_close(got, -total.log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(got, x)[0], grad(-total.log(), x)[0], rtol=1e-10, atol=1e-12)


def test_gradient_is_the_derivative(device):
    """Where torch's holds the probabilities too, which log_softmax takes off again."""
    x, targets, inputs, lengths = speech(9, 3, 6, 2, device=device)
    y = x.log_softmax(-1).detach().requires_grad_()
    ours, theirs = (
        grad(f(y, targets, inputs, lengths, reduction="sum"), y)[0] for f in (F.ctc_loss, TF.ctc_loss)
    )
    alive = (torch.arange(9, device=device).unsqueeze(1) < inputs).unsqueeze(-1)
    torch.testing.assert_close(ours + torch.where(alive, y.exp(), 0.0), theirs, rtol=1e-8, atol=1e-10)


def test_one_sequence_without_a_batch(device):
    x, targets, *_ = speech(8, 1, 5, 3, device=device)
    whole = F.ctc_loss(x, targets, [8], [3], from_logits=True, reduction="none")
    for lengths in (([8], [3]), (torch.tensor(8), torch.tensor(3)), (8, 3)):
        alone = F.ctc_loss(x[:, 0], targets[0], *lengths, from_logits=True, reduction="none")
        assert alone.shape == ()
        assert same_bits(alone, whole[0])


def test_a_sequence_does_not_depend_on_the_others(device):
    x, targets, inputs, lengths = speech(30, 6, 40, 9, device=device, dtype=torch.float32)
    whole = F.ctc_loss(x, targets, inputs, lengths, from_logits=True, reduction="none", zero_infinity=True)
    slope = grad(whole.sum(), x)[0]
    for n in range(6):
        short = targets[n : n + 1, : int(lengths[n])]
        one = F.ctc_loss(
            x[:, n : n + 1], short, inputs[n : n + 1], lengths[n : n + 1], from_logits=True, reduction="none",
            zero_infinity=True,
        )  # fmt: skip
        assert same_bits(one[0], whole[n])
        assert same_bits(grad(one.sum(), x)[0][:, n], slope[:, n])


@pytest.mark.parametrize("layout", ["batch first", "every second step", "every second class"])
def test_input_in_any_layout(layout, device):
    x, targets, inputs, lengths = speech(12, 4, 7, 3, device=device)
    wide = torch.zeros(24, 4, 14, dtype=x.dtype, device=device)
    views = {
        "batch first": lambda: x.detach().transpose(0, 1).contiguous().transpose(0, 1),
        "every second step": lambda: wide[::2, :, :7].copy_(x.detach()),
        "every second class": lambda: wide[:12, :, ::2].copy_(x.detach()),
    }
    view = views[layout]().requires_grad_()
    assert view.stride() != x.stride()
    slopes = [
        grad(F.ctc_loss(z, targets, inputs, lengths, reduction="sum", from_logits=True), z)[0]
        for z in (x, view)
    ]
    assert same_bits(*slopes)
    if layout == "batch first":
        assert slopes[1].stride() == view.stride(), "no copy for what made the logits"


def test_batch_first_logits_are_not_copied():
    """As models make them; nor are contiguous ones. Seen in what is given back during the call."""
    x, targets, inputs, lengths = speech(20, 4, 500, 3)
    for logits in (x.detach(), x.detach().transpose(0, 1).contiguous().transpose(0, 1)):
        with torch.profiler.profile(profile_memory=True) as profile:
            F.ctc_loss(logits, targets, inputs, lengths, from_logits=True)
        sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
        assert sizes and max(map(abs, sizes)) < logits.nbytes


def test_long_inputs_in_float32(device):
    """No further from the truth than torch's, whose logarithms grow with the loss."""
    steps = 400 if device == "cpu" else 60
    x, targets, _, _ = speech(steps, 1, 200, steps // 4, device=device)
    lengths = [torch.tensor([steps]), torch.tensor([steps // 4])]
    true = grad(F.ctc_loss(x, targets, *lengths, from_logits=True), x)[0]
    near = x.detach().float().requires_grad_()
    ours = grad(F.ctc_loss(near, targets, *lengths, from_logits=True), near)[0]
    theirs = grad(TF.ctc_loss(near.log_softmax(-1), targets, *lengths), near)[0]
    assert (ours.double() - true).abs().max() <= (theirs.double() - true).abs().max()


def test_logits_of_any_size(device):
    x, targets, inputs, lengths = speech(12, 4, 7, 3, device=device, dtype=torch.float32)
    far = (x.detach() * 1e4).requires_grad_()
    got = F.ctc_loss(far, targets, inputs, lengths, from_logits=True, reduction="none")
    true = TF.ctc_loss(far.double().log_softmax(-1), targets, inputs, lengths, reduction="none")
    torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)
    assert grad(got.sum(), far)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"log_probs": torch.zeros(4)}, "log_probs"),
        ({"log_probs": torch.zeros(4, 2, 3).long()}, "log_probs"),
        ({"targets": torch.ones(3, 2).long()}, "targets"),
        ({"targets": torch.ones(2, 2)}, "targets"),
        ({"targets": torch.full((2, 2), 3)}, "targets"),
        ({"input_lengths": [4, 5]}, "input_lengths"),
        ({"input_lengths": [4]}, "input_lengths"),
        ({"input_lengths": [4.0, 4.0]}, "input_lengths"),
        ({"target_lengths": [2, 3]}, "target_lengths"),
        ({"target_lengths": [2, -1]}, "target_lengths"),
        ({"targets": torch.ones(3).long()}, "target_lengths"),
        ({"blank": 3}, "blank"),
        ({"reduction": "batchmean"}, "reduction"),
    ],
)
def test_refuses(change, match):
    arguments = {
        "log_probs": torch.zeros(4, 2, 3), "targets": torch.ones(2, 2).long(), "input_lengths": [4, 4],
        "target_lengths": [2, 2],
    }  # fmt: skip
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError), match=match):
        F.ctc_loss(**arguments | change)
