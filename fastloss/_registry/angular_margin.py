"""Angles and distances to class centres."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.angular_margin import arcface_loss, cosface_loss, harmonic_loss


def _target(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(shape[2], shape[0])


def _some_ignored(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return torch.where(draw.index(3, shape[0]) == 0, -100, _target(draw, shape))


def _inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    rows, features, classes = shape
    return {
        "input": draw.normal(rows, features),
        "weight": draw.normal(classes, features),
        "target": _target(draw, shape),
    }


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (2 if backward else 1) * (shape[0] + shape[2]) * shape[1] * itemsize


def _eager_harmonic(
    input, weight, target, n=None, reduction="mean", *, eps=1e-8, ignore_index=-100, sample_weight=None
):
    """Compute the authors' implementation: squared distances from one GEMM."""
    dtype, n = input.dtype, math.sqrt(input.shape[1]) if n is None else n
    x, w = (t.float() if t.dtype in HALF_TYPES else t for t in (input, weight))
    squares = x.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * x @ w.t()
    logits = -n / 2 * (squares.clamp(min=0) + eps).log()
    sample_weight = None if sample_weight is None else sample_weight.to(x.dtype)
    return reference.cross_entropy(
        logits, target, reduction=reduction, ignore_index=ignore_index, sample_weight=sample_weight
    ).to(dtype)


_MARGIN_CASES = {
    "plain": {},
    "none+ignored": {"reduction": "none", "target": _some_ignored, "s": 10.0},
    "centres": {"weight": lambda d, s: d.normal(s[2], 3, s[1]), "s": 8.0},
    "everything": {
        "reduction": "sum",
        "target": _some_ignored,
        "s": 5.0,
        "label_smoothing": 0.1,
        "sample_weight": lambda d, s: d.uniform(s[0], low=0.0, high=2.0),
    },
}
_WITH_MARGIN = {
    "arcface_loss": (
        arcface_loss,
        {"easy": {"easy_margin": True, "m": 0.3, "s": 8.0}},
        {"easy_margin": True},
    ),
    "cosface_loss": (cosface_loss, {}, {}),
}
for _name, (_function, _more, _full) in _WITH_MARGIN.items():
    register(
        Loss(
            name=_name,
            family="angular_margin",
            function=_function,
            reference=getattr(reference, _name),
            products=(1, 3),
            inputs=_inputs,
            wrt=("input", "weight"),
            cases={**_MARGIN_CASES, **_more, "everything": {**_MARGIN_CASES["everything"], **_full}},
            shapes=((3, 5, 7), (5, 33, 2), (7, 64, 130)),
            bench_shape=(2048, 512, 32000),
            traffic=_traffic,
        )
    )
register(
    Loss(
        name="harmonic_loss",
        family="angular_margin",
        function=harmonic_loss,
        reference=reference.harmonic_loss,
        eager=_eager_harmonic,
        products=(1, 3),
        inputs=_inputs,
        wrt=("input", "weight"),
        cases={
            "plain": {},
            "everything": {
                "n": 3.0,
                "reduction": "none",
                "target": _some_ignored,
                "eps": 1e-3,
                "sample_weight": lambda d, s: d.uniform(s[0], low=0.5, high=2.0),
            },
        },
        shapes=((3, 5, 7), (5, 33, 2), (7, 64, 130)),
        bench_shape=(2048, 512, 32000),
        traffic=_traffic,
    )
)
