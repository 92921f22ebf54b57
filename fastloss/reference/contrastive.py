"""Contrastive losses: of the similarities of all pairs in a batch, which are written out here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.classification import nll_of, one_hot
from fastloss.reference.options import accumulation_dtype, select
from fastloss.reference.options import reduced as reduced_losses

__all__ = ["clip_loss", "info_nce", "siglip_loss"]


# ---- what the operators compute


def similarities(
    x: Tensor, y: Tensor | None, scale: Tensor, normalize: bool, temperature: bool = False
) -> Tensor:
    """Return all similarities in the accumulation type; with `temperature` the scale is one."""
    acc_dtype = accumulation_dtype(x.dtype)
    x, y, scale = (t.to(acc_dtype) for t in (x, x if y is None else y, scale.reshape(())))
    if normalize:
        x, y = F.normalize(x), F.normalize(y)
    s = x @ y.t()
    return s / scale if temperature else s * scale


def entries(
    s: Tensor, target_col: Tensor | None, row_ids: Tensor | None, col_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return which entries are in the target column, and which others have equal ids."""
    in_target = torch.zeros_like(s, dtype=torch.bool)
    if target_col is not None:
        in_target = target_col.unsqueeze(1) == torch.arange(s.shape[1], device=s.device)
    equal = torch.zeros_like(in_target)
    if row_ids is not None:
        equal = (row_ids.unsqueeze(1) == (row_ids if col_ids is None else col_ids)) & ~in_target
    return in_target, equal


def on_diagonal(s: Tensor, offset: int) -> Tensor:
    """Return which entries lie on the diagonal that begins in the column `offset`."""
    rows, columns = (torch.arange(n, device=s.device) for n in s.shape)
    return rows.unsqueeze(1) + offset == columns


def log_sum_exp(s: Tensor, counted: Tensor, dim: int) -> Tensor:
    """Return the logarithms of sums of what counts: -inf where nothing does, and no gradient there."""
    there = counted.any(dim, keepdim=True)
    s = s.masked_fill(~counted & there, -torch.inf).masked_fill(~there, 0.0)
    lse = s.logsumexp(dim) if s.shape[dim] else s.sum(dim)
    return lse.masked_fill(~there.squeeze(dim), -torch.inf)


def softmax_rows(inputs, attrs):
    """Compute what `SoftmaxOp` does, of its inputs and attributes."""
    s = similarities(inputs.x, inputs.y, inputs.scale, attrs.normalize, attrs.temperature)
    in_target, equal = entries(s, inputs.target_col, inputs.row_ids, inputs.col_ids)
    positive, left_out = (equal, in_target) if attrs.labels_are_positives else (in_target, equal)
    counted = ~left_out & (~positive | attrs.positives_in_denominator)
    t = s.masked_fill(~positive, 0.0).sum(1)
    row = col = s.new_zeros(0)
    if attrs.rows:
        inv_num_positives = inputs.inv_num_positives
        row = log_sum_exp(s, counted, 1) - (t if inv_num_positives is None else t * inv_num_positives)
        row = row if inputs.base is None else row - inputs.base
    if attrs.columns:
        col = log_sum_exp(s, counted, 0).index_select(0, inputs.target_col) - t
    return row, col, t


def pairs(inputs, attrs):
    """Compute what `PairsOp` does, of its inputs and attributes."""
    s = similarities(inputs.x, inputs.y, inputs.scale, attrs.normalize, attrs.temperature)
    in_target, equal = entries(s, inputs.target_col, inputs.row_ids, inputs.col_ids)
    lse = log_sum_exp(s, ~in_target & ~equal, 1).unsqueeze(1)
    return torch.logaddexp(lse - s, s.new_zeros(())).masked_fill(~equal, 0.0).sum(1)


def sigmoid_rows(inputs, attrs):
    """Compute what `SigmoidOp` does, of its inputs and attributes."""
    s = similarities(inputs.x, inputs.y, inputs.scale, attrs.normalize)
    s = s if inputs.bias is None else s + inputs.bias.reshape(()).to(s.dtype)
    in_target, _ = entries(s, inputs.target_col, None, None)
    loss = -F.logsigmoid(torch.where(in_target, s, -s)).sum(1)
    loss = reduced(loss, inputs.weight, ("none", "mean", "sum")[attrs.reduction])
    return loss if attrs.out_fp32 else loss.to(inputs.x.dtype)


def reduced(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Return weighted losses, their mean or their sum; a mean is divided by the sum of the weights."""
    if weight is None:
        return reduced_losses(loss, reduction, loss.shape[0])
    weight = weight.to(loss.dtype)
    return reduced_losses(loss * weight, reduction, weight.sum())


def nll(logits: Tensor, target: Tensor) -> Tensor:
    """Return -log softmax of each row's target, to full relative precision however far it is ahead."""
    return nll_of(logits, one_hot(target, logits.shape[1]), 1)


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
    """Compute `fastloss.functional.clip_loss`."""
    if normalize:
        image_features, text_features = F.normalize(image_features), F.normalize(text_features)
    logits = logit_scale * image_features @ text_features.t()
    if logit_bias is not None:
        logits = logits + logit_bias
    target = torch.arange(logits.shape[0], device=logits.device)
    loss = nll(logits, target) / 2 + nll(logits.t(), target) / 2
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
    """Compute `fastloss.functional.siglip_loss`."""
    if normalize:
        image_features, text_features = F.normalize(image_features), F.normalize(text_features)
    logits = logit_scale * image_features @ text_features.t()
    if logit_bias is not None:
        logits = logits + logit_bias
    z = torch.full_like(logits, -1)
    if label_offset is not None:
        z = torch.where(on_diagonal(logits, label_offset), 1.0, z)
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
    """Compute `fastloss.functional.info_nce`."""
    negatives = select("negative_mode", negative_mode, {
        "unpaired": lambda q, keys: q @ keys.t(),
        "paired": lambda q, keys: (keys @ q.unsqueeze(-1)).squeeze(-1),
    })  # fmt: skip
    if normalize:
        query, positive_key = F.normalize(query), F.normalize(positive_key)
        negative_keys = None if negative_keys is None else F.normalize(negative_keys, dim=-1)
    if negative_keys is None:
        logits = query @ positive_key.t()
        target = torch.arange(logits.shape[0], device=logits.device) + label_offset
    else:
        negative = negatives(query, negative_keys)
        logits = torch.cat([(query * positive_key).sum(1, keepdim=True), negative], 1)
        target = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
    return reduced(nll(logits / temperature, target), sample_weight, reduction)
