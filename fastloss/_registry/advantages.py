"""Advantages within a group and intrinsic rewards: targets, not losses."""

from __future__ import annotations

import math

from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register_estimator
from fastloss.losses.advantages import group_advantages, ride_reward


def _flags(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(9, *shape) == 0


register_estimator(
    Loss(
        name="group_advantages",
        family="advantages",
        function=group_advantages,
        reference=reference.group_advantages,
        inputs=lambda d, s: {"rewards": d.normal(*s), "group_ids": d.index(max(s[0] // 3, 1), *s)},
        wrt=("rewards",),
        cases={"grpo": {}, "dr_grpo": {"kind": "dr_grpo"}, "rloo": {"kind": "rloo"}},
        shapes=((1,), (33,)),
        bench_shape=(4096,),
        traffic=lambda shape, itemsize, backward: shape[0] * (2 * itemsize + 8) * (2 if backward else 1),
    )
)
register_estimator(
    Loss(
        name="ride_reward",
        family="advantages",
        function=ride_reward,
        reference=reference.ride_reward,
        inputs=lambda d, s: {
            "embeddings": d.normal(*s),
            "next_embeddings": d.normal(*s),
            "counts": 1 + d.index(9, *s[:-1]),
        },
        wrt=(),
        cases={"released": {}, "count": {"kind": "count"}},
        shapes=((7, 1), (3, 33), (2, 5, 6)),
        bench_shape=(64, 128, 256),
        traffic=lambda shape, itemsize, backward: 2 * math.prod(shape) * itemsize,
    )
)
