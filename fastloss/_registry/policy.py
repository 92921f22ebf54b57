"""Policy and value losses."""

from __future__ import annotations

import math

from torch import Tensor

from fastloss import reference
from fastloss._registry.inputs import LOGPS_SHAPES
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.policy import policy_loss, value_loss


def _tokens(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    x = draw.uniform(*shape, low=-4.0, high=-0.1)
    return {"logps": x, "old_logps": x + draw.normal(*shape, scale=0.2), "advantages": draw.normal(*shape)}


def _flags(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(4, *shape) > 0


_OPTIONAL = ("mask", "ref_logps", "entropies", "normalizer")

register(
    Loss(
        name="policy_loss",
        family="policy",
        function=policy_loss,
        reference=reference.policy_loss,
        replaces="verl.trainer.ppo.core_algos.compute_policy_loss",
        inputs=_tokens,
        wrt=("logps", "entropies"),
        forward_arguments=("logps", "old_logps", "advantages", *_OPTIONAL),
        cases={
            "ppo": {},
            "grpo": {
                "loss_type": "grpo",
                "mask": _flags,
                "ref_logps": lambda d, s: d.uniform(*s, low=-4.0, high=-0.1),
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
        replaces="verl.trainer.ppo.core_algos.compute_value_loss",
        inputs=lambda d, s: {"values": d.normal(*s), "returns": d.normal(*s)},
        wrt=("values",),
        forward_arguments=("values", "returns", "old_values", "mask", "normalizer"),
        cases={
            "plain": {},
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
