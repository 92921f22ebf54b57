"""Rewards and returns that a few tensor operations make: of a group of answers, of n steps, of exploration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_number
from fastloss._groups import Groups
from fastloss._heads import choice
from fastloss._registry import Draw, Loss, register_estimator
from fastloss.sequence import step_arguments

__all__ = ["group_advantages", "n_step_returns", "ride_reward"]


def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: str = "grpo", *, epsilon: float = 1e-4
) -> Tensor:
    r"""Group-relative advantages of the completions of each prompt.

    With the mean :math:`\bar r` and the (unbiased) standard deviation :math:`s` of the rewards of a group of
    :math:`n` answers, :math:`(r - \bar r) / (s + \varepsilon)` (grpo), :math:`r - \bar r` (dr_grpo), or
    :math:`(r - \bar r)\, n / (n - 1)`, the difference from the mean of the others (rloo). An answer that is alone
    in its group has advantage 0.

    Args:
        rewards: shape `(N)`; float32, float64, bfloat16 or float16.
        group_ids: int64 `(N)`, any numbers that tell the groups apart, in any order.
        kind: `"grpo"`, `"dr_grpo"` or `"rloo"`. Default: `"grpo"`.
        epsilon: :math:`\varepsilon \ge 0`. Default: 1e-4, as in TRL (verl: 1e-6).

    Returns:
        Advantages of shape `(N)`, differentiable in the rewards.

    Raises:
        ValueError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/2402.03300, https://arxiv.org/abs/2503.20783, https://arxiv.org/abs/2402.14740.
    """
    choice("kind", kind, ("grpo", "dr_grpo", "rloo"))
    epsilon = check_number("epsilon", epsilon, 0.0)
    check_floating("rewards", rewards)
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            "rewards, group_ids: expected the same single dimension, got "
            f"{tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"group_ids: expected int64, got {group_ids.dtype}")
    groups, r = Groups(group_ids), rewards.double()

    def of_group(x: Tensor) -> Tensor:
        return groups.of(groups.sums(x))

    count = groups.lengths[groups.group].double()
    centred = r - of_group(r) / count
    others = (count - 1).clamp(min=1)
    if kind == "rloo":
        centred = torch.where(count > 1, centred * (count / others), 0.0)
    elif kind == "grpo":
        variance = of_group(centred.square()) / others
        spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
        centred = torch.where(count > 1, centred / (spread + epsilon), 0.0)
    return centred.to(rewards.dtype)


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
    r"""n-step returns: discounted rewards, then the bootstrapped value.

    .. math:: G_t = \sum_{k=0}^{n-1} \gamma^k r_{t+k} + \gamma^n V_{t+n}

    ended early by a terminated step, behind which nothing follows, by a truncated step and by the last one, behind
    which their own next value does. Windows are put together from halves, about :math:`\log_2 n` passes and no
    difference of sums, so that nothing cancels.

    Args:
        rewards, values, terminated, truncated: as for `gae`, shape `(..., T)`.
        n: number of steps, at least 1. Default: 5.
        gamma: :math:`\gamma` in [0, 1]. Default: 0.99.
        next_values: :math:`V(s_{t+1})` as it was before a reset, same shape; needed with `truncated`. Default:
            `values` one step later.
        bootstrap_value: :math:`V(s_T)` behind the last step, shape `(...)`. Default: 0.

    Returns:
        The returns, of the shape of rewards and the wider type of rewards and values; differentiable in both.

    Raises:
        ValueError, TypeError: as `gae`.

    Source: Sutton and Barto, Reinforcement Learning, chapter 7; https://arxiv.org/abs/1602.01783.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected a positive number of steps, got {n}")
    gamma = check_number("gamma", gamma, 0.0, 1.0)
    (r, v, after), last, (term, trunc), _ = step_arguments(
        {"rewards": rewards, "values": values, "next_values": next_values},
        {"terminated": terminated, "truncated": truncated},
        bootstrap_value, None,
    )  # fmt: skip
    dtype, steps = r.dtype, r.shape[-1]
    if steps == 0:
        return r + v
    r, v, after, last = (
        x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x
        for x in (r, v, after, last)
    )
    if after is None:
        end = torch.zeros_like(v[..., :1]) if last is None else last.unsqueeze(-1)
        after = torch.cat([v[..., 1:], end], -1)
    # step t takes what follows, x, to add + keep x
    keep, add = torch.full_like(r, gamma), r
    if trunc is not None:
        add = torch.where(trunc, r + gamma * after, r)
        keep = torch.where(trunc, 0.0, keep)
    if term is not None:
        add, keep = torch.where(term, r, add), torch.where(term, 0.0, keep)

    def later(x: Tensor, count: int, behind: float) -> Tensor:
        """x one window on; behind the last step a window is empty."""
        return torch.cat([x[..., count:], torch.full_like(x[..., :count], behind)], -1)

    n = min(n, steps)
    window_keep = window_add = None
    done, size = 0, 1
    while True:
        if n & size:
            if window_keep is None:
                window_keep, window_add = keep, add
            else:
                window_add = window_add + window_keep * later(add, done, 0.0)
                window_keep = window_keep * later(keep, done, 1.0)
            done += size
        if done == n:
            break
        add, keep = add + keep * later(add, size, 0.0), keep * later(keep, size, 1.0)
        size *= 2
    reached = torch.cat([after[..., n - 1 :], after[..., -1:].expand(*after.shape[:-1], n - 1)], -1)
    return (window_add + window_keep * reached).to(dtype)


def ride_reward(
    embeddings: Tensor, next_embeddings: Tensor, counts: Tensor, kind: str = "next_sqrt"
) -> Tensor:
    r"""RIDE exploration bonus: embedding distance between consecutive states.

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
        ValueError, RuntimeError, TypeError: for shapes, types and kinds other than these.

    Source: Raileanu and Rocktaeschel, https://arxiv.org/abs/2002.12292, and its released code.
    """
    choice("kind", kind, ("next_sqrt", "count"))
    for name, t in (
        ("embeddings", embeddings),
        ("next_embeddings", next_embeddings),
        ("counts", counts),
    ):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
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
    high = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        moved = torch.linalg.vector_norm(next_embeddings.to(high) - embeddings.to(high), dim=-1)
        n = counts.to(high)
        return (moved / (n.sqrt() if kind == "next_sqrt" else n)).to(dtype)


# ---- registration


def _flags(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.index(9, *shape) == 0


register_estimator(
    Loss(
        name="group_advantages",
        family="rewards",
        function=group_advantages,
        reference=reference.group_advantages,
        inputs=lambda d, s: {"rewards": d.normal(*s), "group_ids": d.index(max(s[0] // 3, 1), *s)},
        wrt=("rewards",),
        forward_arguments=("rewards", "group_ids"),
        cases={"grpo": {}, "rloo": {"kind": "rloo"}},
        shapes=((1,), (33,)),
        bench_shape=(4096,),
        traffic=lambda shape, itemsize, backward: shape[0] * (2 * itemsize + 8) * (2 if backward else 1),
    )
)
register_estimator(
    Loss(
        name="n_step_returns",
        family="rewards",
        function=n_step_returns,
        reference=reference.n_step_returns,
        inputs=lambda d, s: {"rewards": d.normal(*s), "values": d.normal(*s)},
        wrt=("rewards", "values"),
        forward_arguments=("rewards", "values", "terminated", "truncated", "next_values", "bootstrap_value"),
        cases={
            "plain": {"bootstrap_value": lambda d, s: d.normal(*s[:-1])},
            "ends": {
                "terminated": _flags,
                "truncated": _flags,
                "next_values": lambda d, s: d.normal(*s),
                "n": 3,
            },
        },
        shapes=((1, 1), (3, 33), (2, 3, 6)),
        bench_shape=(64, 1024),
        traffic=lambda shape, itemsize, backward: (6 if backward else 3) * math.prod(shape) * itemsize,
        unrolls=True,
    )
)
register_estimator(
    Loss(
        name="ride_reward",
        family="rewards",
        function=ride_reward,
        reference=reference.ride_reward,
        inputs=lambda d, s: {
            "embeddings": d.normal(*s),
            "next_embeddings": d.normal(*s),
            "counts": 1 + d.index(9, *s[:-1]),
        },
        wrt=(),
        forward_arguments=("embeddings", "next_embeddings", "counts"),
        cases={"released": {}, "count": {"kind": "count"}},
        shapes=((7, 1), (3, 33), (2, 5, 6)),
        bench_shape=(64, 128, 256),
        traffic=lambda shape, itemsize, backward: 2 * math.prod(shape) * itemsize,
    )
)
