"""Losses that know the values of number tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss.reference.classification import cross_entropy, one_hot
from fastloss.reference.options import accumulation_dtype, reduced, select

__all__ = ["cross_entropy_with_number_token_loss", "gaussian_cross_entropy", "number_token_loss"]


def _numbers(labels: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels are number tokens, and their values."""
    match = labels.unsqueeze(-1) == ids
    return match.any(-1), torch.where(match, values, 0.0).sum(-1)


def _reweighed(loss: Tensor, z: Tensor, ids: Tensor, max_loss: Tensor) -> Tensor:
    """Return the loss where the number tokens have all the mass; the other mass has 1.01 of the largest loss."""
    mass = z.softmax(-1).index_select(-1, ids).sum(-1)
    return loss * mass + 1.01 * max_loss * (1 - mass)


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
    q = z.index_select(-1, ids).softmax(-1)
    gaps = (values.unsqueeze(0) - values.unsqueeze(1)).abs()

    def wasserstein() -> tuple[Tensor, Tensor]:
        gap, max_gap = (values - y.unsqueeze(-1)).abs(), gaps.max()
        if squash_factor is not None:
            min_gap = torch.where(gaps == 0, torch.inf, gaps).amin()
            several = max_gap > min_gap  # else all different values are equally far apart: 1
            scale = (squash_factor - 1) / torch.where(several, max_gap - min_gap, 1.0)
            scale = torch.where(several, scale, 0.0)
            gap = torch.where(gap == 0, 0.0, 1 + torch.where(several, gap - min_gap, 0.0) * scale)
            max_gap = torch.where(several, squash_factor, 1.0).to(gap.dtype)
        return (q * gap).sum(-1), max_gap

    def mse() -> tuple[Tensor, Tensor]:
        return ((q * values).sum(-1) - y).square(), gaps.max().square()

    loss, max_loss = select("kind", kind, {"wasserstein": wasserstein, "mse": mse})()
    return _reweighed(loss, z, ids, max_loss) if reweigh else loss


def _soft_rows(z: Tensor, p: Tensor, ids: Tensor, values: Tensor, kind: str, reweigh: bool) -> Tensor:
    q, max_gap = z.index_select(-1, ids).softmax(-1), values.max() - values.min()

    def wasserstein() -> tuple[Tensor, Tensor]:
        points = values.sort().values
        below = (values.unsqueeze(-1) <= points[:-1]).to(z.dtype)  # [D, D - 1]
        return ((q @ below - p @ below).abs() * points.diff()).sum(-1), max_gap

    def mse() -> tuple[Tensor, Tensor]:
        return ((q * values).sum(-1) - (p * values).sum(-1)).square(), max_gap.square()

    loss, max_loss = select("kind", kind, {"wasserstein": wasserstein, "mse": mse})()
    return _reweighed(loss, z, ids, max_loss) if reweigh else loss


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
    """Compute `fastloss.functional.number_token_loss`."""
    acc_dtype = accumulation_dtype(logits.dtype)
    z, values = logits.to(acc_dtype), token_values.to(acc_dtype)
    if labels.is_floating_point():
        counts = (labels != 0).any(-1)
        z = torch.where(counts.unsqueeze(-1), z, 0.0)
        rows = _soft_rows(z, labels.to(z.dtype), token_ids, values, kind, reweigh)
        loss = torch.where(counts, rows, 0.0)
        return reduced(loss, reduction, counts.sum().clamp(min=1)).to(logits.dtype)
    counts = _numbers(labels, token_ids, values)[0] & (labels != ignore_index)
    z = torch.where(counts.unsqueeze(-1), z, 0.0)
    rows = _number_rows(z, labels, token_ids, values, kind, reweigh, squash_factor)
    loss = torch.where(counts, rows, 0.0)
    return reduced(loss, reduction, counts.sum().clamp(min=1)).to(logits.dtype)


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
    """Compute `fastloss.functional.cross_entropy_with_number_token_loss`."""
    acc_dtype = accumulation_dtype(logits.dtype)
    z, values = logits.to(acc_dtype), token_values.to(acc_dtype)
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
    """Compute `fastloss.functional.gaussian_cross_entropy`."""
    z = input.to(accumulation_dtype(input.dtype)).movedim(1 if input.dim() > 1 else 0, -1)
    classes = z.shape[-1]
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    of_class = one_hot(y, classes).to(z.dtype)
    if sigma == 0:
        q = of_class
    elif token_ids is None:
        q = (
            (-0.5 * ((torch.arange(classes, device=z.device) - y.unsqueeze(-1)) / sigma) ** 2)
            .to(z.dtype)
            .softmax(-1)
        )
    else:
        values = token_values.to(z.dtype)
        is_number, value = _numbers(y, token_ids, values)
        of_numbers = (-0.5 * ((values - value.unsqueeze(-1)) / sigma) ** 2).softmax(-1)
        spread = torch.zeros_like(z).scatter(-1, token_ids.expand(of_numbers.shape), of_numbers)
        q = torch.where(is_number.unsqueeze(-1), spread, of_class)
    logp = torch.where(valid.unsqueeze(-1), z, 0.0).log_softmax(-1)
    loss = torch.where(valid, -torch.where(q > 0, q * logp, 0.0).sum(-1), 0.0)
    return reduced(loss, reduction, valid.sum()).to(input.dtype)
