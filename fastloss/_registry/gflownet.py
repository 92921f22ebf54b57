"""Losses of generative flow networks."""

from __future__ import annotations

import math

from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.gflownet import detailed_balance_loss


def _states(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "state_flow": draw.normal(*shape[:-1]),
        "next_flows": draw.normal(*shape),
        "logits": draw.normal(*shape),
    }


register(
    Loss(
        name="detailed_balance_loss",
        family="gflownet",
        function=detailed_balance_loss,
        reference=reference.detailed_balance_loss,
        inputs=_states,
        wrt=("state_flow", "next_flows", "logits"),
        cases={
            "all": {},
            "masked": {"mask": lambda d, s: d.index(4, *s) > 0, "reduction": "sum"},
            "chosen": {
                "variant": "chosen",
                "chosen": lambda d, s: d.index(s[-1], *s[:-1]),
                "rewards": lambda d, s: d.uniform(*s[:-1], high=2.0),
                "reduction": "none",
            },
        },
        shapes=((7, 1), (3, 33), (2, 5, 4)),
        bench_shape=(65536, 4),
        traffic=lambda shape, itemsize, backward: (4 if backward else 2) * math.prod(shape) * itemsize,
    )
)
