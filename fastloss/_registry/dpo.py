"""Direct preference optimisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._registry.inputs import LOGPS_BENCH, LOGPS_SHAPES, of_logps, traffic_of
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.dpo import LOSS_TYPES, OF_LENGTHS, dpo_loss, dpo_loss_from_logits, linear_dpo_loss

_INPUTS = (
    "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
)  # fmt: skip


_TYPES = {
    name: {"loss_type": name, **({"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {})}
    for name in LOSS_TYPES
    if name != "sigmoid"
}


def _length(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return 1.0 * draw.index(9, *shape)  # 0 among them


def _labels(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    labels = draw.index(shape[-1], *shape[:-1])
    ignored = draw.index(3, *shape[:-1]) == 0
    ignored[0], ignored[-1, -1] = False, True  # completions of different length
    return torch.where(ignored, -100, labels)


def _completions(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return logits, and reference log-probabilities about as large as those of random logits."""
    sequences, steps, _ = shape = (max(shape[0] // 2 * 2, 2), *shape[1:])
    return {
        "policy_logits": draw.normal(*shape),
        "labels": _labels(draw, shape),
        "reference_chosen_logps": draw.normal(sequences // 2) - 4.0 * steps,
        "reference_rejected_logps": draw.normal(sequences // 2) - 4.0 * steps,
    }


def _eager_from_logits(policy_logits, labels, reference_chosen_logps, reference_rejected_logps, beta=0.1):
    """Compute it as people write it today."""
    valid = labels != -100
    logits = policy_logits if policy_logits.dtype == torch.float64 else policy_logits.float()
    logps = logits.log_softmax(-1).gather(-1, torch.where(valid, labels, 0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = torch.where(valid, logps, 0.0).sum(-1).chunk(2)
    delta = (chosen - reference_chosen_logps) - (rejected - reference_rejected_logps)
    return -torch.nn.functional.logsigmoid(beta * delta).mean()


register(
    Loss(
        name="dpo_loss",
        family="dpo",
        function=dpo_loss,
        reference=reference.dpo_loss,
        related="trl.DPOTrainer",
        inputs=of_logps(*_INPUTS),
        wrt=_INPUTS,
        trained=_INPUTS[:2],
        cases={
            "sigmoid": {},
            **_TYPES,
            **{
                name: _TYPES[name] | {"chosen_lengths": _length, "rejected_lengths": _length}
                for name in OF_LENGTHS
            },
            **{name: {"f_divergence": name, "beta": 0.4} for name in ("forward_kl", "js", "alpha")},
            "mixed": {
                "loss_type": ("sigmoid", "bco_pair", "sft"),
                "loss_weights": (0.8, 0.2, 1.0),
                "weight": lambda d, s: d.index(3, *s).to(d.dtype),
                "label_smoothing": 0.1,
            },
        },
        shapes=LOGPS_SHAPES,
        bench_shape=LOGPS_BENCH,
        traffic=traffic_of(4, 2),
    )
)
register(
    Loss(
        name="dpo_loss_from_logits",
        family="dpo",
        function=dpo_loss_from_logits,
        reference=reference.dpo_loss_from_logits,
        eager=_eager_from_logits,
        inputs=_completions,
        wrt=("policy_logits",),
        cases={
            "sigmoid": {},
            **_TYPES,
            "weighted": {"use_weighting": True},
            "everything": {
                "loss_type": ("sigmoid", "bco_pair", "sft"),
                "loss_weights": (0.8, 0.2, 1.0),
                "label_smoothing": 0.1,
                "temperature": 0.7,
                "ld_alpha": 0.5,
                "reduction": "none",
            },
        },
        shapes=((4, 3, 33), (2, 5, 1030)),
        bench_shape=(8, 512, 32000),
        traffic=lambda shape, itemsize, backward: (3 if backward else 1) * math.prod(shape) * itemsize,
    )
)  # fmt: skip


def _linear_labels(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    pairs, tokens, _, classes = shape
    labels = draw.index(classes, pairs, tokens)
    return torch.where(draw.index(4, pairs, tokens) == 0, -100, labels)


def _linear_inputs(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    pairs, tokens, features, classes = shape
    return {
        "chosen_input": draw.normal(pairs, tokens, features),
        "rejected_input": draw.normal(pairs, tokens, features),
        "linear_weight": draw.normal(classes, features, scale=features**-0.5),
        "chosen_labels": draw.index(classes, pairs, tokens),
        "rejected_labels": draw.index(classes, pairs, tokens),
        "reference_chosen_logps": draw.uniform(pairs, low=-2.0 * tokens, high=0.0),
        "reference_rejected_logps": draw.uniform(pairs, low=-2.0 * tokens, high=0.0),
    }


register(
    Loss(
        name="linear_dpo_loss",
        family="dpo",
        function=linear_dpo_loss,
        reference=reference.linear_dpo_loss,
        products=(2, 6),
        inputs=_linear_inputs,
        wrt=("chosen_input", "rejected_input", "linear_weight", "linear_bias"),
        cases={
            "sigmoid": {},
            **_TYPES,
            "ipo+bias": {
                "loss_type": "ipo",
                "linear_bias": lambda d, s: d.normal(s[3]),
                "chosen_labels": _linear_labels,
                "reduction": "none",
            },
            "everything": {
                "loss_type": "robust",
                "label_smoothing": 0.1,
                "rejected_labels": _linear_labels,
                "temperature": 0.7,
                "softcap": 5.0,
                "reduction": "sum",
            },
        },
        shapes=((3, 4, 8, 33), (2, 3, 5, 130), (1, 2, 3, 2)),
        bench_shape=(4, 256, 1024, 32000),
        traffic=lambda shape, itemsize, backward: (
            (2 if backward else 1) * (2 * shape[0] * shape[1] + shape[3]) * shape[2] * itemsize
        ),
    )
)  # fmt: skip
