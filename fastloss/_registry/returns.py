"""Advantages and returns: targets, not losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register_estimator
from fastloss.losses.returns import discounted_returns, gae, n_step_returns, td_lambda_returns, vtrace


def _eager_gae(rewards, values, gamma=0.99, lam=0.95):
    """Compute GAE by the usual loop over steps."""
    behind, value, found = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[..., t] + gamma * value - values[..., t]
        behind = delta + gamma * lam * behind
        value = values[..., t]
        found.append(behind)
    advantages = torch.stack(found[::-1], -1)
    return advantages, advantages + values


def _steps(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"rewards": draw.normal(*shape), "values": draw.normal(*shape)}


def _ends(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(9, *shape) == 0


def _traffic(tensors: int) -> Callable[[tuple[int, ...], int, bool], int]:
    return lambda shape, itemsize, backward: (2 if backward else 1) * tensors * math.prod(shape) * itemsize


_ENDS = {"terminated": _ends, "truncated": _ends, "next_values": lambda d, s: d.normal(*s)}
_MASKED = {"mask": lambda d, s: d.index(4, *s) > 0, "bootstrap_value": lambda d, s: d.normal(*s[:-1])}

for _function, _inputs, _eager, _count in (
    (gae, _steps, _eager_gae, 4),
    (td_lambda_returns, _steps, None, 4),
    (discounted_returns, lambda d, s: {"rewards": d.normal(*s)}, None, 3),
    (vtrace, lambda d, s: {"log_rhos": d.normal(*s, scale=0.3), **_steps(d, s)}, None, 5),
):
    register_estimator(
        Loss(
            name=_function.__name__,
            family="returns",
            function=_function,
            reference=getattr(reference, _function.__name__),
            eager=_eager,
            inputs=_inputs,
            wrt=(),  # they are targets, called without gradients
            cases={"plain": {}, "masked": _MASKED}
            | ({} if _function is discounted_returns else {"ends": _ENDS}),
            shapes=((1, 1), (3, 33), (2, 3, 5)),
            bench_shape=(64, 1024),
            traffic=_traffic(_count),
            unrolls=True,
        )
    )
register_estimator(
    Loss(
        name="n_step_returns",
        family="returns",
        function=n_step_returns,
        reference=reference.n_step_returns,
        inputs=lambda d, s: {"rewards": d.normal(*s), "values": d.normal(*s)},
        wrt=("rewards", "values"),
        cases={
            "plain": {"bootstrap_value": lambda d, s: d.normal(*s[:-1])},
            "ends": {
                "terminated": _ends,
                "truncated": _ends,
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
