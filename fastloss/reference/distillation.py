"""Divergences between the distributions of two tensors of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.options import accumulation_dtype, select

__all__ = ["js_div_logits", "kl_div_logits"]


def _weighed(p: Tensor, u: Tensor) -> Tensor:
    """Return sum p u of rows; a class of probability 0 adds nothing."""
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, u)).sum(-1)


def divergence_rows(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the divergence of every row."""
    s, t = (
        (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x) / temperature
        for x in (student, teacher)
    )
    q, p = s.softmax(-1), t.softmax(-1)
    neither = (s == -torch.inf) & (t == -torch.inf)
    apart = torch.where(neither, 0.0, t) - torch.where(neither, 0.0, s)
    d = apart - (t.logsumexp(-1, keepdim=True) - s.logsumexp(-1, keepdim=True))  # log(p / q)
    if beta == 0:
        return _weighed(p, d)
    if beta == 1:
        return _weighed(q, -d)
    more = d > 0
    gap = torch.where(more, d, -d)
    larger = -torch.log1p(
        torch.where(more, torch.full_like(d, 1 - beta), beta) * torch.expm1(-gap)
    )  # log of max(p, q) / m
    smaller = larger - gap
    return beta * _weighed(p, torch.where(more, larger, smaller)) + (1 - beta) * _weighed(
        q, torch.where(more, smaller, larger)
    )


def js_div_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.js_div_logits`."""
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    rows = student.shape[:-1]
    counts = torch.ones(rows, dtype=torch.bool, device=student.device)
    if labels is not None:
        counts = counts & (labels != ignore_index)
    if mask is not None:
        counts = counts & (mask != 0)
    acc_dtype = accumulation_dtype(dtype)
    weight = counts.to(acc_dtype)
    if sample_weight is not None:
        weight = torch.where(counts, sample_weight.to(acc_dtype), 0.0)
    read = (weight != 0).unsqueeze(-1)
    each = divergence_rows(
        torch.where(read, student, 0.0), torch.where(read, teacher, 0.0), beta, temperature
    )
    each = weight * each
    reduce = select("reduction", reduction, {
        "none": lambda: each,
        "sum": lambda: each.sum(),
        "batchmean": lambda: each.sum() / weight.sum(),
        "mean": lambda: each.sum() / weight.sum() / student.shape[-1],
    })  # fmt: skip
    return reduce()


def kl_div_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Compute `fastloss.functional.kl_div_logits`."""
    return js_div_logits(
        student_logits,
        teacher_logits,
        0.0,
        temperature,
        reduction,
        labels=labels,
        ignore_index=ignore_index,
        mask=mask,
        sample_weight=sample_weight,
    )
