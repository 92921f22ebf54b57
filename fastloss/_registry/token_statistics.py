"""Log-probabilities and entropies of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import HALF_TYPES
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.token_statistics import entropy_from_logits, selective_log_softmax, sequence_log_probs


def _logits(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.normal(*shape, scale=3.0)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in HALF_TYPES else logits


def _eager_log_softmax(logits, index, temperature=1.0):
    several = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    return (_wide(logits) / temperature).log_softmax(-1).gather(-1, several).reshape(index.shape)


def _eager_entropy(logits, temperature=1.0, mask=None):
    z = _wide(logits) / temperature
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)  # as verl has it
    return entropy if mask is None else torch.where(mask != 0, entropy, 0.0)


def _eager_sequence(logits, labels, ignore_index=-100, average=False):
    valid = labels != ignore_index
    logp = _eager_log_softmax(logits, torch.where(valid, labels, 0))
    total = torch.where(valid, logp, 0.0).sum(-1)
    return total / valid.sum(-1).clamp(min=1) if average else total


def _some_labels(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    labels = draw.index(shape[-1], *shape[:-1])
    return torch.where(draw.index(3, *shape[:-1]) == 0, -100, labels)


def _traffic(shape: tuple[int, ...], itemsize: int, backward: bool) -> int:
    return (3 if backward else 1) * math.prod(shape) * itemsize


register(
    Loss(
        name="selective_log_softmax",
        family="token_statistics",
        function=selective_log_softmax,
        reference=reference.selective_log_softmax,
        eager=_eager_log_softmax,
        inputs=lambda d, s: {"logits": _logits(d, s), "index": d.index(s[-1], *s[:-1])},
        wrt=("logits",),
        cases={
            "plain": {},
            "several": {"index": lambda d, s: d.index(s[-1], *s[:-1], 3), "temperature": 0.7},
        },
        shapes=((3, 33), (2, 4099), (2, 5, 7)),
        bench_shape=(1024, 32000),
        traffic=_traffic,
    )
)
register(
    Loss(
        name="entropy_from_logits",
        family="token_statistics",
        function=entropy_from_logits,
        reference=reference.entropy_from_logits,
        eager=_eager_entropy,
        inputs=lambda d, s: {"logits": _logits(d, s)},
        wrt=("logits",),
        cases={
            "plain": {},
            "masked": {"mask": lambda d, s: d.index(2, *s[:-1]) > 0, "temperature": 0.5},
        },
        shapes=((3, 33), (2, 4099), (2, 5, 7)),
        bench_shape=(1024, 32000),
        traffic=_traffic,
    )
)
register(
    Loss(
        name="sequence_log_probs",
        family="token_statistics",
        function=sequence_log_probs,
        reference=reference.sequence_log_probs,
        eager=_eager_sequence,
        inputs=lambda d, s: {"logits": _logits(d, s), "labels": d.index(s[-1], *s[:-1])},
        wrt=("logits",),
        cases={"plain": {}, "average": {"labels": _some_labels, "average": True}},
        shapes=((3, 4, 33), (2, 2, 1030)),
        bench_shape=(8, 512, 32000),
        traffic=_traffic,
    )
)
