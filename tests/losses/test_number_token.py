"""Number token losses against loops over their definitions, and their conventions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import same_bits
from support.operators import Operators, past_the_dispatcher

from fastloss import reference
from fastloss._ops import autograd
from fastloss._registry import InputSampler
from fastloss.functional import (
    cross_entropy_with_number_token_loss,
    gaussian_cross_entropy,
    number_token_loss,
)
from fastloss.losses import number_token

IDS = torch.tensor([11, 3, 7, 5])
VALUES = torch.tensor([0.0, 1.0, 4.0, 2.5], dtype=torch.float64)


def draw(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 13, generator=generator, dtype=torch.float64) * 2
    labels = torch.tensor([3, 12, 7, -100, 11, 5])[torch.randint(6, shape, generator=generator)]
    return logits.to(device), labels.to(device)


def squashed(gap, factor):
    gaps = (VALUES[:, None] - VALUES).abs()
    low, high = gaps[gaps > 0].min(), gaps.max()
    return 0.0 if gap == 0 else 1 + (gap - low) * (factor - 1) / (high - low)


def one(logits, label, kind, reweigh, factor):
    """The loss of one row, or None."""
    if label not in IDS:
        return None
    y = VALUES[IDS.tolist().index(label)]
    q = logits[IDS].softmax(0)
    if kind == "wasserstein":
        gaps = [(v - y).abs() if factor is None else squashed((v - y).abs(), factor) for v in VALUES]
        loss, max_distance = sum(p * g for p, g in zip(q, gaps, strict=True)), factor or 4.0
    else:
        loss, max_distance = ((q * VALUES).sum() - y) ** 2, 16.0
    mass = logits.softmax(0)[IDS].sum()
    return loss * mass + 1.01 * max_distance * (1 - mass) if reweigh else loss


@pytest.mark.parametrize("shape", [(8,), (3, 5)])
@pytest.mark.parametrize(
    ("kind", "reweigh", "factor"),
    [
        ("wasserstein", False, None),
        ("wasserstein", True, None),
        ("wasserstein", False, 2.0),
        ("wasserstein", True, 3.0),
        ("mse", False, None),
        ("mse", True, None),
    ],
)
def test_is_its_definition(kind, reweigh, factor, shape, device):
    logits, labels = draw(*shape)
    rows = [one(x, int(y), kind, reweigh, factor) for x, y in zip(logits.reshape(-1, 13), labels.flatten())]
    counted = torch.stack([r for r in rows if r is not None])
    arguments = logits.to(device), labels.to(device), IDS.to(device), VALUES.to(device)
    options = {"kind": kind, "reweigh": reweigh, "squash_factor": factor}
    torch.testing.assert_close(number_token_loss(*arguments, **options).cpu(), counted.mean())
    each = number_token_loss(*arguments, reduction="none", **options).cpu()
    expected = torch.stack([torch.zeros((), dtype=torch.float64) if r is None else r for r in rows])
    torch.testing.assert_close(each, expected.view(shape))
    both = cross_entropy_with_number_token_loss(*arguments, ntl_weight=0.7, **options).cpu()
    plain = F.cross_entropy(logits.reshape(-1, 13), labels.flatten())
    torch.testing.assert_close(both, plain + 0.7 * counted.mean())


def test_wasserstein_is_the_area_between_the_distribution_functions(device):
    logits, _ = draw(4, device=device)
    labels = IDS.to(device)
    order = VALUES.argsort()
    steps = VALUES[order].diff()
    q = logits.cpu()[:, IDS].softmax(-1)[:, order].cumsum(-1)
    p = torch.eye(4, dtype=torch.float64)[:, order].cumsum(-1)
    expected = ((q - p).abs()[:, :-1] * steps).sum(-1)
    got = number_token_loss(logits, labels, labels, VALUES.to(device), reduction="none")
    torch.testing.assert_close(got.cpu(), expected)


def test_labels_that_are_distributions(device):
    logits, labels = draw(7, device=device)
    ids, values = IDS.to(device), VALUES.to(device)
    one_hot = (labels[:, None] == ids).to(logits.dtype)  # all zeros where the label is no number
    for options in ({}, {"reweigh": True}, {"kind": "mse"}, {"kind": "mse", "reweigh": True}):
        got = number_token_loss(logits, one_hot, ids, values, reduction="none", **options)
        torch.testing.assert_close(
            got, number_token_loss(logits, labels, ids, values, reduction="none", **options)
        )
    half = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64, device=device)  # of 0 and 4
    sure = torch.full((1, 13), -torch.inf, dtype=torch.float64, device=device)
    sure[0, 5] = 0  # 2.5
    far = number_token_loss(sure, half[None], ids, values)
    torch.testing.assert_close(far, torch.tensor(2.0, dtype=torch.float64, device=device))
    logits.requires_grad_()
    q = logits[:, ids].softmax(-1).detach()
    loss = number_token_loss(logits, q, ids, values)  # the distribution itself
    assert loss.abs() < 1e-14
    with pytest.raises(RuntimeError, match="labels"):
        number_token_loss(logits, q[:, 1:], ids, values)
    with pytest.raises(ValueError, match="squash_factor"):
        number_token_loss(logits, q, ids, values, squash_factor=2.0)


@pytest.mark.parametrize("kind", ["wasserstein", "mse"])
def test_no_numbers_is_zero_with_a_graph(kind, device):
    logits, labels = draw(5, device=device)
    logits.requires_grad_()
    loss = number_token_loss(logits, torch.full_like(labels, 12), IDS.to(device), VALUES.to(device), kind)
    assert loss == 0
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad == 0).all()
    everything_ignored = torch.full_like(labels, -100)
    both = cross_entropy_with_number_token_loss(logits, everything_ignored, IDS.to(device), VALUES.to(device))
    assert both.isnan()


def test_rows_without_a_number_have_no_gradient(device):
    logits, labels = draw(12, device=device)
    logits.requires_grad_()
    loss = number_token_loss(logits, labels, IDS.to(device), VALUES.to(device), reweigh=True)
    (grad,) = torch.autograd.grad(loss, logits)
    number = torch.isin(labels.cpu(), IDS).to(device)
    assert (grad[~number] == 0).all()
    assert (grad[number] != 0).all()


def test_ignored_number_does_not_count(device):
    logits, _ = draw(2, device=device)
    labels, ids, values = torch.tensor([3, 7], device=device), IDS.to(device), VALUES.to(device)
    got = number_token_loss(logits, labels, ids, values, ignore_index=7)
    torch.testing.assert_close(got, number_token_loss(logits[:1], labels[:1], ids, values))


def test_gaussian_over_class_indices(device):
    logits, _ = draw(6, device=device)
    target = torch.tensor([0, 1, 6, 11, 12, -100], device=device)
    classes = torch.arange(13, device=device, dtype=torch.float64)
    q = torch.exp(-((classes - target[:, None]) ** 2) / (2 * 1.3**2))
    q = q / q.sum(-1, keepdim=True)
    expected = torch.where(target != -100, -(q * logits.log_softmax(-1)).sum(-1), 0.0)
    got = gaussian_cross_entropy(logits, target, 1.3, reduction="none")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gaussian_cross_entropy(logits, target, 1.3), expected.sum() / 5)
    torch.testing.assert_close(gaussian_cross_entropy(logits, target, 0.0), F.cross_entropy(logits, target))


def test_gaussian_over_values(device):
    logits, labels = draw(9, device=device)
    ids, values = IDS.to(device), VALUES.to(device)
    got = gaussian_cross_entropy(logits, labels, 1.0, ids, values, reduction="none")
    logp = logits.log_softmax(-1)
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            expected = torch.zeros((), dtype=torch.float64, device=device)
        elif label in IDS:
            y = values[IDS.tolist().index(label)]
            q = torch.exp(-((values - y) ** 2) / 2)
            expected = -(q / q.sum() * logp[row, ids]).sum()
        else:
            expected = -logp[row, label]
        torch.testing.assert_close(got[row], expected)


def test_errors(device):
    logits, labels = draw(3, device=device)
    ids, values = IDS.to(device), VALUES.to(device)
    for match, bad in (
        ("token_ids", (logits, labels, ids[None], values)),
        ("token_values", (logits, labels, ids, values[1:])),
        ("labels", (logits, labels[1:], ids, values)),
        ("labels", (logits, labels.int(), ids, values)),
    ):
        with pytest.raises(RuntimeError, match=match):
            number_token_loss(*bad)
    with pytest.raises(ValueError, match="kind"):
        number_token_loss(logits, labels, ids, values, kind="mae")
    with pytest.raises(ValueError, match="squash_factor"):
        number_token_loss(logits, labels, ids, values, squash_factor=1.0)
    with pytest.raises(ValueError, match="squash_factor"):
        number_token_loss(logits, labels, ids, values, kind="mse", squash_factor=2.0)
    with pytest.raises(ValueError, match="token_ids"):
        gaussian_cross_entropy(logits, labels, token_ids=ids)


def test_logits_on_the_device_are_picked_as_on_the_cpu():
    """There their gradient comes from a look-up for each class: the same bits, in every transformation."""
    draw = InputSampler(torch.float64)
    ids = torch.tensor([7, 0, 11, 3])
    x, g = draw.normal(5, 12).requires_grad_(), draw.normal(5, 4)
    got, wanted = number_token._picked_on_device(x, ids), number_token._picked(x, ids)
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, g, retain_graph=True)[0] for y in (got, wanted)))
    assert torch.autograd.gradgradcheck(lambda x: number_token._picked_on_device(x, ids).square(), x)
    each = torch.func.vmap(torch.func.grad(lambda x: number_token._picked_on_device(x, ids).square().sum()))(
        x
    )
    assert torch.equal(each, torch.autograd.grad(wanted.square().sum(), x)[0])
    outside = number_token._picked_on_device(x, torch.tensor([12, 0, -1]))
    assert outside.isnan().all(0).tolist() == [True, False, True]
    outside[:, 1].sum().backward()
    assert x.grad.sum(0).tolist() == [5.0] + [0.0] * 11


@pytest.mark.parametrize("function", [number_token_loss, cross_entropy_with_number_token_loss])
def test_gradient_of_large_values(function, device):
    """Of numbers of some thousands, unevenly spaced: each gradient is as exact as its own terms allow."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(7, generator=generator) * 4000 + torch.rand(7, generator=generator) ** 4 * 3000).to(
        device
    )
    ids = torch.randperm(20, generator=generator)[:7].to(device)
    logits = (torch.randn(300, 20, generator=generator) * 5).to(device).requires_grad_()
    labels = ids[torch.randint(7, (300,), generator=generator).to(device)]
    name = "number_token_loss" if function is number_token_loss else "cross_entropy_with_number_token_loss"
    more = {} if function is number_token_loss else {"ntl_weight": 1.0}
    loss = function(logits, labels, ids, values, kind="mse", reduction="sum", **more)
    (got,) = torch.autograd.grad(loss, logits)
    wide = logits.detach().cpu().double().requires_grad_()
    exact = getattr(reference, name)(
        wide, labels.cpu(), ids.cpu(), values.cpu().double(), kind="mse", reduction="sum", **more
    )
    (exact,) = torch.autograd.grad(exact, wide)
    # the mean's distance from the label, a factor, cancels by as much as the values are larger
    q = wide.detach()[:, ids.cpu()].softmax(-1)
    y = (values.cpu().double() * (labels.cpu().unsqueeze(-1) == ids.cpu())).sum(-1)
    factor = (q * values.cpu().double()).sum(-1) - y
    lost = 1e-6 * (1 + values.max().item() / factor.abs())
    error = (got.cpu().double() - exact).abs().amax(-1)
    assert (error <= lost * exact.abs().amax(-1) + 1e-5).all(), (error / exact.abs().amax(-1) / lost).max()


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 15), ({"reweigh": True}, 17), ({"kind": "mse"}, 14), ({"reduction": "none"}, 12)],
    ids=["plain", "reweigh", "mse", "none"],
)
def test_few_kernels_of_torch(options, most, simt_library):
    """Beside the kernels of the loss few are launched to look up the number tokens; in backward none."""
    logits = torch.randn(6, 20, dtype=torch.bfloat16).requires_grad_()
    ids, values, labels = (
        torch.tensor([7, 3, 11]),
        torch.tensor([2.0, 0.5, 1.0]),
        torch.tensor([3, 7, 7, 0, 2, 1]),
    )
    with autograd.use_namespace(simt_library), past_the_dispatcher():
        cross_entropy_with_number_token_loss(logits, labels, ids, values, **options)
        with Operators() as forward:
            loss = cross_entropy_with_number_token_loss(logits, labels, ids, values, **options)
        upstream = torch.ones_like(loss)
        with Operators() as backward:
            torch.autograd.grad(loss, logits, upstream)
    assert forward.launches.total() <= most, forward.launches
    # the upstream gradient in float32; where it lies on the CPU it is read instead
    assert backward.launches.keys() <= {"_to_copy", "_local_scalar_dense"}


def test_more_rows_than_blocks_of_a_backward_pass(device):
    """A backward pass may have fewer blocks than rows: each block takes several, one after the other."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1100, 1040, generator=g).to(device).requires_grad_()
    labels = torch.randint(12, (1100,), generator=g).to(device)
    labels[::5] = -100
    ids, values = torch.arange(3, 10, device=device), torch.arange(7.0, device=device)
    loss = cross_entropy_with_number_token_loss(logits, labels, ids, values)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0))
    assert same_bits(twice, 2 * once)
