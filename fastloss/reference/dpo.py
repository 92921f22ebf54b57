"""Direct preference optimisation and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss.reference.options import reduced, select, softplus, weighed
from fastloss.reference.token_statistics import linear_token_stats

__all__ = ["dpo_loss", "dpo_loss_from_logits", "linear_dpo_loss"]

FORMULA = {
    "sigmoid": "sigmoid", "sigmoid_norm": "sigmoid", "aot": "sigmoid", "aot_unpaired": "sigmoid", "hinge": "hinge",
    "ipo": "ipo", "exo_pair": "exo_pair", "nca_pair": "nca_pair", "robust": "robust", "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard", "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop", "sft": "sft",
}  # fmt: skip
"""The types, and the formula of a pair of each."""


def divergence_map(x: Tensor, divergence: str, alpha: float, top: float) -> Tensor:
    """Return what takes the place of a log-ratio x."""

    def power(rate: float) -> Tensor:
        return torch.expm1((rate * x).clamp(max=top)) / rate

    formula = select("f_divergence", divergence, {
        "reverse_kl": lambda: x,
        "js": lambda: math.log(2) - softplus(-x),
        "forward_kl": lambda: power(-1.0),
        "alpha": lambda: power(alpha - 1),
    })  # fmt: skip
    return formula()


def dpo_element(pc, pr, rc, rr, type, beta, label_smoothing, divergence, alpha, tau, top) -> Tensor:
    smoothing = label_smoothing
    c, r = (divergence_map(x, divergence, alpha, top) for x in (pc - rc, pr - rr))
    u = beta * (c - r)
    win, lose = softplus(-u), softplus(u)  # -log sigmoid(u), -log sigmoid(-u)

    def exo_pair() -> Tensor:
        kept, flipped = math.log1p(-smoothing), math.log(smoothing)
        return weighed(torch.sigmoid(u), -win - kept) + weighed(torch.sigmoid(-u), -lose - flipped)

    def discopop() -> Tensor:
        # e^-u sigmoid(u / tau), of which for u < 0 neither factor may stand alone
        above, below = u.clamp(min=0), u.clamp(max=0)
        tail = torch.where(
            u >= 0, torch.exp(-above) * torch.sigmoid(above / tau),
            torch.exp(below * (1 / tau - 1)) * torch.sigmoid(-below / tau),
        )  # fmt: skip
        return win * torch.sigmoid(-u / tau) + tail

    formula = select("loss_type", type, {
        "sigmoid": lambda: weighed(1 - smoothing, win) + weighed(smoothing, lose),
        "hinge": lambda: torch.relu(1 - u),
        "ipo": lambda: (c - r - 1 / (2 * beta)).square(),
        "exo_pair": exo_pair,
        "nca_pair": lambda: softplus(-beta * c) + 0.5 * softplus(beta * c) + 0.5 * softplus(beta * r),
        "robust": lambda: (weighed(1 - smoothing, win) - weighed(smoothing, lose)) / (1 - 2 * smoothing),
        "bco_pair": lambda: softplus(-beta * c) + softplus(beta * r),
        "sppo_hard": lambda: (c - 0.5 / beta).square() + (r + 0.5 / beta).square(),
        "apo_zero": lambda: torch.sigmoid(-beta * c) + torch.sigmoid(beta * r),
        "apo_down": lambda: torch.sigmoid(beta * c) + torch.sigmoid(-u),
        "discopop": discopop,
        "sft": lambda: -pc,
    })  # fmt: skip
    return formula()


def ascending(x: Tensor) -> Tensor:
    """Sort a batch; equal entries keep their order, which says where their gradients go."""
    return x.sort(dim=0, stable=True).values


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    reduction: str = "mean",
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    exponent_clamp: float | None = None,
    discopop_tau: float = 0.05,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    loss_weights: Sequence[float] | None = None,
    weight: Tensor | None = None,
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute `fastloss.functional.dpo_loss`."""
    pc, pr = policy_chosen_logps, policy_rejected_logps
    rc, rr = reference_chosen_logps, reference_rejected_logps
    rewards = (beta * (pc - rc)).detach(), (beta * (pr - rr)).detach()
    n, m = chosen_lengths, rejected_lengths
    if weight is not None:  # what stands at a weight of 0 has no derivative
        pc, pr, rc, rr, n, m = (
            None if x is None else torch.where(weight != 0, x, 0) for x in (pc, pr, rc, rr, n, m)
        )
    kinds = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    loss_weights = [1.0] * len(kinds) if loss_weights is None else loss_weights
    divergence = "reverse_kl" if f_divergence == "alpha" and f_alpha == 1 else f_divergence
    loss: Any = 0.0
    for kind, loss_weight in zip(kinds, loss_weights, strict=True):
        formula = select("loss_type", kind, FORMULA)
        inputs: tuple[Any, Any, Any, Any] = pc, pr, rc, rr
        if kind == "sft" and n is not None:
            inputs = pc * n.numel() / n.sum().clamp(min=1).expand(n.shape), pr, rc, rr
        elif kind in ("ipo", "sigmoid_norm") and n is not None:
            inputs = pc / n.clamp(min=1), pr / m.clamp(min=1), rc / n.clamp(min=1), rr / m.clamp(min=1)
        elif kind == "aot":
            inputs = ascending(pc - pr), 0.0, ascending(rc - rr), 0.0
        elif kind == "aot_unpaired":
            inputs = ascending(pc - rc), ascending(pr - rr), 0.0, 0.0
        loss = loss + loss_weight * dpo_element(
            *inputs, formula, beta, label_smoothing, divergence, f_alpha, discopop_tau,
            math.inf if exponent_clamp is None else exponent_clamp,
        )  # fmt: skip
    if weight is not None:
        loss = torch.where(weight != 0, weight.detach() * loss, 0.0)
    loss = reduced(loss, reduction)
    return (loss, *rewards) if return_rewards else loss


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of the chosen and those of the rejected completions."""
    chosen, rejected = x.chunk(2)
    return chosen, rejected


def in_shared_prefix(valid: Tensor) -> Tensor:
    """Return for tokens [2B, T], chosen first, whether they are among as many as the shorter completion has."""
    length = valid.sum(-1)
    shorter = torch.stack(halves(length)).min(0).values
    ahead = valid.cumsum(-1) - valid.long()  # tokens that stand before
    return ahead < torch.cat([shorter, shorter]).unsqueeze(-1)


def dpo_loss_from_logits(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    exponent_clamp: float | None = None,
    discopop_tau: float = 0.05,
    loss_weights: Sequence[float] | None = None,
    temperature: float = 1.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    return_rewards: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute `fastloss.functional.dpo_loss_from_logits`."""
    valid = labels != ignore_index
    logits = policy_logits if policy_logits.dtype == torch.float64 else policy_logits.float()
    every = (logits / temperature).log_softmax(-1)
    tokens = every.gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
    tokens = torch.where(valid, tokens, 0.0)
    counted = tokens
    if ld_alpha is not None:
        counted = torch.where(in_shared_prefix(valid), tokens, ld_alpha * tokens if ld_alpha else 0.0)
    length = valid.sum(-1)
    weight = None
    if use_weighting:
        adjusted = torch.where(valid, tokens - (2 * every).logsumexp(-1), 0.0).sum(-1) / length.clamp(min=1)
        first, second = halves(adjusted.detach())
        weight = (first + second).exp().clamp(max=1.0)
    (chosen, rejected), (n, m) = halves(counted.sum(-1)), halves(length)
    return dpo_loss(
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, f_divergence=f_divergence, f_alpha=f_alpha, exponent_clamp=exponent_clamp,
        discopop_tau=discopop_tau, chosen_lengths=n, rejected_lengths=m, loss_weights=loss_weights, weight=weight,
        return_rewards=return_rewards,
    )  # fmt: skip


def linear_dpo_loss(
    chosen_input: Tensor,
    rejected_input: Tensor,
    linear_weight: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    reduction: str = "mean",
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Compute `fastloss.functional.linear_dpo_loss`."""

    def of_sequences(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        valid = labels != ignore_index
        logp = linear_token_stats(
            hidden, linear_weight, torch.where(valid, labels, 0), temperature, linear_bias=linear_bias,
            mask=valid, softcap=softcap,
        ).logp  # fmt: skip
        return logp.sum(-1), valid.sum(-1)

    chosen, chosen_lengths = of_sequences(chosen_input, chosen_labels)
    rejected, rejected_lengths = of_sequences(rejected_input, rejected_labels)
    lengths: dict[str, Any] = {}
    if loss_type in ("ipo", "sigmoid_norm", "sft"):
        lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return dpo_loss(  # type: ignore[return-value]  # without rewards it is a tensor
        chosen, rejected, reference_chosen_logps, reference_rejected_logps, beta, label_smoothing, loss_type,
        reduction, **lengths,
    )  # fmt: skip
