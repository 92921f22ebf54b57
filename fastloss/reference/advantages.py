"""Rewards and returns of groups of completions, of n steps, of exploration."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.options import select

__all__ = ["group_advantages", "ride_reward"]


def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: str = "grpo", *, epsilon: float = 1e-4
) -> Tensor:
    """Compute `fastloss.functional.group_advantages`."""
    same = group_ids.unsqueeze(1) == group_ids.unsqueeze(0)  # [i, j]: j is of the group of i
    count = same.sum(1)
    gap = torch.where(same, rewards.double().unsqueeze(1) - rewards.double(), 0.0)  # r_i - r_j
    centred = gap.sum(1) / count

    def grpo() -> Tensor:
        variance = torch.where(same, centred.square(), 0.0).sum(1) / (count - 1).clamp(min=1)
        deviation = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        return torch.where(count > 1, centred / (deviation + epsilon), 0.0)

    def rloo() -> Tensor:
        return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0)

    found = select("kind", kind, {"grpo": grpo, "dr_grpo": lambda: centred, "rloo": rloo})()
    return found.to(rewards.dtype)


def ride_reward(
    embeddings: Tensor, next_embeddings: Tensor, counts: Tensor, kind: str = "next_sqrt"
) -> Tensor:
    """Compute `fastloss.functional.ride_reward`."""
    distance = (next_embeddings - embeddings).square().sum(-1).sqrt().detach()
    visits = counts.to(distance.dtype)
    return distance / select("kind", kind, {"next_sqrt": visits.sqrt(), "count": visits})
