"""Divergences between a student and a teacher."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.distillation import js_div_logits, kl_div_logits


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in HALF_TYPES else logits


def _eager_kl(student_logits, teacher_logits, temperature=1.0):
    q, p = ((_wide(x) / temperature).log_softmax(-1).flatten(0, -2) for x in (student_logits, teacher_logits))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _eager_js(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    q, p = ((_wide(x) / temperature).log_softmax(-1).flatten(0, -2) for x in (student_logits, teacher_logits))
    if beta == 0:
        return F.kl_div(q, p, reduction="batchmean", log_target=True)
    if beta == 1:
        return F.kl_div(p, q, reduction="batchmean", log_target=True)
    m = torch.logsumexp(torch.stack([q + math.log1p(-beta), p + math.log(beta)]), 0)
    from_p, from_q = (F.kl_div(m, x, reduction="none", log_target=True) for x in (p, q))
    return (beta * from_p + (1 - beta) * from_q).sum() / q.shape[0]


def _inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "student_logits": draw.normal(*shape, scale=2.0),
        "teacher_logits": draw.normal(*shape, scale=2.0),
    }


def _some_labels(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    labels = draw.index(shape[-1], *shape[:-1])
    return torch.where(draw.index(3, *shape[:-1]) == 0, -100, labels)


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 2) * math.prod(shape) * itemsize


_ROWS = {
    "labels": _some_labels,
    "sample_weight": lambda d, s: d.uniform(*s[:-1], low=0.5, high=2.0),
    "temperature": 1.5,
}
for _function, _eager, _cases in (
    (kl_div_logits, _eager_kl, {"plain": {}, "none": {"reduction": "none"}, "rows": _ROWS}),
    (
        js_div_logits,
        _eager_js,
        {
            "plain": {},
            "none": {"reduction": "none", "beta": 0.1},
            "forward": {"beta": 0.0, "temperature": 1.5},
            "reverse": {"beta": 1.0},
            "rows": {**_ROWS, "beta": 0.7},
        },
    ),
):
    register(
        Loss(
            name=_function.__name__,
            family="distillation",
            function=_function,
            reference=getattr(reference, _function.__name__),
            eager=_eager,
            inputs=_inputs,
            wrt=("student_logits", "teacher_logits"),
            trained=("student_logits",),
            cases=_cases,
            shapes=((3, 33), (2, 4099), (2, 5, 7), (3, 1)),
            bench_shape=(1024, 32000),
            traffic=_traffic,
        )
    )
