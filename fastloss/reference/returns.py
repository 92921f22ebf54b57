"""Recursions along the steps of episodes, as plain loops."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["discounted_returns", "gae", "n_step_returns", "td_lambda_returns", "vtrace"]


def _flags(flags: Tensor | None, like: Tensor, default: bool) -> Tensor:
    return torch.full(like.shape, default, device=like.device) if flags is None else flags.bool()


def _scaled(factor: float | Tensor, x: Tensor) -> Tensor:
    """Return the product; a factor of 0 takes nothing of x, whatever it is."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * x)
    return factor * x if factor else torch.zeros_like(x)


def _over_sequences(function, rewards, cu_seqlens, bootstrap_value, *others):
    """`function(rewards, bootstrap_value, *others)` for each packed sequence, put together again."""
    if cu_seqlens is None:
        return function(rewards, bootstrap_value, *others)
    ends = cu_seqlens.tolist()
    parts = [
        function(
            rewards[a:b],
            None if bootstrap_value is None else bootstrap_value[i],
            *(None if x is None else x[a:b] for x in others),
        )
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    if not parts:
        return function(rewards, None, *others)
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def _backwards(rewards, bootstrap_value, values, next_values, log_rhos, terminated, truncated, mask,
               *, gamma, lam, rho_max, pg_max):  # fmt: skip
    """Return (v - V, V, policy gradient advantage) of every step; with log_rhos None the first is GAE."""
    terminated, truncated = _flags(terminated, rewards, False), _flags(truncated, rewards, False)
    mask = _flags(mask, rewards, True)
    values = torch.zeros_like(rewards) if values is None else values
    value = torch.zeros_like(rewards[..., :1].sum(-1)) if bootstrap_value is None else bootstrap_value
    advantage = torch.zeros_like(value)
    zero = torch.zeros_like(value)
    rows = []
    for t in reversed(range(rewards.shape[-1])):
        after = value if next_values is None else next_values[..., t]
        going = torch.where(terminated[..., t], zero, after)
        behind = torch.where(terminated[..., t] | truncated[..., t], zero, advantage)
        delta = rewards[..., t] + _scaled(gamma, going) - values[..., t]
        if log_rhos is None:
            now, pg = delta + _scaled(gamma * lam, behind), zero
        else:
            rho = log_rhos[..., t].exp()
            now = rho.clamp(max=rho_max) * delta + _scaled(gamma * lam * rho.clamp(max=1.0), behind)
            pg = rho.clamp(max=pg_max) * (delta + _scaled(gamma, behind))
        here = mask[..., t]
        rows.append((torch.where(here, now, zero), torch.where(here, values[..., t], zero),
                     torch.where(here, pg, zero)))  # fmt: skip
        advantage = torch.where(here, now, advantage)
        value = torch.where(here, values[..., t], value)
    if not rows:
        return (rewards + values, rewards + values, rewards + values)
    return tuple(torch.stack(r[::-1], -1) for r in zip(*rows, strict=True))


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    next_values: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `fastloss.functional.gae`."""
    advantage, value, _ = _over_sequences(
        lambda r, b, *x: _backwards(r, b, x[0], x[1], None, *x[2:], gamma=gamma, lam=lam, rho_max=0.0, pg_max=0.0),
        rewards, cu_seqlens, bootstrap_value, values, next_values, terminated, truncated, mask,
    )  # fmt: skip
    return advantage, advantage + value


def td_lambda_returns(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    next_values: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.td_lambda_returns`."""
    return gae(
        rewards, values, terminated, truncated, gamma=gamma, lam=lam, next_values=next_values,
        bootstrap_value=bootstrap_value, mask=mask, cu_seqlens=cu_seqlens,
    )[1]  # fmt: skip


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    bootstrap_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.discounted_returns`."""
    return td_lambda_returns(
        rewards, torch.zeros_like(rewards), terminated, gamma=gamma, lam=1.0,
        bootstrap_value=bootstrap_value, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def vtrace(
    log_rhos: Tensor,
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    clip_rho_threshold: float = 1.0,
    clip_pg_rho_threshold: float = 1.0,
    next_values: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `fastloss.functional.vtrace`."""
    with torch.no_grad():
        correction, value, advantage = _over_sequences(
            lambda r, b, *x: _backwards(
                r, b, *x, gamma=gamma, lam=lam, rho_max=clip_rho_threshold, pg_max=clip_pg_rho_threshold
            ),
            rewards, cu_seqlens, bootstrap_value, values, next_values, log_rhos, terminated, truncated, mask,
        )  # fmt: skip
        return value + correction, advantage


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
    """Compute `fastloss.functional.n_step_returns`, step by step."""
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
            led_on = going & ~terminated[..., s] & (gamma != 0)
            total = total + torch.where(led_on & stops, gamma ** (k + 1) * next_values[..., s], 0.0)
            going = led_on & ~stops
        found.append(total)
    return torch.stack(found, -1) if found else rewards + values
