"""Detailed balance: its formulas, its gradient, states without actions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad

import fastloss.functional as F
from fastloss import reference


def states(device, shape=(5, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    flow, ahead, logits = (
        torch.randn(s, generator=g, dtype=torch.float64).to(device).requires_grad_()
        for s in (shape[:-1], shape, shape)
    )
    return flow, ahead, logits, torch.randint(shape[-1], shape[:-1], generator=g).to(device)


def test_all_actions(device):
    """By u, what is out of balance: the gradients are 2 sum u, -2 u_i and 2 (u_i - p_i sum u)."""
    flow, ahead, logits, _ = states(device)
    u = flow.unsqueeze(-1) - ahead + logits.log_softmax(-1)
    loss = F.detailed_balance_loss(flow, ahead, logits, reduction="sum")
    torch.testing.assert_close(loss, u.square().sum())
    total = u.sum(-1, keepdim=True)
    expected = (2 * total.squeeze(-1), -2 * u, 2 * (u - total * logits.softmax(-1)))
    for got, wanted in zip(grad(loss, (flow, ahead, logits)), expected, strict=True):
        torch.testing.assert_close(got, wanted.detach())


def test_chosen_action_and_boundaries(device):
    flow, ahead, logits, chosen = states(device)
    rewards = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0], device=device)
    loss = F.detailed_balance_loss(
        flow, ahead, logits, variant="chosen", chosen=chosen, rewards=rewards, reduction="none"
    )
    for b, a in enumerate(chosen.tolist()):
        p = logits[b].softmax(-1)[a]
        wanted = (flow[b] - p.log() - ahead[b, a]) ** 2
        wanted = wanted + (flow[b] - 1) ** 2 * (b == 2) + (ahead[b, a] - 1) ** 2 * (b in (0, 4))
        torch.testing.assert_close(loss[b], wanted)


@pytest.mark.parametrize("variant", ["all", "chosen"])
def test_mask_leaves_actions_out(variant, device):
    flow, ahead, logits, chosen = states(device, (6, 5))
    chosen = chosen.clamp(max=2)
    more = {"chosen": chosen, "rewards": torch.full((6,), 0.5, device=device)} if variant == "chosen" else {}
    mask = (torch.arange(5, device=device) < 3).expand(6, 5).clone()
    few = F.detailed_balance_loss(
        flow, ahead[:, :3], logits[:, :3], variant=variant, reduction="none", **more
    )
    got = F.detailed_balance_loss(flow, ahead, logits, mask, variant=variant, reduction="none", **more)
    torch.testing.assert_close(got, few)
    mask[4] = False
    got = F.detailed_balance_loss(flow, ahead, logits, mask, variant=variant, reduction="none", **more)
    assert got[4] == 0
    assert all(g.isfinite().all() for g in grad(got.sum(), (flow, ahead, logits)))


@pytest.mark.parametrize("variant", ["all", "chosen"])
def test_actions_that_do_not_exist_do_not_matter(variant, device):
    """Whatever they hold, and a state without its action too: value, gradients and second derivatives."""
    results = []
    for held in (0.5, math.nan, math.inf, -math.inf, 1e38):
        flow, ahead, logits, chosen = (x.detach() for x in states(device, (6, 5)))
        mask = (torch.arange(5, device=device) < 3).expand(6, 5).clone()
        mask[4] = False
        ahead[~mask], logits[~mask] = held, held
        flow[4] = held
        chosen = chosen.clamp(max=2)
        more = (
            {"chosen": chosen, "rewards": torch.arange(6, device=device) / 2} if variant == "chosen" else {}
        )
        inputs = [x.requires_grad_() for x in (flow, ahead, logits)]
        loss = F.detailed_balance_loss(*inputs, mask, variant=variant, **more)
        first = grad(loss, inputs, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), inputs)
        results.append((loss, *first, *second))
        slow = reference.detailed_balance_loss(*inputs, mask, variant=variant, **more)
        torch.testing.assert_close(slow, loss)
        for a, b in zip(grad(slow, inputs), first, strict=True):
            torch.testing.assert_close(a, b)
        for x, y in zip(results[0], results[-1], strict=True):
            assert y.isfinite().all() and torch.equal(x, y), held


def test_boundary_terms_that_do_not_count(device):
    """A flow whose square is infinite, at a state whose reward asks for no such term."""
    flow = torch.tensor([1e30], device=device)
    zero = torch.zeros(1, 2, device=device)
    chosen = torch.zeros(1, dtype=torch.int64, device=device)
    for rewards, held in ((0.5, flow), (1.5, zero[:, 0])):
        loss = F.detailed_balance_loss(
            held, held.unsqueeze(-1) + zero, zero, variant="chosen", chosen=chosen, reduction="none",
            rewards=torch.full((1,), rewards, device=device),
        )  # fmt: skip
        assert not loss.isnan()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"next_flows": torch.zeros(2, 4)}, "next_flows"),
        ({"state_flow": torch.zeros(2, 3)}, "state_flow"),
        ({"mask": torch.zeros(2)}, "mask"),
        ({"variant": "paper"}, "variant"),
        ({"variant": "chosen"}, "chosen"),
        ({"rewards": torch.zeros(2)}, "rewards"),
        ({"variant": "chosen", "chosen": torch.tensor([0, 3])}, "chosen"),
        ({"variant": "chosen", "chosen": torch.zeros(2)}, "chosen"),
    ],
)
def test_refuses(change, match):
    arguments = {
        "state_flow": torch.zeros(2), "next_flows": torch.zeros(2, 3), "logits": torch.zeros(2, 3)
    }  # fmt: skip
    with pytest.raises((ValueError, RuntimeError, IndexError), match=match):
        F.detailed_balance_loss(**arguments | change)
