"""Losses of rankings against their definitions, pair by pair and choice by choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import DTYPES, dtype_id, same_bits
from torch.autograd import grad, gradcheck, gradgradcheck

import fastloss.functional as FL
from fastloss._registry import InputSampler

KINDS = ("bradley_terry", "plackett_luce")
every_kind = pytest.mark.parametrize("kind", KINDS)


def by_hand(rewards, ranks, kind):
    """One row of Python numbers."""
    better = [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]
    if kind == "bradley_terry":
        nll = [math.log1p(math.exp(rewards[j] - rewards[i])) for i, j in better]
        return sum(nll) / max(len(nll), 1)
    total = 0.0
    for i in range(len(ranks)):
        total += math.log1p(sum(math.exp(rewards[j] - rewards[i]) for k, j in better if k == i))
    return total


@every_kind
def test_rankings_with_ties_and_masks(kind, device):
    draw = InputSampler(torch.float64, device)
    rewards, ranks = draw.normal(37, 6), draw.index(4, 37, 6)
    mask = draw.index(4, 37, 6) > 0
    got = FL.k_way_ranking_loss(rewards.masked_fill(~mask, math.nan), ranks, kind, mask, "none")
    rows = list(zip(rewards.tolist(), ranks.tolist(), mask.tolist(), strict=True))
    kept = [[[x for x, m in zip(row, m, strict=True) if m] for row in (r, k)] for r, k, m in rows]
    assert got.tolist() == pytest.approx([by_hand(r, k, kind) for r, k in kept])
    some = sum(len(set(k)) > 1 for _, k in kept)
    total = FL.k_way_ranking_loss(rewards, ranks, kind, mask)
    assert total.item() == pytest.approx(got.sum().item() / some)


@every_kind
def test_gradients(kind, device):
    draw = InputSampler(torch.float64, device)
    rewards, ranks = draw.normal(3, 5).requires_grad_(), draw.index(4, 3, 5)
    assert gradcheck(lambda r: FL.k_way_ranking_loss(r, ranks, kind), rewards)
    assert gradgradcheck(lambda r: FL.k_way_ranking_loss(r, ranks, kind), rewards)


def test_two_answers_are_a_pair(device):
    draw = InputSampler(torch.float32, device)
    rewards = draw.normal(9, 2, scale=5.0).requires_grad_()
    ranks = torch.tensor([1, 2], device=rewards.device).expand(9, 2)
    pair = FL.bradley_terry_loss(rewards[:, 0], rewards[:, 1])
    for kind in KINDS:
        loss = FL.k_way_ranking_loss(rewards, ranks, kind)
        torch.testing.assert_close(loss, pair)
        torch.testing.assert_close(grad(loss, rewards)[0], grad(pair, rewards, retain_graph=True)[0])


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_extreme_margins(kind, dtype, device):
    """Won or lost by far: relative precision, and nothing overflows."""
    margin = 9.0 if dtype.itemsize == 2 else 80.0
    rewards = torch.tensor([[margin, 0.0], [0.0, margin]], dtype=dtype, device=device, requires_grad=True)
    loss = FL.k_way_ranking_loss(rewards, torch.tensor([[0, 1]] * 2, device=device), kind, None, "none")
    small = math.log1p(math.exp(-margin))
    assert loss.tolist() == pytest.approx([small, margin + small], rel=1e-2 if dtype.itemsize == 2 else 1e-5)
    g = grad(loss.sum(), rewards)[0]
    assert g[0].tolist() == pytest.approx([-small, small], rel=1e-2 if dtype.itemsize == 2 else 1e-5)
    huge = FL.k_way_ranking_loss(rewards.detach() * 100, torch.tensor([[0, 1]] * 2, device=device), kind)
    assert huge.isfinite()


@every_kind
def test_nothing_to_compare(kind, device):
    """Ties alone, nothing left by the mask, one completion, no completion: 0 and differentiable."""
    for shape in ((3, 4), (3, 1), (3, 0), (0, 4)):
        rewards = torch.full(shape, math.nan, device=device, requires_grad=True)
        ranks = torch.ones(shape, dtype=torch.int64, device=device)
        loss = FL.k_way_ranking_loss(rewards, ranks, kind, torch.zeros(shape, device=device))
        assert loss.item() == 0
        assert torch.equal(grad(loss, rewards)[0], torch.zeros_like(rewards))
        tied = FL.k_way_ranking_loss(torch.ones_like(rewards), ranks, kind)
        assert tied.item() == 0


@every_kind
def test_a_row_does_not_depend_on_the_others(kind, device):
    draw = InputSampler(torch.float32, device)
    rewards, ranks = draw.normal(35, 7), draw.index(5, 35, 7)
    whole = FL.k_way_ranking_loss(rewards, ranks, kind, reduction="none")
    for i in (0, 16, 34):
        assert same_bits(FL.k_way_ranking_loss(rewards[i], ranks[i], kind, reduction="none"), whole[i])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ranks": torch.zeros(2, 2)}, "ranks"),
        ({"mask": torch.zeros(2, 2)}, "mask"),
        ({"rewards": torch.zeros(2, 3).long()}, "rewards"),
        ({"kind": "thurstone"}, "kind"),
        ({"reduction": "batchmean"}, "reduction"),
    ],
)
def test_refuses(change, match):
    with pytest.raises((ValueError, RuntimeError), match=match):
        FL.k_way_ranking_loss(**{"rewards": torch.zeros(2, 3), "ranks": torch.zeros(2, 3)} | change)
