"""Preference and reward heads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.options import one_of, reduced, select, softplus, weighed

__all__ = ["alpha_po_loss", "cpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]


def kto_element(lp, ref, desirable, kl, beta, desirable_weight, undesirable_weight) -> Tensor:
    ratio = lp - ref
    good = (desirable > 0).to(ratio.dtype)
    b = beta * (2 * good - 1)
    w = desirable_weight * good + undesirable_weight * (1 - good)
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
    """Compute `fastloss.functional.kto_loss`."""
    one_of("loss_type", loss_type, ("kto", "apo_zero_unpaired"))
    point = 0.0 if kl is None or loss_type == "apo_zero_unpaired" else torch.as_tensor(kl).detach()
    loss = kto_element(
        policy_logps, reference_logps, labels, point, beta, desirable_weight, undesirable_weight
    )
    return reduced(loss, reduction)


def reference_free_element(c, r, nll, type, beta, margin, label_smoothing, nll_weight, alpha) -> Tensor:
    if alpha:
        c, r = -torch.expm1(-alpha * c) / alpha, -torch.expm1(-alpha * r) / alpha
    u = beta * (c - r) - margin
    formula = select("loss_type", type, {
        "sigmoid": lambda: weighed(1 - label_smoothing, softplus(-u)) + weighed(label_smoothing, softplus(u)),
        "hinge": lambda: torch.relu(1 - u),
        "ipo": lambda: (c - r - 1 / (2 * beta)).square(),
    })  # fmt: skip
    loss = formula()
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
    """Compute `fastloss.functional.simpo_loss`."""
    one_of("loss_type", loss_type, ("sigmoid", "hinge"))
    loss = reference_free_element(
        chosen_logps, rejected_logps, None, loss_type, beta, gamma, label_smoothing, 0.0, 0.0
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
    """Compute `fastloss.functional.cpo_loss`."""
    weight = 0.0 if chosen_nll is None else alpha
    loss = reference_free_element(
        chosen_logps, rejected_logps, chosen_nll, loss_type, beta, 0.0, label_smoothing, weight, 0.0
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
    """Compute `fastloss.functional.alpha_po_loss`."""
    loss = reference_free_element(
        chosen_logps, rejected_logps, None, "sigmoid", beta, gamma, label_smoothing, 0.0, alpha
    )
    return reduced(loss, reduction)


def orpo_element(c, r, nll, beta, nll_from_logps) -> Tensor:
    log_odds = (c - torch.log(-torch.expm1(c))) - (r - torch.log(-torch.expm1(r)))
    return beta * softplus(-log_odds) + (-c if nll_from_logps else nll)


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Compute `fastloss.functional.orpo_loss`."""
    return reduced(
        orpo_element(chosen_logps, rejected_logps, chosen_nll, beta, chosen_nll is None), reduction
    )
