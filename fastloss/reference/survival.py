"""Survival losses, with every individual beside every other of the cohort."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, one_of, reduced

__all__ = ["cox_ph_loss", "dart_loss"]


def cohorts(score: Tensor, durations: Tensor, events: Tensor, strata: Tensor | None) -> tuple[Any, ...]:
    """Return all in one shape [..., N], of which columns [..., N, 1] are another way to write it."""
    if score.shape == (*durations.shape, 1):
        score = score.squeeze(-1)
    for name, t in (("durations", durations), ("events", events), ("strata", strata)):
        if t is not None and t.shape != score.shape:
            raise RuntimeError(f"{name}: expected shape {tuple(score.shape)}, got {tuple(t.shape)}")
    if score.dim() > 1 and score.shape[-1] == 1:
        return tuple(None if t is None else t.squeeze(-1) for t in (score, durations, events, strata))
    return score, durations, events, strata


def cox_terms(log_h: Tensor, durations: Tensor, events: Tensor, strata: Tensor | None, efron: bool) -> Tensor:
    """Return [..., N]: log(sum of e^h at risk) - h of each event, 0 of the others.

    Of tied events, by efron, the l-th of d sees each of them with weight 1 - l/d.
    """
    h = log_h.to(accumulation_dtype(log_h.dtype))
    ones = durations.unsqueeze(-2).new_ones(())
    other, mine = durations.unsqueeze(-2), durations.unsqueeze(-1)  # [..., i, j]: j, i
    together = ones.bool() if strata is None else strata.unsqueeze(-2) == strata.unsqueeze(-1)
    at_risk = (other >= mine) & together
    log_weight = h.new_zeros(()).expand(at_risk.shape)
    if efron:
        tied = (other == mine) & together & events.unsqueeze(-2) & events.unsqueeze(-1)
        earlier = tied.tril(-1).sum(-1, keepdim=True).to(h.dtype)
        log_weight = torch.where(tied, torch.log1p(-earlier / tied.sum(-1, keepdim=True).clamp(min=1)), 0.0)
    risks = torch.where(at_risk & events.unsqueeze(-1), h.unsqueeze(-2) + log_weight, -math.inf)
    risks = torch.where(events.unsqueeze(-1), risks, 0.0)  # else of nothing the logarithm
    return torch.where(events, risks.logsumexp(-1) - h, 0.0)


def cox_ph_loss(
    log_h: Tensor,
    durations: Tensor,
    events: Tensor,
    *,
    ties: str = "breslow",
    strata: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.cox_ph_loss`."""
    log_h, durations, events, strata = cohorts(log_h, durations, events, strata)
    efron = one_of("ties", ties, ("breslow", "efron")) == "efron"
    happened = events.detach() != 0
    loss = cox_terms(log_h, durations.detach(), happened, strata, efron)
    return reduced(loss, reduction, happened.sum().clamp(min=1)).to(log_h.dtype)


def dart_terms(
    theta: Tensor, log_durations: Tensor, events: Tensor, alpha: float = 0.0, beta: float = 0.0
) -> Tensor:
    """Return [..., N]: event / N sum over j of max(0, e_j - e_i), plus alpha e^2 + beta theta^2."""
    theta = theta.double()
    e = log_durations - theta
    gaps = (e.unsqueeze(-2) - e.unsqueeze(-1)).relu()
    loss = torch.where(events, gaps.sum(-1), 0.0) / max(theta.shape[-1], 1)
    if alpha:
        loss = loss + alpha * e.square()
    return loss + beta * theta.square() if beta else loss


def dart_loss(
    theta: Tensor,
    durations: Tensor,
    events: Tensor,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.dart_loss`."""
    theta, durations, events, _ = cohorts(theta, durations, events, None)
    loss = dart_terms(theta, durations.detach().double().log(), events.detach() != 0, alpha, beta)
    return reduced(loss, reduction, max(loss.numel(), 1)).to(theta.dtype)
