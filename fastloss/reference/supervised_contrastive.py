"""Contrastive losses in which labels make the pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.contrastive import log_sum_exp, nll, on_diagonal, reduced
from fastloss.reference.options import reduced as reduced_losses

__all__ = ["nt_xent_loss", "pair_nt_xent_loss", "sup_con_loss"]


def _of_pairs(
    x: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    keys: Tensor | None,
    key_labels: Tensor | None,
    offset: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, and which of them are of positive pairs and of negative ones."""
    if keys is None:
        keys, key_labels = x, labels
    if normalize:
        x, keys = F.normalize(x), F.normalize(keys)
    equal = labels.unsqueeze(1) == key_labels
    itself = torch.zeros_like(equal) if offset is None else on_diagonal(equal, offset)
    return x @ keys.t() / temperature, equal & ~itself, ~equal & ~itself


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    label_offset: int | None = 0,
) -> Tensor:
    """Compute `fastloss.functional.sup_con_loss`."""
    s, positive, negative = _of_pairs(
        features, labels, temperature, normalize, keys, key_labels, label_offset
    )
    fraction = positive.to(s.dtype) / positive.sum(1, keepdim=True).clamp_min(1)
    loss = log_sum_exp(s, positive | negative, 1) - (fraction * s.masked_fill(~positive, 0.0)).sum(1)
    counts = positive.any(1)
    return mean_over(loss.masked_fill(~counts, 0.0), counts, sample_weight, reduction)


def pair_nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    label_offset: int | None = 0,
) -> Tensor:
    """Compute `fastloss.functional.pair_nt_xent_loss`."""
    s, positive, negative = _of_pairs(
        embeddings, labels, temperature, normalize, keys, key_labels, label_offset
    )
    lse = log_sum_exp(s, negative, 1).unsqueeze(1)
    each = torch.logaddexp(lse - s, s.new_zeros(())).masked_fill(~positive, 0.0).sum(1)
    return mean_over(each, positive.sum(1), sample_weight, reduction)


def mean_over(loss: Tensor, counts: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Return losses, their mean or sum; a mean is divided by the sum of weights of what counts, 0 if nothing does."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
        counts = counts * weight.to(loss.dtype)
    total = counts.sum()
    return reduced_losses(loss, reduction, torch.where(total == 0, 1, total).to(loss.dtype))


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Compute `fastloss.functional.nt_xent_loss`."""
    x = torch.cat([z1, z2])
    x = F.normalize(x) if normalize else x
    s = x @ x.t() / temperature
    itself = torch.eye(s.shape[0], dtype=torch.bool, device=s.device)
    target = torch.arange(s.shape[0], device=s.device).roll(z1.shape[0])
    loss = nll(s.masked_fill(itself, -torch.inf), target)
    return reduced(loss, None if sample_weight is None else sample_weight.repeat(2), reduction)
