"""Policy and value losses."""

from __future__ import annotations

import math

from torch import Tensor

from fastloss import reference
from fastloss._ops.policy import KL_TYPES, POLICY_TYPES
from fastloss._registry.inputs import LOGPS_SHAPES
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.policy import AGGREGATIONS, policy_loss, value_loss


def _tokens(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    x = draw.uniform(*shape, low=-4.0, high=-0.1)
    return {"logps": x, "old_logps": x + draw.normal(*shape, scale=0.2), "advantages": draw.normal(*shape)}


def _flags(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(4, *shape) > 0


def _ref_logps(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(*shape, low=-4.0, high=-0.1)


_TYPES = {
    **{name: {"loss_type": name, "mask": _flags} for name in POLICY_TYPES if name not in ("ppo", "grpo")},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.5},
    "dro": {"loss_type": "dro", "dro_beta": 0.5, "mask": _flags},
    "dppo_tv": {"loss_type": "dppo_tv", "clip_low": 0.05, "clip_high": 0.08, "delta": 1.2},
    "dppo_kl": {"loss_type": "dppo_kl", "clip_low": 0.01, "clip_high": 0.02, "mask": _flags},
    # all candidates, not some that are drawn: the reference would draw others
    "clip_cov": {"loss_type": "clip_cov", "mask": _flags, "cov_ratio": 1.0, "cov_bounds": (0.5, 5.0)},
    "kl_cov": {"loss_type": "kl_cov", "mask": _flags, "cov_ratio": 0.2, "cov_kl_coef": 0.3},
}
_DIVERGENCES = {
    f"kl {name}": {"kl_coef": 0.3, "ref_logps": _ref_logps, **({} if name == "k3" else {"kl_type": name})}
    for name in KL_TYPES
    if name != "none"
}


def _weights(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    weights = draw.index(3, *shape).to(draw.dtype)
    if len(shape) > 1:
        weights[-1] = 0  # a completion without tokens
    return weights


_WEIGHTS = {"mask": _weights}
_AGGREGATIONS = {name: {"loss_agg_mode": name, **_WEIGHTS} for name in AGGREGATIONS}

register(
    Loss(
        name="policy_loss",
        family="policy",
        function=policy_loss,
        reference=reference.policy_loss,
        related="verl.trainer.ppo.core_algos.compute_policy_loss",
        inputs=_tokens,
        wrt=("logps", "entropies"),
        cases={
            "ppo": {},
            **_TYPES,
            **_DIVERGENCES,
            **_AGGREGATIONS,
            "grpo": {
                "loss_type": "grpo",
                "mask": _flags,
                "ref_logps": _ref_logps,
                "kl_coef": 0.1,
                "clip_high": 0.28,
                "dual_clip": 1.1,
                "entropies": lambda d, s: d.uniform(*s),
                "entropy_coef": 0.1,
            },
        },
        shapes=LOGPS_SHAPES,
        bench_shape=(64, 4096),
        traffic=lambda shape, itemsize, backward: (4 if backward else 3) * math.prod(shape) * itemsize,
    )
)
register(
    Loss(
        name="value_loss",
        family="policy",
        function=value_loss,
        reference=reference.value_loss,
        related="verl.trainer.ppo.core_algos.compute_value_loss",
        inputs=lambda d, s: {"values": d.normal(*s), "returns": d.normal(*s)},
        wrt=("values",),
        cases={
            "plain": {},
            **{name: case for name, case in _AGGREGATIONS.items() if name != "token-mean"},
            "clipped": {
                "old_values": lambda d, s: d.normal(*s),
                "mask": _flags,
                "clip_range": 0.5,
                "loss_agg_mode": "seq-mean-token-mean",
            },
        },
        shapes=LOGPS_SHAPES,
        bench_shape=(64, 4096),
        traffic=lambda shape, itemsize, backward: (4 if backward else 3) * math.prod(shape) * itemsize,
    )
)
