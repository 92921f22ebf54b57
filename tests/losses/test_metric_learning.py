"""Promises of the losses of pairs and triplets beyond the general contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF

import fastloss.functional as F


def rows(n, columns=8, seed=0):
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))


def test_equal_rows_have_a_gradient(device):
    """The derivative of a distance of 0 is 0, not NaN."""
    x = rows(3).requires_grad_()
    y = x.detach().clone()
    labels = torch.tensor([0, 0, 1])
    for loss in (
        F.contrastive_loss(x, y, torch.ones(3)),
        F.triplet_margin_loss(x, y, y, eps=0.0),
        F.batch_hard_triplet_loss(x * 0, labels),
        F.batch_all_triplet_loss(x * 0, labels),
        F.cosine_embedding_loss(x * 0, y * 0, torch.ones(3)),
    ):
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_as_torch_takes_them(device):
    """One row without a batch, integer targets, the deprecated arguments."""
    x, y, z = rows(4), rows(4, seed=1), rows(4, seed=2)
    target = torch.tensor([1, -1, 1, -1])
    close = torch.testing.assert_close
    close(F.cosine_embedding_loss(x[0], y[0], target[1]), TF.cosine_embedding_loss(x[0], y[0], target[1]))
    close(F.cosine_embedding_loss(x, y, target, 0.1), TF.cosine_embedding_loss(x, y, target, 0.1))
    close(F.triplet_margin_loss(x[0], y[0], z[0]), TF.triplet_margin_loss(x[0], y[0], z[0]))
    for legacy in ({"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="deprecated"):
            want = TF.triplet_margin_loss(x, y, z, **legacy)
            close(F.triplet_margin_loss(x, y, z, **legacy), want)


def test_hardest_rows_are_found(device):
    """More rows than a tile has, ties, classes of one, far from the origin."""
    x = rows(450, 4) + 20
    x[7] = x[3]
    labels = torch.arange(450) % 90
    labels[11] = 1000
    distance = torch.cdist(x.double(), x.double())
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    near = distance.masked_fill(~same, -1).amax(1)
    far = distance.masked_fill(same, torch.inf).amin(1)
    want = torch.relu(near - far + 1).masked_fill(torch.arange(450) == 11, 0).float()
    got = F.batch_hard_triplet_loss(x, labels, 1.0, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert got[11] == 0


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_hardest_rows_are_found_at_any_offset(offset, distance, device):
    """The choice loses nothing to what all rows have in common: gradients are those of the exact choice."""
    x = (rows(24, 16) + offset).to(device)
    labels = torch.arange(24, device=device) // 3
    wide, x = x.double().requires_grad_(), x.requires_grad_()
    unit = torch.nn.functional.normalize(wide) if distance == "cosine" else wide
    d = (unit.unsqueeze(1) - unit).square().sum(-1)
    d = {"euclidean": d.clamp(min=1e-300).sqrt(), "squared": d, "cosine": d / 2}[distance]
    same = labels.unsqueeze(1) == labels
    gap = d.masked_fill(~same, -1.0).amax(1) - d.masked_fill(same, torch.inf).amin(1)
    want = torch.relu(gap + 1).mean()
    got = F.batch_hard_triplet_loss(x, labels, 1.0, distance=distance)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if distance == "cosine" and offset:
        tolerance = {"rtol": 1e-4, "atol": 2e-6}  # float32 rounds the rows of length 1
    torch.testing.assert_close(got.double(), want, **tolerance)
    if distance != "cosine":
        (exact,) = torch.autograd.grad(want, wide)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0].double(), exact, rtol=1e-4, atol=1e-6)


def test_nan_rows_are_not_hidden(device):
    """Every row of another class, or of the same, has it as one of its two."""
    x = rows(12).to(device)
    x[5, 2] = torch.nan
    labels = torch.arange(12, device=device) // 3
    for distance in ("euclidean", "squared", "cosine"):
        each = F.batch_hard_triplet_loss(x, labels, distance=distance, reduction="none")
        assert each.isnan().all()


def test_pairs_that_are_far_apart(device):
    """Whose squared distance is infinite: apart by more than the margin, no loss and no gradient."""
    x = torch.full((1, 4), 1e30, device=device, requires_grad=True)
    loss = F.contrastive_loss(x, torch.zeros_like(x), torch.ones(1, device=device))
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].count_nonzero() == 0


def test_rows_without_a_triplet_do_not_count(device):
    """One class alone, and what a row holds: no gradient."""
    for held in (torch.nan, torch.inf, 1e38):
        x = rows(4).to(device)
        x[1] = held
        x.requires_grad_()
        loss = F.batch_hard_triplet_loss(x, torch.zeros(4, dtype=torch.long, device=device))
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def all_triplets(x, labels, margin):
    """One anchor after the other: sum over its triplets, how many count, and the mean's gradient."""
    x = x.double().requires_grad_()
    sums, number = [], 0
    for i in range(len(labels)):
        d = (x - x[i]).square().sum(1).clamp_min(1e-300).sqrt()
        near = d[(labels == labels[i]) & (torch.arange(len(labels)) != i)]
        terms = torch.relu(near.unsqueeze(1) - d[labels != labels[i]] + margin)
        sums.append(terms.sum())
        number += (terms > 0).sum()
    (grad,) = torch.autograd.grad(torch.stack(sums).sum() / number, x)
    return torch.stack(sums).detach(), number, grad


@pytest.mark.parametrize("classes", [2, 3, 40, 150])
def test_all_triplets(classes, threads, device):
    """Few positives and few negatives, ties, rows far from the origin, in any number of threads."""
    x = rows(301, 5) + 10
    x[7], x[8] = x[3], x[3]
    labels = torch.arange(301) % classes
    labels[11] = 1000
    sums, number, grad = all_triplets(x, labels, 0.3)
    answers = []
    for n in (1, 3):
        threads(n)
        y = x.clone().requires_grad_()
        loss = F.batch_all_triplet_loss(y, labels, 0.3)
        each = F.batch_all_triplet_loss(x, labels, 0.3, reduction="none")
        answers.append((loss, each, *torch.autograd.grad(loss, y)))
    loss, each, got = answers[0]
    torch.testing.assert_close(each.double(), sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.double(), sums.sum() / number, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(got.double(), grad, rtol=1e-3, atol=1e-6)
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_compare(device):
    for labels in (torch.zeros(4, dtype=torch.long), torch.arange(4)):
        x = rows(4).requires_grad_()
        for function in (F.batch_hard_triplet_loss, F.batch_all_triplet_loss):
            loss = function(x, labels)
            loss.backward()
            assert loss == 0
            assert x.grad.count_nonzero() == 0


def test_bad_arguments():
    x, y = rows(4), rows(5)
    with pytest.raises(RuntimeError, match="input2"):
        F.cosine_embedding_loss(x, y, torch.ones(4))
    with pytest.raises(RuntimeError, match="target"):
        F.cosine_embedding_loss(x, x, torch.ones(5))
    with pytest.raises(ValueError, match="margin"):
        F.triplet_margin_loss(x, x, x, margin=0.0)
    with pytest.raises(ValueError, match="variant"):
        F.kelp_ranking_loss(x, x, x, variant="code")
    with pytest.raises(ValueError, match="distance"):
        F.batch_hard_triplet_loss(x, torch.arange(4), distance="manhattan")
    with pytest.raises(TypeError, match="margin"):
        F.batch_all_triplet_loss(x, torch.arange(4), margin=None)
    with pytest.raises(ValueError, match="labels"):
        F.batch_all_triplet_loss(x, torch.arange(5))
    with pytest.raises(ValueError, match="label"):
        F.contrastive_loss(x, x, torch.ones(5))
