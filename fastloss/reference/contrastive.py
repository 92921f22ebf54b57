"""Contrastive losses: of the similarities of all pairs in a batch, which are written out here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "clip_loss",
    "info_nce",
    "multiple_negatives_ranking_loss",
    "nt_xent_loss",
    "pair_nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
]


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


def _of_pairs(
    x: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    keys: Tensor | None,
    key_labels: Tensor | None,
    offset: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and which of them are of positive pairs and of negative ones."""
    if keys is None:
        keys, key_labels = x, labels
    if normalize:
        x, keys = F.normalize(x), F.normalize(keys)
    equal = labels.unsqueeze(1) == key_labels
    itself = torch.zeros_like(equal)
    if offset is not None:
        itself.diagonal(offset).fill_(True)
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
    """As `fastloss.functional.sup_con_loss`."""
    s, positive, negative = _of_pairs(
        features, labels, temperature, normalize, keys, key_labels, label_offset
    )
    share = positive.to(s.dtype) / positive.sum(1, keepdim=True).clamp_min(1)
    loss = log_sum_exp(s, positive | negative, 1) - (share * s.masked_fill(~positive, 0.0)).sum(1)
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
    """As `fastloss.functional.pair_nt_xent_loss`."""
    s, positive, negative = _of_pairs(
        embeddings, labels, temperature, normalize, keys, key_labels, label_offset
    )
    lse = log_sum_exp(s, negative, 1).unsqueeze(1)
    each = torch.logaddexp(lse - s, s.new_zeros(())).masked_fill(~positive, 0.0).sum(1)
    return mean_over(each, positive.sum(1), sample_weight, reduction)


def mean_over(loss: Tensor, counts: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """A mean is divided by the sum of what counts, times the weights; 0 if nothing does."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
        counts = counts * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    total = counts.sum()
    return loss.sum() / (torch.where(total == 0, 1, total).to(loss.dtype) if reduction == "mean" else 1)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """As `fastloss.functional.nt_xent_loss`."""
    x = torch.cat([z1, z2])
    x = F.normalize(x) if normalize else x
    s = x @ x.t() / temperature
    itself = torch.eye(s.shape[0], dtype=torch.bool, device=s.device)
    target = torch.arange(s.shape[0], device=s.device).roll(z1.shape[0])
    loss = F.cross_entropy(s.masked_fill(itself, -torch.inf), target, reduction="none")
    return reduced(loss, None if sample_weight is None else sample_weight.repeat(2), reduction)


def multiple_negatives_ranking_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    scale: float | Tensor = 20.0,
    *,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    label_offset: int = 0,
) -> Tensor:
    """As `fastloss.functional.multiple_negatives_ranking_loss`."""
    queries, docs = anchor, positive
    if negatives is not None:
        docs = torch.cat([positive, negatives.reshape(-1, negatives.shape[-1])])
    if normalize:
        queries, docs = F.normalize(queries), F.normalize(docs)
    rows, known = queries.shape[0], positive.shape[0]
    own = slice(label_offset, label_offset + rows)
    pairs = torch.arange(known, device=anchor.device)
    ids = pairs if ids is None else ids
    itself = torch.eye(known, dtype=torch.bool, device=anchor.device)
    equal = ids.unsqueeze(1) == ids
    hard = torch.zeros(rows, docs.shape[0] - known, dtype=torch.bool, device=anchor.device)
    of_one_query = pairs.repeat(docs.shape[0] // max(known, 1)) == pairs[own].unsqueeze(1)
    matrices = {
        "query_to_doc": (queries @ docs.t(), torch.cat([(equal & ~itself)[own], hard], 1)),
        "doc_to_query": (docs[own] @ queries.t(), (equal & ~itself)[own, own]),
        "query_to_query": (queries @ queries.t(), equal[own, own]),
        "doc_to_doc": (docs[own] @ docs.t(), of_one_query | torch.cat([equal[own], hard], 1)),
    }
    logits = [
        (scale * s).masked_fill(left_out, -torch.inf) for s, left_out in (matrices[d] for d in directions)
    ]
    first = logits[0].diagonal(label_offset)
    if partition_mode == "joint":
        lse = torch.cat(logits, 1).logsumexp(1)
    else:
        lse = sum(s.logsumexp(1) for s in logits) / len(logits)
    return reduced(lse - first, sample_weight, reduction)
