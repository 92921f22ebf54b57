"""Losses of generative flow networks: the flow into a state equals the flow out of it."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from fastloss._ops.checks import (
    check_floating,
    check_real,
    check_reduction,
    check_tensor,
    check_tensors,
    choice,
)
from fastloss._ops.dtypes import accumulation_dtype, autocast_to_fp32
from fastloss.losses.classification import cross_entropy
from fastloss.losses.elementwise import mse_loss

__all__ = ["detailed_balance_loss"]


def _minus_log_p(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the negative log-probabilities of the chosen actions; on CUDA NaN for one out of range."""
    rows = math.prod(logits.shape[:-1])
    try:
        loss = cross_entropy(logits.reshape(rows, logits.shape[-1]), chosen.reshape(rows), reduction="none")
    except IndexError as error:
        raise IndexError(f"chosen: expected an action in [0, {logits.shape[-1]})") from error
    return loss.reshape(chosen.shape)


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
    r"""Compute the detailed balance loss of a flow network with local exploration, as in GraphFlow.

    At a state with flow :math:`F`, actions i with logits :math:`r_i` lead to states with flows :math:`F'_i`; each is
    reached in one way only.

    .. math:: \sum_i \left[\log F - \log F'_i + r_i - \log \sum_j e^{r_j}\right]^2

    With `variant="chosen"`, as in GraphFlow's released code, the one action a that was taken, with the other sign of
    its log-probability, and boundary terms by the reward:

    .. math:: \left[\log F - \log F'_a - \log \pi(a)\right]^2 + [\rho > 1] (\log F - 1)^2 + [\rho < 1]
              (\log F'_a - 1)^2

    That code takes probabilities, after a ReLU, to which it adds 1e-8; here they are those of the logits as given.

    Args:
        state_flow: :math:`\log F`, shape `(...)`; float32, float64, bfloat16 or float16.
        next_flows: :math:`\log F'`, `(..., K)`.
        logits: :math:`r`, `(..., K)`.
        mask: flags of the actions that exist, `(..., K)`. Default: all.
        reduction: `"none"`, `"mean"` over the states or `"sum"`. Default: `"mean"`.
        variant: `"all"` or `"chosen"`. Default: `"all"`.
        chosen: the action that was taken, int64 `(...)`; for `variant="chosen"` alone, which needs it.
        rewards: :math:`\rho`, `(...)`, without gradient, for `variant="chosen"` alone. Default: no boundary terms.

    Returns:
        A scalar, or for `"none"` a tensor of shape `(...)`, 0 for states without actions.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: GraphFlow, https://github.com/Samyu0304/GraphFlow; detailed balance: Bengio et al.,
    https://arxiv.org/abs/2111.09266.
    """
    check_reduction(reduction)
    choice("variant", variant, ("all", "chosen"))
    check_tensor("state_flow", state_flow)
    flows = {"state_flow": state_flow, "next_flows": next_flows, "logits": logits}
    check_tensors(state_flow, next_flows=next_flows, logits=logits, mask=mask, chosen=chosen, rewards=rewards)
    for name, t in flows.items():
        check_floating(name, t)
    check_real(mask=mask, rewards=rewards)
    if logits.dim() == 0:
        raise RuntimeError("logits: expected (..., K), got a tensor without dimensions")
    rows = logits.shape[:-1]
    for name, t, shape in (
        ("state_flow", state_flow, rows), ("next_flows", next_flows, logits.shape), ("mask", mask, logits.shape),
        ("chosen", chosen, rows), ("rewards", rewards, rows),
    ):  # fmt: skip
        if t is not None and t.shape != shape:
            raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if (chosen is not None) != (variant == "chosen") or (rewards is not None and variant != "chosen"):
        raise ValueError("chosen, rewards: they go with variant='chosen', which needs chosen")
    if chosen is not None and chosen.dtype != torch.int64:
        raise RuntimeError(f"chosen: expected int64, got {chosen.dtype}")

    dtype = reduce(torch.promote_types, (t.dtype for t in flows.values()))
    acc_dtype = accumulation_dtype(dtype)
    flow, ahead, r = (t.to(acc_dtype) for t in flows.values())
    there = None if mask is None else mask != 0
    if there is not None:
        some = there.any(-1, keepdim=True)
        r = torch.where(there, r, torch.where(some, -math.inf, 0.0))
    if variant == "all":
        error = flow.unsqueeze(-1) - ahead + r.log_softmax(-1)
        if there is not None:
            error = torch.where(there, error, 0.0)
        loss = mse_loss(error, torch.zeros_like(error), reduction="none").sum(-1)
    else:
        taken = torch.arange(r.shape[-1], device=r.device) == chosen.unsqueeze(-1)
        if there is not None:  # a state whose action does not exist counts nothing, whatever it holds
            kept = (there | ~taken).all(-1)
            flow, taken = torch.where(kept, flow, 0.0), taken & there
            r = torch.where(kept.unsqueeze(-1), r, 0.0)
        ahead = torch.where(taken, ahead, 0.0).sum(-1)
        error = flow - ahead + _minus_log_p(r, chosen)
        bound = None
        if rewards is not None:
            bound = torch.where(rewards > 1, (flow - 1).square(), 0.0)
            bound = bound + torch.where(rewards < 1, (ahead - 1).square(), 0.0)
        if there is not None:
            error = torch.where(kept, error, 0.0)
            bound = None if bound is None else torch.where(kept, bound, 0.0)
        loss = mse_loss(error, torch.zeros_like(error), reduction="none")
        loss = loss if bound is None else loss + bound
    if reduction != "none":
        loss = loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)
    return loss if autocast_to_fp32(logits) else loss.to(dtype)
