"""Cross-entropy, focal loss and Poly-1 of rows of logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._registry.inputs import classes_of, some_ignored
from fastloss._registry.spec import Loss, register
from fastloss.losses.classification import cross_entropy, poly1_cross_entropy, softmax_focal_loss


def _inputs(draw, shape):
    return {"input": draw.normal(*shape, scale=3.0), "target": classes_of(draw, shape)}


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (2 if backward else 1) * math.prod(shape) * itemsize


def _register(function, eager, cases) -> None:
    """Register a loss of logits and classes that nothing in torch computes."""
    register(
        Loss(
            name=function.__name__,
            family="classification",
            function=function,
            reference=getattr(reference, function.__name__),
            eager=eager,
            inputs=_inputs,
            wrt=("input",),
            cases=cases,
            shapes=((7, 1), (3, 33), (3, 1030), (2, 17, 3, 5)),
            bench_shape=(65536, 1000),
            traffic=_traffic,
        )
    )


register(
    Loss(
        name="cross_entropy",
        family="classification",
        function=cross_entropy,
        reference=reference.cross_entropy,
        eager=F.cross_entropy,
        replaces="torch.nn.functional.cross_entropy",
        inputs=_inputs,
        wrt=("input",),
        cases={
            "plain": {},
            "sum": {"reduction": "sum"},
            "none": {"reduction": "none"},
            "ignored": {"target": some_ignored},
            "weight": {"weight": lambda d, s: d.uniform(s[1], low=0.5, high=2.0)},
            "smoothing": {"label_smoothing": 0.1, "target": some_ignored},
            "weight+smoothing": {
                "weight": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
                "label_smoothing": 0.2,
                "target": some_ignored,
            },
            "probabilities": {"target": lambda d, s: d.simplex(*s)},
            "probabilities+weight+smoothing": {
                "target": lambda d, s: d.simplex(*s),
                "weight": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
                "label_smoothing": 0.1,
            },
            "scale": {"logit_scale": 0.25},
            "softcap": {"softcap": 5.0},
            "z_loss": {"z_loss": 1e-2},
            "sample_weight": {"sample_weight": lambda d, s: d.uniform(s[0], *s[2:], low=0.0, high=2.0)},
            "everything": {
                "target": some_ignored,
                "weight": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
                "label_smoothing": 0.1,
                "logit_scale": 0.5,
                "softcap": 10.0,
                "z_loss": 1e-3,
                "sample_weight": lambda d, s: d.uniform(s[0], *s[2:], low=0.0, high=2.0),
            },
        },
        shapes=((7, 1), (3, 33), (5, 1000), (4, 4099), (2, 32003), (2, 5, 3), (2, 17, 3, 5)),
        bench_shape=(4096, 32000),
        traffic=_traffic,
    )
)


def _eager_focal(input, target, gamma=2.0, alpha=None, ignore_index=-100, reduction="mean"):
    """Compute it as people write it today."""
    nll = F.cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    loss = (1 - torch.exp(-nll)) ** gamma * nll
    if isinstance(alpha, Tensor):
        if alpha.shape != (input.shape[min(input.dim() - 1, 1)],):
            raise RuntimeError("alpha: expected one number for each class")
        loss = alpha[torch.where(target == ignore_index, 0, target)] * loss
    elif alpha is not None:
        loss = alpha * loss
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


_register(
    softmax_focal_loss,
    _eager_focal,
    {
        "plain": {},
        "half power": {"gamma": 0.5, "reduction": "sum", "target": some_ignored},
        "classes": {
            "gamma": 1.7,
            "alpha": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
            "target": some_ignored,
        },
        "background": {"alpha": 0.25, "background_class": 0, "reduction": "none"},
    },
)


def _eager_poly1(input, target, weight=None, ignore_index=-100, reduction="mean", epsilon=1.0):
    """Compute it as people write it today."""
    options = {"ignore_index": ignore_index, "reduction": "none"}
    loss = F.cross_entropy(input, target, weight, **options)
    p = torch.exp(-F.cross_entropy(input, target, **options))
    valid = target != ignore_index
    of_row = 1 if weight is None else weight[torch.where(valid, target, 0)]
    loss = loss + torch.where(valid, of_row * epsilon * (1 - p), 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (of_row * valid).sum()


_register(
    poly1_cross_entropy,
    _eager_poly1,
    {
        "plain": {},
        "ignored": {"epsilon": 2.0, "reduction": "sum", "target": some_ignored},
        "weight": {
            "epsilon": 0.5,
            "weight": lambda d, s: d.uniform(s[1], low=0.5, high=2.0),
            "target": some_ignored,
        },
        "epsilon=-1": {"epsilon": -1.0, "reduction": "none"},
    },
)
