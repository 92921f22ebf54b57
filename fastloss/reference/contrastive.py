"""Contrastive losses: of the similarities of all pairs in a batch, which are written out here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_loss", "info_nce", "siglip_loss"]


# ---- what the operators compute


def similarities(
    x: Tensor, y: Tensor | None, scale: Tensor, normalize: bool, inverse: bool = False
) -> Tensor:
    """In the accumulation type; with `inverse` the scale is a temperature."""
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y, scale = x.to(high), x.to(high) if y is None else y.to(high), scale.reshape(()).to(high)
    if normalize:
        x, y = F.normalize(x), F.normalize(y)
    s = x @ y.t()
    return s / scale if inverse else s * scale


def entries(
    s: Tensor, mark: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which entries are marked, and which others are equal."""
    marked = torch.zeros_like(s, dtype=torch.bool)
    if mark is not None:
        marked = mark.unsqueeze(1) == torch.arange(s.shape[1], device=s.device)
    equal = torch.zeros_like(marked)
    if row_ids is not None:
        equal = (row_ids.unsqueeze(1) == (row_ids if col_ids is None else col_ids)) & ~marked
    return marked, equal


def log_sum_exp(s: Tensor, counted: Tensor, dim: int) -> Tensor:
    """-inf where nothing counts, and no gradient there."""
    there = counted.any(dim, keepdim=True)
    s = s.masked_fill(~counted & there, -torch.inf).masked_fill(~there, 0.0)
    lse = s.logsumexp(dim) if s.shape[dim] else s.sum(dim)
    return lse.masked_fill(~there.squeeze(dim), -torch.inf)


def softmax_rows(
    x,
    y,
    scale,
    base,
    mark,
    row_ids,
    col_ids,
    share,
    same_is_positive,
    with_positives,
    normalize,
    inverse,
    rows,
    columns,
):
    s = similarities(x, y, scale, normalize, inverse)
    marked, equal = entries(s, mark, row_ids, col_ids)
    positive, left_out = (equal, marked) if same_is_positive else (marked, equal)
    counted = ~left_out & (~positive | with_positives)
    t = s.masked_fill(~positive, 0.0).sum(1)
    row = col = s.new_zeros(0)
    if rows:
        row = log_sum_exp(s, counted, 1) - (t if share is None else t * share)
        row = row if base is None else row - base
    if columns:
        col = log_sum_exp(s, counted, 0)[mark] - t
    return row, col, t


def pairs(x, y, scale, mark, row_ids, col_ids, normalize, inverse):
    s = similarities(x, y, scale, normalize, inverse)
    marked, equal = entries(s, mark, row_ids, col_ids)
    lse = log_sum_exp(s, ~marked & ~equal, 1).unsqueeze(1)
    return torch.logaddexp(lse - s, s.new_zeros(())).masked_fill(~equal, 0.0).sum(1)


def sigmoid_rows(x, y, scale, bias, mark, row_ids, col_ids, weight, reduction, normalize, wide):
    s = similarities(x, y, scale, normalize)
    s = s if bias is None else s + bias.reshape(()).to(s.dtype)
    marked, equal = entries(s, mark, row_ids, col_ids)
    loss = -F.logsigmoid(torch.where(marked, s, -s)).masked_fill(equal, 0.0).sum(1)
    loss = reduced(loss, weight, ("none", "mean", "sum")[reduction])
    return loss if wide else loss.to(x.dtype)


def reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """A mean is divided by the sum of the weights."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (loss.shape[0] if weight is None else weight.to(loss.dtype).sum())


# ---- the losses


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """As `fastloss.functional.clip_loss`."""
    if normalize:
        image_features, text_features = F.normalize(image_features), F.normalize(text_features)
    logits = logit_scale * image_features @ text_features.t()
    if logit_bias is not None:
        logits = logits + logit_bias
    target = torch.arange(logits.shape[0], device=logits.device)
    loss = F.cross_entropy(logits, target, reduction="none") / 2
    loss = loss + F.cross_entropy(logits.t(), target, reduction="none") / 2
    return reduced(loss, sample_weight, reduction)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = False,
    label_offset: int | None = 0,
) -> Tensor:
    """As `fastloss.functional.siglip_loss`."""
    if normalize:
        image_features, text_features = F.normalize(image_features), F.normalize(text_features)
    logits = logit_scale * image_features @ text_features.t()
    if logit_bias is not None:
        logits = logits + logit_bias
    z = torch.full_like(logits, -1)
    if label_offset is not None:
        z.diagonal(label_offset).fill_(1)
    return reduced(-F.logsigmoid(z * logits).sum(1), sample_weight, reduction)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    label_offset: int = 0,
) -> Tensor:
    """As `fastloss.functional.info_nce`."""
    if normalize:
        query, positive_key = F.normalize(query), F.normalize(positive_key)
        negative_keys = None if negative_keys is None else F.normalize(negative_keys, dim=-1)
    if negative_keys is None:
        logits = query @ positive_key.t()
        target = torch.arange(logits.shape[0], device=logits.device) + label_offset
    else:
        if negative_mode == "unpaired":
            negative = query @ negative_keys.t()
        else:
            negative = (negative_keys @ query.unsqueeze(-1)).squeeze(-1)
        logits = torch.cat([(query * positive_key).sum(1, keepdim=True), negative], 1)
        target = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    return reduced(F.cross_entropy(logits / temperature, target, reduction="none"), sample_weight, reduction)
