"""Preference and reward heads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.dpo import DPO_TYPES, reduced, softplus

__all__ = ["alpha_po_loss", "cpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]


def kto_element(lp, ref, desirable, kl, beta, weight_desirable, weight_undesirable) -> Tensor:
    ratio = lp - ref
    good = (desirable > 0).to(ratio.dtype)
    b = beta * (2 * good - 1)
    w = weight_desirable * good + weight_undesirable * (1 - good)
    return w * torch.sigmoid(-b * (ratio - kl))


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    kl: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
) -> Tensor:
    """As `fastloss.functional.kto_loss`."""
    point = 0.0 if kl is None or loss_type == "apo_zero_unpaired" else torch.as_tensor(kl).detach()
    loss = kto_element(
        policy_logps, reference_logps, labels, point, beta, desirable_weight, undesirable_weight
    )
    return reduced(loss, reduction)


def reference_free_element(c, r, nll, type, beta, margin, smoothing, nll_weight, alpha) -> Tensor:
    if alpha:
        c, r = -torch.expm1(-alpha * c) / alpha, -torch.expm1(-alpha * r) / alpha
    type = DPO_TYPES[int(type)]
    u = beta * (c - r) - margin
    if type == "ipo":
        loss = (c - r - 1 / (2 * beta)).square()
    elif type == "hinge":
        loss = torch.relu(1 - u)
    else:
        loss = (1 - smoothing) * softplus(-u) + smoothing * softplus(u)
    return loss + nll_weight * nll if nll_weight else loss


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.simpo_loss`."""
    kind = DPO_TYPES.index(loss_type)
    loss = reference_free_element(
        chosen_logps, rejected_logps, None, kind, beta, gamma, label_smoothing, 0.0, 0.0
    )
    return reduced(loss, reduction)


def cpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.cpo_loss`."""
    kind = DPO_TYPES.index(loss_type)
    weight = 0.0 if chosen_nll is None else alpha
    loss = reference_free_element(
        chosen_logps, rejected_logps, chosen_nll, kind, beta, 0.0, label_smoothing, weight, 0.0
    )
    return reduced(loss, reduction)


def alpha_po_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    alpha: float = 0.25,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.alpha_po_loss`."""
    loss = reference_free_element(
        chosen_logps, rejected_logps, None, 0, beta, gamma, label_smoothing, 0.0, alpha
    )
    return reduced(loss, reduction)


def orpo_element(c, r, nll, beta, own) -> Tensor:
    log_odds = (c - torch.log(-torch.expm1(c))) - (r - torch.log(-torch.expm1(r)))
    return beta * softplus(-log_odds) + (-c if own else nll)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.orpo_loss`."""
    return reduced(
        orpo_element(chosen_logps, rejected_logps, chosen_nll, beta, chosen_nll is None), reduction
    )
