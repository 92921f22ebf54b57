"""Recursions along the steps of episodes: advantages and returns, in one pass over memory each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops import abi
from fastloss._ops.autograd import Op
from fastloss._ops.checks import check_integer, check_number, check_tensors, real_number

__all__ = ["discounted_returns", "gae", "n_step_returns", "td_lambda_returns", "vtrace"]


_GAE, _VTRACE = abi.hparams("gae"), abi.hparams("vtrace")


def _gae_reference(
    rewards, values, next_values, bootstrap_value, log_rhos, terminated, truncated, mask, cu_seqlens, hparams
):
    values = torch.zeros_like(rewards) if values is None else values
    return reference.gae(
        rewards, values, terminated, truncated, next_values=next_values, bootstrap_value=bootstrap_value, mask=mask,
        cu_seqlens=cu_seqlens, **_GAE.unpack(hparams),
    )  # fmt: skip


def _vtrace_reference(
    rewards, values, next_values, bootstrap_value, log_rhos, terminated, truncated, mask, cu_seqlens, hparams
):
    return reference.vtrace(
        log_rhos, rewards, values, terminated, truncated, next_values=next_values, bootstrap_value=bootstrap_value,
        mask=mask, cu_seqlens=cu_seqlens, **_VTRACE.unpack(hparams),
    )  # fmt: skip


def _two_like_rewards(rewards, *_):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


_gae = Op("gae", _gae_reference, _two_like_rewards, tensors=9, wrt=(0, 1, 2, 3), outputs=2)
_vtrace = Op("vtrace", _vtrace_reference, _two_like_rewards, tensors=9, wrt=(), outputs=2)


def step_arguments(
    values: dict[str, Tensor | None],
    flags: dict[str, Tensor | None],
    bootstrap_value: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None, list[Tensor | None], Tensor | None]:
    """Check the arguments; return values promoted to one dtype and flags as bool."""
    rewards = values["rewards"]
    for name, x in values.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point type, got {x.dtype}")
    if rewards.dim() == 0:
        raise ValueError("rewards: expected at least one dimension, time being the last")
    given = {"bootstrap_value": bootstrap_value, "cu_seqlens": cu_seqlens}
    check_tensors(rewards, **{name: x for name, x in {**flags, **given}.items() if x is not None})
    for name, x in {**values, **flags}.items():
        if x is not None and x.shape != rewards.shape:
            raise ValueError(
                f"{name}: expected the shape of rewards, {tuple(rewards.shape)}, got {tuple(x.shape)}"
            )
        if x is not None and x.device != rewards.device:
            raise ValueError(f"{name}: expected a tensor on {rewards.device}, got one on {x.device}")
    if flags.get("truncated") is not None and values.get("next_values") is None:
        raise ValueError(
            "truncated: needs next_values: behind a truncated step, values[t + 1] belongs to another episode"
        )
    if bootstrap_value is not None and values.get("next_values") is not None:
        raise ValueError("bootstrap_value: cannot be combined with next_values")
    rows = rewards.shape[:-1]
    if cu_seqlens is not None:
        if rewards.dim() != 1:
            raise ValueError(f"rewards: expected one dimension with cu_seqlens, got {tuple(rewards.shape)}")
        if (
            cu_seqlens.dim() != 1
            or cu_seqlens.numel() == 0
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError("cu_seqlens: expected one dimension of int32 or int64, beginning with 0")
        rows = torch.Size([cu_seqlens.numel() - 1])
        cu_seqlens = cu_seqlens.long()
    if bootstrap_value is not None and bootstrap_value.shape != rows:
        raise ValueError(
            f"bootstrap_value: expected a number for each sequence, {tuple(rows)}, got {tuple(bootstrap_value.shape)}"
        )
    present = [x for x in (*values.values(), bootstrap_value) if x is not None]
    dtype = reduce(torch.promote_types, [x.dtype for x in present])
    return (
        [None if x is None else x.to(dtype) for x in values.values()],
        None if bootstrap_value is None else bootstrap_value.to(dtype),
        [None if x is None else x.bool() for x in flags.values()],
        cu_seqlens,
    )


def _discounts(gamma: float, lam: float) -> dict[str, float]:
    return {name: check_number(name, x, 0.0, 1.0) for name, x in (("gamma", gamma), ("lam", lam))}


def _scan(op: Op, tensors: Sequence[Tensor | None], hparams: list[float]) -> Any:
    """Call an operator; an error about the offsets is a ValueError."""
    try:
        return op(tensors, (hparams,))
    except RuntimeError as error:
        _, name, message = str(error).partition("cu_seqlens")
        if not name:
            raise
        raise ValueError(name + message) from None


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
    r"""Compute generalised advantage estimation: advantages :math:`A` and returns :math:`A + V`, in one kernel.

    .. math:: \delta_t = r_t + \gamma (1 - \mathrm{terminated}_t) V_{t+1} - V_t, \qquad
              A_t = \delta_t + \gamma \lambda (1 - \mathrm{terminated}_t) (1 - \mathrm{truncated}_t) A_{t+1}

    The results are linear in rewards and values and carry exact gradients where these require them; targets of a policy
    loss should have none: call under `torch.no_grad()` or give `values.detach()`.

    Args:
        rewards: :math:`r`, shape `(..., T)`, time being the last dimension; float32, float64, bfloat16, float16.
        values: :math:`V(s_t)`, of the same shape.
        terminated: bool, same shape: the episode ended, nothing follows, whatever the next steps and `next_values`
            hold. Default: nowhere.
        truncated: bool, same shape: the episode was cut off; its value is bootstrapped, the trace ends. Needs
            `next_values`. Default: nowhere; the last step needs no mark.
        gamma: :math:`\gamma` in [0, 1]. Default: 0.99.
        lam: :math:`\lambda` in [0, 1]. Default: 0.95.
        next_values: :math:`V(s_{t+1})` as it was before a reset, same shape. Default: `values` one step later.
        bootstrap_value: :math:`V(s_T)` behind the last step, shape `(...)`. Default: 0.
        mask: bool, same shape; where False there is no step: the steps around it are neighbours, the results 0.
            Default: everywhere True.
        cu_seqlens: int32 or int64 `(S + 1)`, from 0 to N: sequences packed into tensors `(N)`; `bootstrap_value` then
            is `(S)`. Default: none.

    Returns:
        Advantages and returns, of the shape of rewards and the wider type of rewards and values.

    Raises:
        ValueError, TypeError: for unsupported shapes, types and options, naming the argument. Offsets are checked on
            the CPU; on CUDA, where checking would synchronise, nothing out of bounds is read.

    Source: https://arxiv.org/abs/1506.02438; terminated and truncated as in gymnasium and TorchRL, masks as in verl.
    """
    (r, v, n), b, (term, trunc, m), cu = step_arguments(
        {"rewards": rewards, "values": values, "next_values": next_values},
        {"terminated": terminated, "truncated": truncated, "mask": mask},
        bootstrap_value, cu_seqlens,
    )  # fmt: skip
    return _scan(_gae, (r, v, n, b, None, term, trunc, m, cu), _GAE.pack(**_discounts(gamma, lam)))


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
    r"""Compute TD(:math:`\lambda`) returns, the targets of a value function.

    .. math:: G_t = r_t + \gamma (1 - \mathrm{terminated}_t) \left[(1 - \lambda) V_{t+1} + \lambda G_{t+1}\right]

    with :math:`G_{t+1} = V_{t+1}` behind a truncated or the last step. Equal to the second result of `gae`.

    Args:
        rewards, values, terminated, truncated: as for `gae`, shape `(..., T)`.
        gamma, lam: :math:`\gamma` and :math:`\lambda` in [0, 1]; `lam` 0 gives TD(0), 1 Monte Carlo returns.
        next_values, bootstrap_value, mask, cu_seqlens: as for `gae`.

    Returns:
        The returns, of the shape of rewards; differentiable in rewards and values.

    Raises:
        ValueError, TypeError: as `gae`.

    Source: Sutton and Barto, Reinforcement Learning, chapter 12; https://arxiv.org/abs/1506.02438.
    """
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
    r"""Compute discounted sums of future rewards (reward to go).

    .. math:: G_t = r_t + \gamma (1 - \mathrm{terminated}_t)\, G_{t+1}

    Args:
        rewards: shape `(..., T)`, time being the last dimension; float32, float64, bfloat16, float16.
        terminated: bool, same shape: an episode ended here. Default: nowhere. For truncated episodes see
            `td_lambda_returns` with `lam` 1.
        gamma: :math:`\gamma` in [0, 1]. Default: 0.99.
        bootstrap_value: :math:`G_T`, shape `(...)`. Default: 0.
        mask, cu_seqlens: as for `gae`.

    Returns:
        The returns, of the shape of rewards; differentiable.

    Raises:
        ValueError, TypeError: as `gae`.

    Source: Sutton and Barto, Reinforcement Learning, section 3.3; https://arxiv.org/abs/1506.02438.
    """
    (r,), b, (term, m), cu = step_arguments(
        {"rewards": rewards}, {"terminated": terminated, "mask": mask}, bootstrap_value, cu_seqlens
    )
    return _scan(_gae, (r, None, None, b, None, term, None, m, cu), _GAE.pack(**_discounts(gamma, 1.0)))[0]


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
    r"""Compute V-trace: value targets :math:`v` and policy gradient advantages of off-policy steps, without gradients.

    With :math:`\rho_t = \min(\bar\rho, e^{\ell_t})`, :math:`c_t = \lambda \min(1, e^{\ell_t})` and continuation
    :math:`d_t = (1 - \mathrm{terminated}_t)(1 - \mathrm{truncated}_t)`,

    .. math:: v_t - V_t = \rho_t \left(r_t + \gamma (1 - \mathrm{terminated}_t) V_{t+1} - V_t\right)
              + \gamma d_t c_t (v_{t+1} - V_{t+1}), \qquad
              A_t = \min(\bar\rho_{pg}, e^{\ell_t}) \left(r_t + \gamma (1 - \mathrm{terminated}_t) v_{t+1} - V_t\right)

    where behind a truncated or the last step :math:`v_{t+1} = V_{t+1}`.

    Args:
        log_rhos: :math:`\ell_t = \log \pi(a_t) - \log \mu(a_t)`, shape `(..., T)`.
        rewards, values, terminated, truncated: as for `gae`, of the same shape.
        gamma, lam: :math:`\gamma` and :math:`\lambda` in [0, 1]. Default: 0.99 and 1.
        clip_rho_threshold: :math:`\bar\rho`. Default: 1.
        clip_pg_rho_threshold: :math:`\bar\rho_{pg}`. Default: 1.
        next_values, bootstrap_value, mask, cu_seqlens: as for `gae`.

    Returns:
        :math:`v` and :math:`A`, of the shape of rewards. They are targets: no gradient flows through them.

    Raises:
        ValueError, TypeError: as `gae`.

    Source: https://arxiv.org/abs/1802.01561 and its released code.
    """
    (r, v, n, rho), b, (term, trunc, m), cu = step_arguments(
        {"rewards": rewards, "values": values, "next_values": next_values, "log_rhos": log_rhos},
        {"terminated": terminated, "truncated": truncated, "mask": mask},
        bootstrap_value, cu_seqlens,
    )  # fmt: skip
    hparams = _VTRACE.pack(
        **_discounts(gamma, lam),
        clip_rho_threshold=real_number("clip_rho_threshold", clip_rho_threshold),
        clip_pg_rho_threshold=real_number("clip_pg_rho_threshold", clip_pg_rho_threshold),
    )
    with torch.no_grad():
        r, v, n, b, rho = (None if x is None else x.detach() for x in (r, v, n, b, rho))
        return _scan(_vtrace, (r, v, n, b, rho, term, trunc, m, cu), hparams)


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
    r"""Compute returns over n steps: discounted rewards, then the bootstrapped value.

    .. math:: G_t = \sum_{k=0}^{n-1} \gamma^k r_{t+k} + \gamma^n V_{t+n}

    ended early by a terminated step, behind which nothing follows, by a truncated step and by the last one, behind
    which their own next value does. Windows are composed of halves in about :math:`\log_2 n` passes, without
    differences of sums, so that nothing cancels.

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
    n = check_integer("n", n)
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
    # step t maps the return x of its successor to add + decay * x, or where nothing follows to add
    follows = torch.full_like(r, gamma != 0, dtype=torch.bool)
    decay, add = torch.full_like(r, gamma), r
    if trunc is not None:
        add = torch.where(trunc & follows, r + gamma * after, r)
    for end in (trunc, term):
        follows = follows if end is None else follows & ~end
    if term is not None:
        add = torch.where(term, r, add)

    def later(x: Tensor, count: int, behind: float) -> Tensor:
        """Shift x by one window; the windows behind the last step are empty."""
        return torch.cat([x[..., count:], torch.full_like(x[..., :count], behind)], -1)

    def joined(add, decay, follows, next_add, next_decay, next_follows, count: int):
        """Return a window of `count` steps and the one behind it as one."""
        return (
            add + torch.where(follows, decay * later(next_add, count, 0.0), 0.0),
            decay * later(next_decay, count, 1.0),
            follows & later(next_follows, count, True),
        )

    n = min(n, steps)
    window = None
    done, size = 0, 1
    part = (add, decay, follows)
    while True:
        if n & size:
            window = part if window is None else joined(*window, *part, done)
            done += size
        if done == n:
            break
        part = joined(*part, *part, size)
        size *= 2
    reached = torch.cat([after[..., n - 1 :], after[..., -1:].expand(*after.shape[:-1], n - 1)], -1)
    add, decay, follows = window
    return (add + torch.where(follows, decay * reached, 0.0)).to(dtype)
