"""Connectionist temporal classification, step by step in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, select

__all__ = ["ctc_loss"]


def _log_sum(*terms: Tensor) -> Tensor:
    """Return the logarithm of a sum; of -inf alone it is -inf, with a gradient of 0."""
    stacked = torch.stack(terms)
    nothing = (stacked == -math.inf).all(0)
    return torch.where(nothing, -math.inf, torch.where(nothing, 0.0, stacked).logsumexp(0))


def _shifted(x: Tensor, by: int) -> Tensor:
    """Return [N, S], position s holding what was at s - by, the first ones -inf."""
    return torch.cat([torch.full_like(x[:, :by], -math.inf), x[:, : x.shape[1] - by]], 1)


def ctc_rows(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = 0,
    from_logits: bool = False,
    zero_infinity: bool = False,
) -> Tensor:
    """Return the loss of each sequence, of [T, N, C] and padded targets [N, L]."""
    y = log_probs.to(accumulation_dtype(log_probs.dtype))
    if from_logits:
        y = y.log_softmax(-1)
    steps, batch, _ = y.shape
    width = targets.shape[1]
    inside = torch.arange(width, device=y.device) < target_lengths.unsqueeze(1)
    labels = torch.where(inside, targets.long(), blank)
    blanks = torch.full_like(labels, blank)
    positions = torch.stack([blanks, labels], -1).flatten(1)
    positions = torch.cat([positions, positions.new_full((batch, 1), blank)], 1)
    differ = labels[:, 1:] != labels[:, :-1]
    skips = torch.stack([differ, torch.zeros_like(differ)], -1).flatten(1)
    skips = torch.cat([skips.new_zeros((batch, 3)), skips], 1)[:, : 2 * width + 1]
    place = torch.arange(2 * width + 1, device=y.device)
    alpha = (
        torch.where(place == 0, 0.0, -math.inf).to(y).expand(batch, -1) + y[:0].sum()
    )  # before the first step
    found = alpha  # after each sequence's last
    for t in range(steps):
        before: tuple[Tensor, ...] = (alpha, _shifted(alpha, 1))
        if t > 0:
            before = (*before, torch.where(skips, _shifted(alpha, 2), -math.inf))
        alpha = _log_sum(*before) + y[t].gather(1, positions)
        found = torch.where((input_lengths == t + 1).unsqueeze(1), alpha, found)
    last = (2 * target_lengths).unsqueeze(1)
    end = torch.where((place == last) | (place == last - 1), found, -math.inf)
    loss = -_log_sum(*end.unbind(1))
    return torch.where(loss == math.inf, 0.0, loss) if zero_infinity else loss


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    from_logits: bool = False,
) -> Tensor:
    """Compute `fastloss.functional.ctc_loss`."""
    if log_probs.dim() not in (2, 3):
        raise RuntimeError(f"log_probs: expected (T, N, C) or (T, C), got {tuple(log_probs.shape)}")
    lengths = [torch.as_tensor(x, device=log_probs.device) for x in (input_lengths, target_lengths)]
    single = log_probs.dim() == 2
    if single:
        log_probs, lengths = log_probs.unsqueeze(1), [x.reshape(1) for x in lengths]
        targets = targets.unsqueeze(0) if targets.dim() == 1 else targets
    steps, batch, classes = log_probs.shape
    inputs, labels = lengths
    if inputs.shape != (batch,) or labels.shape != (batch,):
        raise RuntimeError(f"input_lengths, target_lengths: expected {batch} numbers")
    if not 0 <= blank < classes:
        raise RuntimeError(f"blank: expected a class in [0, {classes})")
    for name, x in (("targets", targets), ("input_lengths", inputs), ("target_lengths", labels)):
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise RuntimeError(f"{name}: expected integers, got {x.dtype}")
    if targets.dim() == 1:
        ends = labels.cumsum(0)
        rows = [targets[end - n : end] for n, end in zip(labels.tolist(), ends.tolist(), strict=True)]
        targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if targets.dim() != 2 or targets.shape[0] != batch:
        raise RuntimeError(f"targets: expected {batch} rows")
    if bool(((inputs < 0) | (inputs > steps)).any()):
        raise RuntimeError(f"input_lengths: expected numbers in [0, {steps}]")
    if bool(((labels < 0) | (labels > targets.shape[1])).any()):
        raise RuntimeError(f"target_lengths: expected numbers in [0, {targets.shape[1]}]")
    inside = torch.arange(targets.shape[1], device=targets.device) < labels.unsqueeze(1)
    if bool((inside & ((targets < 0) | (targets >= classes))).any()):
        raise RuntimeError(f"targets: expected classes in [0, {classes})")
    loss = ctc_rows(log_probs, targets, inputs, labels, blank, from_logits, zero_infinity)
    reduce = select("reduction", reduction, {
        "none": lambda: loss.squeeze(0) if single else loss,
        "mean": lambda: (loss / labels.clamp(min=1)).mean(),
        "sum": lambda: loss.sum(),
    })  # fmt: skip
    return reduce().to(log_probs.dtype)
