"""DPO of completions of several lengths: means, what does not count, counts in half types."""

from __future__ import annotations

import math

import pytest
import torch
from support.completions import answers, logps
from torch.autograd import grad
from torch.nn.functional import logsigmoid as lsig

import fastloss.functional as FL

BETA = 0.3


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["ipo", "sigmoid_norm", "sft", ("sigmoid", "sft")])
def test_dpo_pairs_of_weight_0_do_not_count(kind, reduction, device):
    """Whatever they hold, their lengths too: value, gradients and second derivatives."""
    results = []
    for held, length in ((-2.0, 3.0), (math.nan, math.nan), (math.inf, 0.0), (-1e38, 1e38), (0.0, -1.0)):
        inputs = [x.detach().float() for x in logps(4, device=device)]
        n, m = (torch.arange(1.0, 38.0, device=device) % k for k in (5, 7))  # some are 0
        weight = torch.arange(37, device=device) % 3 * 0.5
        for x in inputs:
            x[::3] = held
            x.requires_grad_()
        n[::3] = m[::3] = length
        loss = FL.dpo_loss(
            *inputs,
            BETA,
            loss_type=kind,
            reduction=reduction,
            chosen_lengths=n,
            rejected_lengths=m,
            weight=weight,
        )
        first = grad(loss.sum(), inputs, create_graph=True)
        second = grad(sum(g.square().sum() for g in first), inputs, allow_unused=True, materialize_grads=True)
        results.append((loss, *first, *second))
        for x, y in zip(results[0], results[-1], strict=True):
            assert x.isfinite().all() and torch.equal(x, y), held


def test_dpo_lengths_of_0(device):
    """As of 1: the sum of no tokens is 0."""
    pc, pr, rc, rr = (x.detach().requires_grad_() for x in logps(4, device=device))
    for kind in ("ipo", "sigmoid_norm"):
        found = [
            FL.dpo_loss(pc, pr, rc, rr, BETA, loss_type=kind, chosen_lengths=n, rejected_lengths=n)
            for n in (torch.zeros_like(pc), torch.ones_like(pc))
        ]
        assert torch.equal(*found) and found[0].isfinite()
        assert torch.equal(*(grad(loss, pc)[0] for loss in found))
    assert FL.dpo_loss(pc, pr, rc, rr, loss_type="sft", chosen_lengths=torch.zeros_like(pc)).isfinite()


def test_dpo_sft_is_the_mean_of_all_tokens(device):
    """For every road to it: log-probabilities, logits, hidden states; with completions of several lengths."""
    logits, labels, rc, rr = answers(device=device)
    labels[2, :1] = 3
    chosen = labels[:3]
    wanted = torch.nn.functional.cross_entropy(logits[:3].flatten(0, 1), chosen.flatten())
    for kind in ("sft", ["sft"]):
        got = FL.dpo_loss_from_logits(logits, labels, rc, rr, loss_type=kind)
        torch.testing.assert_close(got, wanted)
    each = FL.dpo_loss_from_logits(logits, labels, rc, rr, loss_type="sft", reduction="none")
    torch.testing.assert_close(each.mean(), wanted)
    total = FL.dpo_loss_from_logits(logits, labels, rc, rr, loss_type="sft", reduction="sum")
    torch.testing.assert_close(total, 3 * wanted)
    weight = torch.eye(11, dtype=logits.dtype, device=device)
    linear = FL.linear_dpo_loss(logits[:3], logits[3:], weight, chosen, labels[3:], rc, rr, loss_type="sft")
    torch.testing.assert_close(linear, wanted)


def test_dpo_counts_are_exact_in_half_types(device):
    """4097 tokens, which neither half type can hold."""
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.tensor([-4097.0 * 2, -3.0], dtype=dtype, device=device)
        n = torch.tensor([4097, 1], device=device)
        z = torch.zeros_like(p)
        got = FL.dpo_loss(p, z, z, z, loss_type="sft", chosen_lengths=n, reduction="none")
        assert torch.equal(got, (-p.double() / 2049).to(dtype))


def test_dpo_shared_prefix_in_double_precision(device):
    """0.3 is not rounded to float32, and what counts 0 may be impossible."""
    logits, labels, rc, rr = answers(device=device)
    logits = logits.detach()
    labels[0], labels[3, 2:] = 1, -100
    tokens = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    for share in (0.3, 0.0):
        pc = tokens[0, :2].sum() + share * tokens[0, 2:].sum()
        pr = tokens[3, :2].sum()
        wanted = -lsig(BETA * (pc - rc[0] - pr + rr[0]))
        got = FL.dpo_loss_from_logits(logits, labels, rc, rr, BETA, ld_alpha=share, reduction="none")
        torch.testing.assert_close(got[0], wanted, rtol=1e-12, atol=0)
    logits[0, 4, 1] = -math.inf
    got = FL.dpo_loss_from_logits(logits, labels, rc, rr, BETA, ld_alpha=0.0, reduction="none")
    torch.testing.assert_close(got[0], wanted, rtol=1e-12, atol=0)
