"""Losses of reward models."""

from __future__ import annotations

import math

from torch import Tensor

from fastloss import reference
from fastloss._registry.inputs import LOGPS_BENCH, LOGPS_SHAPES, traffic_of
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.reward_model import bradley_terry_loss, k_way_ranking_loss


def _ranked(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"rewards": draw.normal(*shape, scale=2.0), "ranks": draw.index(shape[-1], *shape)}


register(
    Loss(
        name="k_way_ranking_loss",
        family="reward_model",
        function=k_way_ranking_loss,
        reference=reference.k_way_ranking_loss,
        inputs=_ranked,
        wrt=("rewards",),
        cases={
            "bradley_terry": {},
            "plackett_luce": {"kind": "plackett_luce", "reduction": "none"},
            "masked": {"mask": lambda d, s: d.index(4, *s) > 0, "reduction": "sum"},
        },
        shapes=((7, 1), (3, 9), (17, 4), (2, 3, 5)),
        bench_shape=(4096, 9),
        traffic=lambda shape, itemsize, backward: (3 if backward else 2) * math.prod(shape) * itemsize,
    )
)
register(
    Loss(
        name="bradley_terry_loss",
        family="reward_model",
        function=bradley_terry_loss,
        reference=reference.bradley_terry_loss,
        inputs=lambda d, s: {"chosen": d.normal(*s, scale=3.0), "rejected": d.normal(*s, scale=3.0)},
        wrt=("chosen", "rejected", "margin"),
        cases={
            "plain": {},
            "everything": {
                "margin": lambda d, s: d.uniform(*s),
                "weight": lambda d, s: d.index(3, *s).to(d.dtype),
                "label_smoothing": 0.1,
                "center_coefficient": 0.01,
                "reduction": "sum",
            },
        },
        shapes=LOGPS_SHAPES,
        bench_shape=LOGPS_BENCH,
        traffic=traffic_of(2, 2),
    )
)
