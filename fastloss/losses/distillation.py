"""Divergences for distillation between the softmaxes of two tensors of logits, both read once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import REDUCTIONS
from fastloss._ops.checks import (
    check_floating,
    check_integer,
    check_number,
    check_real,
    check_same_shape,
    check_tensor,
    check_tensors,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.rowwise import DivergenceOp

__all__ = ["js_div_logits", "kl_div_logits"]


def _of_operator(student, teacher, row_weight, reduction, scale, beta):
    mode = {"none": "none", "sum": "sum", "mean": "batchmean"}[list(REDUCTIONS)[reduction]]
    return reference.js_div_logits(student, teacher, beta, 1 / scale, mode, sample_weight=row_weight)


_divergence = DivergenceOp("divergence", _of_operator)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_tensor(name, logits)
        check_floating(name, logits)
    check_tensors(student, teacher_logits=teacher)
    if student.dim() == 0:
        raise RuntimeError("student_logits: expected [..., V], got a tensor without dimensions")
    check_same_shape("teacher_logits", teacher, "student_logits", student)


def _row_weight(
    student: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    sample_weight: Tensor | None,
) -> Tensor | None:
    """Return the weight of each row; None: 1 everywhere."""
    check_tensors(student, labels=labels, mask=mask, sample_weight=sample_weight)
    for name, t in (("labels", labels), ("mask", mask), ("sample_weight", sample_weight)):
        if t is not None and t.shape != student.shape[:-1]:
            raise RuntimeError(f"{name}: expected shape {tuple(student.shape[:-1])}, got {tuple(t.shape)}")
    if labels is not None and labels.dtype != torch.int64:
        raise RuntimeError(f"labels: expected classes of type int64, got {labels.dtype}")
    check_real(mask=mask, sample_weight=sample_weight)
    ignore_index = check_integer("ignore_index", ignore_index)
    counts = None if labels is None else labels != ignore_index
    if mask is not None:
        counts = mask != 0 if counts is None else counts & (mask != 0)
    acc_dtype = accumulation_dtype(student.dtype)
    if sample_weight is None:
        return None if counts is None else counts.to(acc_dtype)
    weight = sample_weight.to(acc_dtype)
    return weight if counts is None else torch.where(counts, weight, 0.0)


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
    r"""Compute the generalised Jensen-Shannon divergence between student and teacher, both given by logits.

    With :math:`p = \mathrm{softmax}(t / T)` of the teacher and :math:`q = \mathrm{softmax}(s / T)` of the student:

    .. math:: \beta\, \mathrm{KL}(p \,\|\, m) + (1 - \beta)\, \mathrm{KL}(q \,\|\, m), \qquad
              m = \beta p + (1 - \beta) q .

    The end points are defined as in TRL and GKD, not as the limits of this formula (which are 0): :math:`\beta = 0` is
    the forward divergence :math:`\mathrm{KL}(p \| q) = \sum_j p_j \log (p_j / q_j)`, as in plain distillation, and
    :math:`\beta = 1` the reverse one :math:`\mathrm{KL}(q \| p)`.

    Both tensors are read once, the gradients of those that require one are written while the rows are in cache; no
    distribution is stored. A class of probability 0 in one of them (a logit of -inf) contributes the limit of its term,
    and one of probability 0 in both contributes nothing.

    Args:
        student_logits: :math:`s`, `[..., V]`; float32, float64, bfloat16 or float16.
        teacher_logits: :math:`t`, of the same shape. It gets a gradient if it requires one.
        beta: in [0, 1]. Default: 0.5, the Jensen-Shannon divergence.
        temperature: `T` > 0, divides both. The loss is not multiplied by :math:`T^2`. Default: 1.
        reduction: `"batchmean"` is the sum over rows divided by the number of rows that count (with `sample_weight`:
            by the sum of their weights); `"mean"` is that divided by `V`, as in `torch.nn.functional.kl_div`;
            `"sum"`, `"none"`. Default: `"batchmean"`.
        labels: `[...]`, int64; rows where they are `ignore_index` are not read and have no gradient.
        ignore_index: see `labels`. Default: -100.
        mask: `[...]`, the same for rows where it is 0 (False).
        sample_weight: `[...]`, a weight for each row. Default: 1.

    Returns:
        A scalar, or for `"none"` a tensor of shape `[...]`; float32 for half-precision dtypes.

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.

    Source: Agarwal et al., On-Policy Distillation (GKD), https://arxiv.org/abs/2306.13649; TRL's
    `GKDTrainer.generalized_jsd_loss`.
    """
    _check_logits(student_logits, teacher_logits)
    weight = check_number("beta", beta, low=0.0, high=1.0)
    scale = 1 / check_number("temperature", temperature, low=math.ulp(0.0))
    if reduction not in ("batchmean", *REDUCTIONS):
        raise ValueError(
            f"{reduction} is not a valid value for reduction: expected 'batchmean', 'mean', 'sum' or 'none'"
        )
    mode = REDUCTIONS["mean" if reduction == "batchmean" else reduction]
    rows = _row_weight(student_logits, labels, ignore_index, mask, sample_weight)
    dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    loss = _divergence((student_logits.to(dtype), teacher_logits.to(dtype), rows), (mode, scale, weight))
    return loss / student_logits.shape[-1] if reduction == "mean" else loss


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
    r"""Compute the forward Kullback-Leibler divergence from teacher to student, both given by logits.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_j p_j \log \frac{p_j}{q_j}, \qquad
              p = \mathrm{softmax}(t / T),\ q = \mathrm{softmax}(s / T)

    of the teacher's logits :math:`t` and the student's :math:`s`; the gradient with respect to the latter is
    :math:`(q - p) / T`. Equal to `js_div_logits` with `beta=0`; `beta=1` gives the reverse divergence.

    Args:
        student_logits: :math:`s`, `[..., V]`; float32, float64, bfloat16 or float16.
        teacher_logits: :math:`t`, of the same shape. It gets a gradient if it requires one.
        temperature: `T` > 0. The loss is not multiplied by :math:`T^2`. Default: 1.
        reduction: `"batchmean"`, `"mean"`, `"sum"` or `"none"`, as for `js_div_logits`. Default: `"batchmean"`.
        labels, ignore_index, mask, sample_weight: which rows count, and how much, as for `js_div_logits`.

    Returns:
        A scalar, or for `"none"` a tensor of shape `[...]`; float32 for half-precision dtypes. Infinite where the
        student gives probability 0 to a class to which the teacher does not.

    Raises:
        TypeError, ValueError, RuntimeError: for invalid arguments, naming the argument.

    Source: Hinton et al., https://arxiv.org/abs/1503.02531; `torch.nn.functional.kl_div` of two log-softmaxes.
    """
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
