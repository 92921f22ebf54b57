"""Losses that know the values of number tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.classification import cross_entropy

__all__ = ["cross_entropy_with_number_token_loss", "gaussian_cross_entropy", "number_token_loss"]


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _numbers(labels: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels are number tokens, and their values."""
    match = labels.unsqueeze(-1) == ids
    return match.any(-1), torch.where(match, values, 0.0).sum(-1)


def _reduced(loss: Tensor, counts: Tensor, reduction: str, least: int) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum().clamp(min=least)


def _number_rows(
    z: Tensor,
    labels: Tensor,
    ids: Tensor,
    values: Tensor,
    kind: str,
    reweigh: bool,
    squash_factor: float | None,
) -> Tensor:
    _, y = _numbers(labels, ids, values)
    q = z[..., ids].softmax(-1)
    gaps = (values.unsqueeze(0) - values.unsqueeze(1)).abs()
    if kind == "wasserstein":
        gap, most = (values - y.unsqueeze(-1)).abs(), gaps.max()
        if squash_factor is not None:
            least = torch.where(gaps == 0, torch.inf, gaps).amin()
            several = most > least  # else all different values are equally far apart: 1
            scale = torch.where(several, (squash_factor - 1) / torch.where(several, most - least, 1.0), 0.0)
            gap = torch.where(gap == 0, 0.0, 1 + torch.where(several, gap - least, 0.0) * scale)
            most = torch.where(several, squash_factor, 1.0).to(gap.dtype)
        loss = (q * gap).sum(-1)
    else:
        loss, most = ((q * values).sum(-1) - y).square(), gaps.max().square()
    if reweigh:
        mass = z.softmax(-1)[..., ids].sum(-1)
        loss = loss * mass + 1.01 * most * (1 - mass)
    return loss


def _soft_rows(z: Tensor, p: Tensor, ids: Tensor, values: Tensor, kind: str, reweigh: bool) -> Tensor:
    q, most = z[..., ids].softmax(-1), values.max() - values.min()
    if kind == "wasserstein":
        points = values.sort().values
        below = (values.unsqueeze(-1) <= points[:-1]).to(z.dtype)  # [D, D - 1]
        loss = ((q @ below - p @ below).abs() * points.diff()).sum(-1)
    else:
        loss, most = ((q * values).sum(-1) - (p * values).sum(-1)).square(), most.square()
    if reweigh:
        mass = z.softmax(-1)[..., ids].sum(-1)
        loss = loss * mass + 1.01 * most * (1 - mass)
    return loss


def number_token_loss(
    logits: Tensor,
    labels: Tensor,
    token_ids: Tensor,
    token_values: Tensor,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    reweigh: bool = False,
    squash_factor: float | None = None,
) -> Tensor:
    """As `fastloss.functional.number_token_loss`."""
    z, values = _wide(logits), token_values.to(_wide(logits).dtype)
    if labels.is_floating_point():
        counts = (labels != 0).any(-1)
        z = torch.where(counts.unsqueeze(-1), z, 0.0)
        rows = _soft_rows(z, labels.to(z.dtype), token_ids, values, kind, reweigh)
        return _reduced(torch.where(counts, rows, 0.0), counts, reduction, 1).to(logits.dtype)
    counts = _numbers(labels, token_ids, values)[0] & (labels != ignore_index)
    z = torch.where(counts.unsqueeze(-1), z, 0.0)
    rows = _number_rows(z, labels, token_ids, values, kind, reweigh, squash_factor)
    return _reduced(torch.where(counts, rows, 0.0), counts, reduction, 1).to(logits.dtype)


def cross_entropy_with_number_token_loss(
    logits: Tensor,
    labels: Tensor,
    token_ids: Tensor,
    token_values: Tensor,
    ntl_weight: float = 0.3,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    reweigh: bool = False,
    squash_factor: float | None = None,
) -> Tensor:
    """As `fastloss.functional.cross_entropy_with_number_token_loss`."""
    z, values = _wide(logits), token_values.to(_wide(logits).dtype)
    plain = cross_entropy(
        z.movedim(-1, 1 if z.dim() > 1 else 0), labels, None, None, ignore_index, None, reduction
    )
    numbers = number_token_loss(
        z,
        labels,
        token_ids,
        values,
        kind,
        ignore_index,
        reduction,
        reweigh=reweigh,
        squash_factor=squash_factor,
    )
    return (plain + ntl_weight * numbers).to(logits.dtype)


def gaussian_cross_entropy(
    input: Tensor,
    target: Tensor,
    sigma: float = 1.0,
    token_ids: Tensor | None = None,
    token_values: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """As `fastloss.functional.gaussian_cross_entropy`."""
    z = _wide(input).movedim(1 if input.dim() > 1 else 0, -1)
    classes = z.shape[-1]
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    one_hot = F.one_hot(y, classes).to(z.dtype)
    if sigma == 0:
        q = one_hot
    elif token_ids is None:
        q = (
            (-0.5 * ((torch.arange(classes, device=z.device) - y.unsqueeze(-1)) / sigma) ** 2)
            .to(z.dtype)
            .softmax(-1)
        )
    else:
        values = token_values.to(z.dtype)
        is_number, value = _numbers(y, token_ids, values)
        near = (-0.5 * ((values - value.unsqueeze(-1)) / sigma) ** 2).softmax(-1)
        spread = torch.zeros_like(z).scatter(-1, token_ids.expand(near.shape), near)
        q = torch.where(is_number.unsqueeze(-1), spread, one_hot)
    logp = torch.where(valid.unsqueeze(-1), z, 0.0).log_softmax(-1)
    loss = torch.where(valid, -torch.where(q > 0, q * logp, 0.0).sum(-1), 0.0)
    return _reduced(loss, valid, reduction, 0).to(input.dtype)
