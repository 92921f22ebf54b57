"""Connectionist temporal classification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._registry.spec import InputSampler, Loss, register
from fastloss.losses.ctc import ctc_loss


def _strange(targets, classes):
    return bool(((targets < 0) | (targets >= classes)).any())


def _eager_ctc(
    log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False,
    *, from_logits=False,
):  # fmt: skip
    """Call torch's own where its gradient is the derivative and its unchecked reads are safe, else the reference."""
    integers = (targets, input_lengths, target_lengths)
    known = from_logits and all(isinstance(x, Tensor) and x.dtype == torch.int64 for x in integers)
    if not known or log_probs.dim() != 3 or not log_probs.numel() or _strange(targets, log_probs.shape[-1]):
        return reference.ctc_loss(
            log_probs, *integers, blank, reduction, zero_infinity, from_logits=from_logits
        )
    x = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    loss = torch.nn.functional.ctc_loss(x.log_softmax(-1), *integers, blank, reduction, zero_infinity)
    return loss.to(log_probs.dtype)


def _speech(draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Draw targets of at most 4 labels and inputs that are long enough for them."""
    steps, batch, classes = shape
    inputs = (steps - draw.index(3, batch)).clamp(min=0)
    labels = torch.minimum(draw.index(5, batch), (inputs + 1) // 2)
    return {
        "log_probs": draw.normal(*shape),
        "targets": draw.index(max(classes - 1, 1), batch, 4) + (classes > 1),
        "input_lengths": inputs,
        "target_lengths": labels * (classes > 1),
    }


register(
    Loss(
        name="ctc_loss",
        family="ctc",
        function=ctc_loss,
        reference=reference.ctc_loss,
        eager=_eager_ctc,
        inputs=_speech,
        wrt=("log_probs",),
        cases={
            "log_probs": {},
            "zero_infinity": {"zero_infinity": True, "reduction": "sum"},
            "from_logits": {"from_logits": True, "reduction": "none"},
        },
        shapes=((1, 1, 3), (12, 3, 9), (5, 2, 33)),
        bench_shape=(256, 32, 512),
        traffic=lambda shape, itemsize, backward: (3 if backward else 1) * math.prod(shape) * itemsize,
        replaces="torch.nn.functional.ctc_loss",
        unrolls=True,
    )
)
