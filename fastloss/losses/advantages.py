"""Group-relative advantages and exploration rewards, from a few tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss._ops.checks import check_floating, check_number, check_tensor, check_tensors, choice
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.groups import Groups

__all__ = ["group_advantages", "ride_reward"]


def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: str = "grpo", *, epsilon: float = 1e-4
) -> Tensor:
    r"""Compute group-relative advantages of the completions of each prompt.

    With the mean :math:`\bar r` and the (unbiased) standard deviation :math:`s` of the rewards of a group of :math:`n`
    completions, :math:`(r - \bar r) / (s + \varepsilon)` (grpo), :math:`r - \bar r` (dr_grpo), or
    :math:`(r - \bar r)\, n / (n - 1)`, the difference from the mean of the others (rloo). A completion that is alone in
    its group has advantage 0.

    Args:
        rewards: shape `(N)`; float32, float64, bfloat16 or float16.
        group_ids: integers `(N)`, any ids, in any order.
        kind: `"grpo"`, `"dr_grpo"` or `"rloo"`. Default: `"grpo"`.
        epsilon: :math:`\varepsilon \ge 0`. Default: 1e-4, as in TRL (verl: 1e-6).

    Returns:
        Advantages of shape `(N)`, differentiable in the rewards. Sums are in float64, of differences from the group's
        first reward and in the order of the group: where all rewards of a group are equal its advantages are 0, and
        they depend on nothing else than their group.

    Raises:
        ValueError, TypeError: for unsupported shapes, types and options, naming the argument.

    Source: https://arxiv.org/abs/2402.03300, https://arxiv.org/abs/2503.20783, https://arxiv.org/abs/2402.14740.
    """
    choice("kind", kind, ("grpo", "dr_grpo", "rloo"))
    epsilon = check_number("epsilon", epsilon, 0.0)
    check_tensor("rewards", rewards)
    check_tensors(rewards, group_ids=group_ids)
    check_floating("rewards", rewards)
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            "rewards, group_ids: expected the same single dimension, got "
            f"{tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids: expected integers, got {group_ids.dtype}")
    groups, r = Groups(group_ids), rewards.double()

    def of_group(x: Tensor) -> Tensor:
        return groups.of(groups.sums(x))

    count = groups.lengths[groups.group].double()
    first = groups.firsts(r)
    gap = r - torch.where(first.isfinite(), first, 0.0)
    centred = gap - of_group(gap) / count
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        centred = torch.where(count > 1, centred * (count / others), 0.0)
    elif kind == "grpo":
        variance = of_group(centred.square()) / others
        spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        centred = torch.where(count > 1, centred / (spread + epsilon), 0.0)
    return centred.to(rewards.dtype)


def ride_reward(
    embeddings: Tensor, next_embeddings: Tensor, counts: Tensor, kind: str = "next_sqrt"
) -> Tensor:
    r"""Compute the RIDE exploration bonus: embedding distance between consecutive states.

    .. math:: \frac{\lVert \phi(s_{t+1}) - \phi(s_t) \rVert_2}{\sqrt{N}}

    with the number :math:`N` of visits to :math:`s_{t+1}` in the episode, as the released code has it. The kind
    `"count"` divides by :math:`N` itself, meant as the number of visits to :math:`s_t`.

    Args:
        embeddings, next_embeddings: :math:`\phi(s_t)` and :math:`\phi(s_{t+1})`, shape `(..., D)`; float32, float64,
            bfloat16 or float16.
        counts: :math:`N \ge 1`, this visit included, shape `(...)`, any real type.
        kind: `"next_sqrt"` or `"count"`. Default: `"next_sqrt"`.

    Returns:
        Rewards of shape `(...)` and the wider type of the embeddings. They are rewards: no gradient flows through them.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and kinds.

    Source: Raileanu and Rocktaeschel, https://arxiv.org/abs/2002.12292, and its released code.
    """
    choice("kind", kind, ("next_sqrt", "count"))
    for name, t in (
        ("embeddings", embeddings),
        ("next_embeddings", next_embeddings),
        ("counts", counts),
    ):
        check_tensor(name, t)
    check_floating("embeddings", embeddings)
    check_floating("next_embeddings", next_embeddings)
    if embeddings.dim() == 0 or next_embeddings.shape != embeddings.shape:
        raise RuntimeError(
            f"next_embeddings: expected the shape of embeddings, (..., D), {tuple(embeddings.shape)}, got "
            f"{tuple(next_embeddings.shape)}"
        )
    if counts.is_complex() or counts.shape != embeddings.shape[:-1]:
        raise RuntimeError(
            f"counts: expected real numbers of shape {tuple(embeddings.shape[:-1])}, got {counts.dtype} "
            f"{tuple(counts.shape)}"
        )
    dtype = torch.promote_types(embeddings.dtype, next_embeddings.dtype)
    acc_dtype = accumulation_dtype(dtype)
    with torch.no_grad():
        moved = torch.linalg.vector_norm(next_embeddings.to(acc_dtype) - embeddings.to(acc_dtype), dim=-1)
        n = counts.to(acc_dtype)
        return (moved / (n.sqrt() if kind == "next_sqrt" else n)).to(dtype)
