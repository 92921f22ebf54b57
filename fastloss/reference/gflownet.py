"""Balance of flows, with probabilities written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, reduced, select

__all__ = ["detailed_balance_loss"]


def detailed_balance_loss(
    state_flow: Tensor,
    next_flows: Tensor,
    logits: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    *,
    variant: str = "all",
    chosen: Tensor | None = None,
    rewards: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.detailed_balance_loss`."""
    dtype = torch.promote_types(torch.promote_types(state_flow.dtype, next_flows.dtype), logits.dtype)
    acc_dtype = accumulation_dtype(dtype)
    flow, ahead, x = (t.to(acc_dtype) for t in (state_flow, next_flows, logits))
    if state_flow.shape != logits.shape[:-1] or next_flows.shape != logits.shape:
        raise RuntimeError("next_flows, state_flow: expected the shape of logits, without its last dimension")
    there = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    ahead, x = torch.where(there, ahead, 0.0), torch.where(there, x, 0.0)
    flow = torch.where(there.any(-1), flow, 0.0)
    top = torch.where(there, x.detach(), -math.inf).amax(-1, keepdim=True)
    x = x - torch.where(there.any(-1, keepdim=True), top, 0.0)
    total = torch.where(there, x, -math.inf).exp().sum(-1, keepdim=True)
    log_p = x - torch.where(there.any(-1, keepdim=True), total, 1.0).log()

    def of_all() -> Tensor:
        return torch.where(there, flow.unsqueeze(-1) + log_p - ahead, 0.0).square().sum(-1)

    def of_chosen() -> Tensor:
        place = chosen.unsqueeze(-1)
        if bool(((place < 0) | (place >= x.shape[-1])).any()):
            raise RuntimeError("chosen: expected places of actions")
        lp, next_flow, kept = (t.gather(-1, place).squeeze(-1) for t in (log_p, ahead, there))
        state = torch.where(kept, flow, 0.0)
        loss = (state - torch.where(kept, lp, 0.0) - next_flow).square()
        if rewards is not None:
            loss = loss + torch.where(rewards > 1, (state - 1).square(), 0.0)
            loss = loss + torch.where(rewards < 1, (next_flow - 1).square(), 0.0)
        return torch.where(kept, loss, 0.0)

    loss = select("variant", variant, {"all": of_all, "chosen": of_chosen})()
    return reduced(loss, reduction, max(loss.numel(), 1)).to(dtype)
