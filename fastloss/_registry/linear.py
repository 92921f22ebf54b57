"""Cross-entropy from hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.linear import linear_cross_entropy


def _classes(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(shape[2], shape[0])


def _some_ignored(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    target = _classes(draw, shape)
    return torch.where(draw.index(3, *target.shape) == 0, -100, target)


def _inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    rows, features, classes = shape
    return {
        "input": draw.normal(rows, features),
        "linear_weight": draw.normal(classes, features, scale=2.0 * features**-0.5),
        "target": _classes(draw, shape),
    }


register(
    Loss(
        name="linear_cross_entropy",
        family="linear",
        function=linear_cross_entropy,
        reference=reference.linear_cross_entropy,
        eager=getattr(F, "linear_cross_entropy", None),  # torch 2.11 and 2.12 have none
        replaces="torch.nn.functional.linear_cross_entropy",
        products=(1, 3),
        inputs=_inputs,
        wrt=("input", "linear_weight", "linear_bias"),
        cases={
            "plain": {},
            "none": {"reduction": "none", "target": _some_ignored},
            "bias+ignored": {"linear_bias": lambda d, s: d.normal(s[2]), "target": _some_ignored},
            "probabilities": {"target": lambda d, s: d.simplex(s[0], s[2]), "label_smoothing": 0.1},
            "everything": {
                "reduction": "sum",
                "target": _some_ignored,
                "linear_bias": lambda d, s: d.normal(s[2]),
                "weight": lambda d, s: d.uniform(s[2], low=0.5, high=2.0),
                "label_smoothing": 0.1,
                "logit_scale": 0.5,
                "softcap": 10.0,
                "z_loss": 1e-3,
                "sample_weight": lambda d, s: d.uniform(s[0], low=0.0, high=2.0),
                "max_extra_bytes": 64 << 20,
            },
        },
        shapes=((3, 5, 7), (5, 33, 1), (2, 1, 65), (7, 200, 130), (3, 40, 1003)),
        bench_shape=(4096, 1024, 32000),
        traffic=lambda shape, itemsize, backward: (
            (2 if backward else 1) * (shape[0] + shape[2]) * shape[1] * itemsize
        ),
    )
)
