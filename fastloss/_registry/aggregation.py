"""Reductions of the losses of samples."""

from __future__ import annotations

import inspect
import math

from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.aggregation import chi2_dro_loss, cvar_loss, flooding_loss, soft_ad_loss, tilted_loss


def _weights(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    """Draw weights whose sums are exact: the weight at the edge of a tail is a difference of two sums."""
    return (draw.index(16, *shape) + 4).to(draw.dtype) / 8


def _number(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(low=0.9, high=1.1)


_counted = {"sample_weight": _weights, "mask": lambda d, s: d.index(4, *s) > 0}


def _register(function, cases, inputs=()):
    register(
        Loss(
            name=function.__name__,
            family="aggregation",
            function=function,
            reference=getattr(reference, function.__name__),
            inputs=lambda draw, shape: {
                "losses": draw.normal(*shape).square(),
                **{name: _number(draw, shape) for name in inputs},
            },
            wrt=("losses", "theta") if "theta" in inspect.signature(function).parameters else ("losses",),
            cases=cases,
            shapes=((7, 1), (3, 33), (5, 1000), (2, 4099), (2, 5, 3)),
            bench_shape=(1 << 10, 1 << 10),
            traffic=lambda shape, itemsize, backward: (3 if backward else 1) * math.prod(shape) * itemsize,
        )
    )


_register(
    cvar_loss,
    {
        "best": {"q": 0.7},
        "weighted": {"q": 0.45, **_counted},
        "theta": {"q": 0.8, "theta": _number},
        "flooded": {"q": 0.6, "theta": _number, "flood": 50.0, **_counted},
    },
)
_register(
    chi2_dro_loss,
    {
        "best": {"rho": 0.6},
        "small": {"rho": 1e-3, **_counted},
        "theta": {"rho": 0.5, "theta": _number},
        "flooded": {"rho": 0.25, "theta": _number, "flood": 50.0, **_counted},
    },
)
_register(flooding_loss, {"plain": {"level": 30.0}, "weighted": {"level": 50.0, **_counted}})
_register(
    soft_ad_loss,
    {"plain": {}, "number": {"theta": 0.7}, "weighted": {"sigma": 0.3, "eta": 0.25, **_counted}},
    ("theta",),
)
_register(
    tilted_loss,
    {
        "plain": {"t": 1.0},
        "small": {"t": 1e-5},
        "negative": {"t": -3.0, **_counted},
    },
)
