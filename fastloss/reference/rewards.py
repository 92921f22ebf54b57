"""Rewards and returns of groups of answers, of n steps, of exploration."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_advantages", "n_step_returns", "ride_reward"]


def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: str = "grpo", *, epsilon: float = 1e-4
) -> Tensor:
    """As `fastloss.functional.group_advantages`."""
    same = (group_ids.unsqueeze(1) == group_ids.unsqueeze(0)).to(rewards.dtype)
    count = same.sum(1)
    mean = (same * rewards).sum(1) / count
    if kind == "dr_grpo":
        return rewards - mean
    if kind == "rloo":
        return torch.where(count > 1, (rewards - mean) * count / (count - 1).clamp(min=1), 0.0)
    variance = (same * (rewards - mean.unsqueeze(1)).square()).sum(1) / (count - 1).clamp(min=1)
    deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
    return torch.where(count > 1, (rewards - mean) / (deviation + epsilon), 0.0)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    *,
    n: int = 5,
    gamma: float = 0.99,
    next_values: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
) -> Tensor:
    """As `fastloss.functional.n_step_returns`, step by step."""
    steps = rewards.shape[-1]
    none = torch.zeros_like(rewards, dtype=torch.bool)
    terminated = none if terminated is None else terminated.bool()
    truncated = none if truncated is None else truncated.bool()
    if next_values is None:
        end = torch.zeros_like(values[..., 0]) if bootstrap_value is None else bootstrap_value
        next_values = torch.cat([values[..., 1:], end.unsqueeze(-1)], -1)
    found = []
    for t in range(steps):
        total, going, last = torch.zeros_like(rewards[..., t]), ~none[..., t], min(t + n, steps) - 1
        for k, s in enumerate(range(t, last + 1)):
            total = total + torch.where(going, gamma**k * rewards[..., s], 0.0)
            stops = truncated[..., s] if s < last else torch.ones_like(going)
            led_on = going & ~terminated[..., s]
            total = total + torch.where(led_on & stops, gamma ** (k + 1) * next_values[..., s], 0.0)
            going = led_on & ~stops
        found.append(total)
    return torch.stack(found, -1) if found else rewards + values


def ride_reward(
    embeddings: Tensor, next_embeddings: Tensor, counts: Tensor, kind: str = "next_sqrt"
) -> Tensor:
    """As `fastloss.functional.ride_reward`."""
    moved = (next_embeddings - embeddings).square().sum(-1).sqrt().detach()
    return moved / (counts.to(moved.dtype).sqrt() if kind == "next_sqrt" else counts.to(moved.dtype))
