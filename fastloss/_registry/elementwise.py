"""Losses of a prediction and a target, element by element."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.elementwise import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    hinge_loss,
    huber_loss,
    kl_div,
    l1_loss,
    log_cosh_loss,
    mse_loss,
    rmse_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 2) * math.prod(shape) * itemsize


def _normal(draw, shape):
    return {"input": draw.normal(*shape, scale=2.0), "target": draw.normal(*shape)}


def _binary_inputs(draw, shape):
    return {"input": draw.normal(*shape, scale=3.0), "target": draw.uniform(*shape)}


def _positive(draw, shape):
    return draw.uniform(*shape, low=0.5, high=2.0)


def _register(function, inputs, cases, eager=None):
    name = function.__name__
    in_torch = getattr(F, name, None)
    register(
        Loss(
            name=name,
            family="elementwise",
            function=function,
            reference=getattr(reference, name),
            eager=in_torch or eager,
            replaces=f"torch.nn.functional.{name}" if in_torch else "",
            inputs=inputs,
            wrt=("input", "target"),
            trained=("input",),
            cases=cases,
            shapes=((7, 1), (3, 33), (2, 4099), (2, 5, 3)),
            bench_shape=(1 << 16, 1 << 10),
            traffic=_traffic,
        )
    )


def _eager_log_cosh(input, target, reduction="mean", weight=None):
    """Compute it as Keras does."""
    e = input - target
    loss = e + F.softplus(-2 * e) - math.log(2)
    if weight is not None:
        loss = weight * loss
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean() if weight is None else loss.sum() / weight.sum()


_weighted = {"plain": {}, "weight": {"weight": _positive}}
_register(mse_loss, _normal, _weighted)
_register(rmse_loss, _normal, {"plain": {}, "eps": {"eps": 0.3, "weight": _positive}})
_register(l1_loss, _normal, _weighted)
_register(smooth_l1_loss, _normal, {"plain": {}, "beta": {"beta": 0.3, "reduction": "sum"}})
_register(huber_loss, _normal, {"plain": {}, "delta": {"delta": 0.7, "weight": _positive}})
_register(
    log_cosh_loss,
    _normal,
    _weighted | {"none": {"reduction": "none"}, "sum": {"reduction": "sum", "weight": _positive}},
    _eager_log_cosh,
)
_register(
    binary_cross_entropy_with_logits,
    _binary_inputs,
    {
        "plain": {},
        "weight": {"weight": _positive, "reduction": "sum"},
        "pos_weight": {
            "weight": _positive,
            "pos_weight": lambda d, s: d.uniform(s[-1], low=0.5, high=2.0),
        },
    },
)
_register(
    binary_cross_entropy,
    lambda d, s: {"input": d.uniform(*s, low=0.05, high=0.95), "target": d.uniform(*s)},
    {"plain": {}, "weight": {"weight": _positive, "reduction": "sum"}},
)
_register(
    hinge_loss,
    lambda d, s: {"input": d.normal(*s), "target": (2 * d.index(2, *s) - 1).to(d.dtype)},
    {"plain": {}, "sum": {"reduction": "sum"}},
)
_register(
    kl_div,
    lambda d, s: {"input": d.normal(*s) - 2, "target": d.uniform(*s, low=0.01)},
    {
        "plain": {},
        "log_target": {"target": lambda d, s: d.normal(*s) - 2, "log_target": True},
        "batchmean": {"reduction": "batchmean"},
    },
)


def _binary(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(2, *shape).to(draw.dtype)


def _elements(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 2) * math.prod(shape) * itemsize


POINTWISE_SHAPES = ((7, 1), (3, 33), (5, 1000), (2, 4099), (2, 5, 3), (2, 17, 3, 5))

register(
    Loss(
        name="sigmoid_focal_loss",
        family="elementwise",
        function=sigmoid_focal_loss,
        reference=reference.sigmoid_focal_loss,
        replaces="torchvision.ops.sigmoid_focal_loss",
        inputs=lambda draw, shape: {
            "inputs": draw.normal(*shape, scale=3.0),
            "targets": _binary(draw, shape),
        },
        wrt=("inputs", "targets"),
        trained=("inputs",),
        cases={
            "mean": {"reduction": "mean"},
            "none": {},
            "sum": {"reduction": "sum"},
            "soft": {"targets": lambda d, s: d.uniform(*s), "reduction": "sum"},
            "alpha": {"alpha": 0.75, "gamma": 1.0},
            "gamma=0": {"gamma": 0},
            "gamma=1/2": {"gamma": 0.5, "reduction": "sum"},
            "gamma=3.5": {"alpha": -1, "gamma": 3.5},
            "classes": {"targets": lambda d, s: d.index(s[-1] + 1, *s[:-1]), "reduction": "mean"},
            "background": {
                "targets": lambda d, s: d.index(s[-1] + 2, *s[:-1]) - 2,
                "background_index": -1,
                "ignore_index": -2,
                "reduction": "mean",
                "weight": lambda d, s: d.uniform(*s[:-1], 1, low=0.5, high=2.0),
                "num_positives": lambda d, s: d.uniform(low=1.0, high=3.0),
            },
            "weight": {"weight": lambda d, s: d.index(3, *s[:-1], 1).to(d.dtype), "reduction": "sum"},
        },
        shapes=POINTWISE_SHAPES,
        bench_shape=(1 << 16, 1 << 10),
        traffic=_elements,
    )
)
