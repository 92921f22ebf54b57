"""Contrastive losses of a batch whose rows are distributed over ranks, like those of `image_text`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._ops.checks import (
    check_reduction,
    labels_of_rows,
    positive_temperature,
    rows_of_features,
    weight_of_rows,
)
from fastloss._ops.checks import number as number_of
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import softplus
from fastloss._ops.reductions import reduced_over
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs
from fastloss.distributed.call import Call
from fastloss.losses.contrastive import info_nce_rows
from fastloss.losses.retrieval import ranking_rows
from fastloss.losses.supervised_contrastive import class_sizes

__all__ = ["info_nce", "multiple_negatives_ranking_loss", "nt_xent_loss", "sup_con_loss"]


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
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute InfoNCE over the queries and keys of all ranks: `fastloss.functional.info_nce` of them.

    With :math:`s = \cos / \tau` query :math:`i` has
    :math:`-\log (e^{s(q_i, k_i)} / (e^{s(q_i, k_i)} + \sum_j e^{s(q_i, n_j)}))`, where the negatives :math:`n` are the
    other keys of all ranks, or the negatives of all ranks. The sums and their rounding are those of `clip_loss` here.

    Args:
        query: of this rank, shape `(b, D)`; float32, float64, bfloat16 or float16.
        positive_key: of this rank, `(b, D)`, of the same type; without `negative_keys` it may have more rows.
        negative_keys: of this rank, `(M, D)`, which are negatives of all ranks' queries; or with
            `negative_mode="paired"` `(b, M, D)`, some for each query. Default: the other rows of `positive_key`.
        temperature: :math:`\tau > 0`, the same on every rank: a number or a tensor of one.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks' queries.
        negative_mode: `"unpaired"` or `"paired"`.
        sample_weight: `(b)`, a weight for each query of this rank. Default: 1.
        normalize: divide each row by its length first; False: :math:`s = \langle q, k \rangle / \tau`.
        label_offset: the key of this rank's query i is this rank's row i + offset. Default: 0.
        group, exchange, for_ddp, rows_per_rank: as of `clip_loss` here; on CUDA the number of further keys, or of
            negatives, less b, is the same on every rank.

    Returns:
        As of `clip_loss` here.

    Raises:
        ValueError, RuntimeError, TypeError: as of `clip_loss` here.

    Source: https://arxiv.org/abs/1807.03748; `info_nce` of info-nce-pytorch.
    """
    check_reduction(reduction)
    (x, k), _ = rows_of_features("query", query=query, positive_key=positive_key)
    number = positive_temperature(temperature, x)
    keys = negative_keys if isinstance(negative_keys, Tensor) and negative_mode == "unpaired" else k
    call = Call(
        "info_nce", x, group, exchange, for_ddp, rows_per_rank, reduction, keys.shape[0], query=query,
        positive_key=positive_key, negative_keys=negative_keys, temperature=temperature, sample_weight=sample_weight,
        normalize=bool(normalize), negative_mode=negative_mode,
    )  # fmt: skip
    q, k, negatives = call.features(query, positive_key, negative_keys)
    loss, weight, dtype = info_nce_rows(
        q, k, negatives, call.number(number), negative_mode, sample_weight, normalize, label_offset,
        lambda inputs, attrs: call.softmax(inputs, attrs, call.columns), call.columns.begin,
    )  # fmt: skip
    return call.reduced(loss, weight, dtype, call.rows)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute the supervised contrastive loss over the rows of all ranks: `fastloss.functional.sup_con_loss` of them.

    With :math:`s = \cos / \tau` and the other rows :math:`P_i` of its class, whichever rank has them, row :math:`i` has
    :math:`\log \sum_{a \ne i} e^{s_{ia}} - \sum_{p \in P_i} s_{ip} / |P_i|`. A row that is alone in its class on all
    ranks has 0 and does not count in the mean. The sums and their rounding are those of `clip_loss` here.

    Args:
        features: of this rank, shape `(b, D)`, any length of rows; float32, float64, bfloat16 or float16.
        labels: `(b)` integers, with one meaning on all ranks.
        temperature: :math:`\tau > 0`, the same on every rank: a number or a tensor of one.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks' rows.
        sample_weight: `(b)`, a weight for each row of this rank. Default: 1.
        normalize: as of `fastloss.functional`.
        group, exchange, for_ddp, rows_per_rank: as of `clip_loss` here.

    Returns:
        As of `clip_loss` here.

    Raises:
        ValueError, RuntimeError, TypeError: as of `clip_loss` here.

    Source: https://arxiv.org/abs/2004.11362; `SupConLoss` of pytorch-metric-learning.
    """
    check_reduction(reduction)
    (x,), dtype = rows_of_features("features", features=features)
    labels = labels_of_rows(labels, x)
    weight = weight_of_rows(sample_weight, x)
    number = positive_temperature(temperature, x)
    call = Call(
        "sup_con_loss", x, group, exchange, for_ddp, rows_per_rank, reduction, features=features,
        temperature=temperature, sample_weight=sample_weight, normalize=bool(normalize),
    )  # fmt: skip
    rows = call.rows
    (x,) = call.features(x)
    everywhere = rows.gathered(labels)
    others = class_sizes(everywhere, everywhere) - 1
    inv_num_positives = torch.where(others > 0, 1 / others.clamp_min(1).to(accumulation_dtype(x.dtype)), 0.0)[
        rows.local
    ]
    itself = torch.arange(rows.local.start, rows.local.stop, device=x.device)
    row, *_ = call.softmax(
        SoftmaxInputs(
            x, None, call.number(number), target_col=itself, row_ids=labels, inv_num_positives=inv_num_positives
        ),
        SoftmaxAttrs(
            normalize=bool(normalize), temperature=True, labels_are_positives=True, positives_in_denominator=True
        ),
        rows,
    )  # fmt: skip
    counts = others > 0
    loss = row.masked_fill(~counts[rows.local], 0.0)
    loss, weight = call.to_reduce(loss, weight, rows)
    counts = counts[rows.local] if reduction == "none" else counts
    return reduced_over(loss, counts, weight, reduction, dtype)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute SimCLR's NT-Xent over the samples of all ranks: `fastloss.functional.nt_xent_loss` of them.

    With the two views :math:`z` of all ranks' samples, :math:`s = \cos / \tau` and the other view :math:`p_i`, row
    :math:`i` has :math:`\log \sum_{a \ne i} e^{s_{ia}} - s_{i p_i}`. The sums and their rounding are those of
    `clip_loss` here.

    Args:
        z1, z2: the views, of this rank, of one shape `(b, D)`, any length of rows; float32, float64, bfloat16 or
            float16.
        temperature: :math:`\tau > 0`, the same on every rank: a number or a tensor of one.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks' rows.
        sample_weight: `(b)`, a weight for each sample of this rank, that both its views have. Default: 1.
        normalize: as of `fastloss.functional`.
        group, exchange, for_ddp, rows_per_rank: as of `clip_loss` here.

    Returns:
        A scalar, the same bits on every rank, or for `"none"` the losses of this rank's rows of `z1` and then of `z2`,
        `(2 b)`; else as of `clip_loss` here.

    Raises:
        ValueError, RuntimeError, TypeError: as of `clip_loss` here.

    Source: https://arxiv.org/abs/2002.05709.
    """
    check_reduction(reduction)
    (x, y), dtype = rows_of_features("z1", z1=z1, z2=z2)
    if x.shape != y.shape:
        raise ValueError(f"z2: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    weight = weight_of_rows(sample_weight, x)
    number = positive_temperature(temperature, x)
    call = Call(
        "nt_xent_loss", x, group, exchange, for_ddp, rows_per_rank, reduction, z1=z1, z2=z2, temperature=temperature,
        sample_weight=sample_weight, normalize=bool(normalize),
    )  # fmt: skip
    both = call.rows.times(2)
    rows = torch.arange(both.local.start, both.local.stop, device=x.device)
    x, y = call.features(x, y)
    row, *_ = call.softmax(
        SoftmaxInputs(
            torch.cat([x, y]), None, call.number(number), target_col=rows.roll(x.shape[0]), row_ids=rows
        ),
        SoftmaxAttrs(normalize=bool(normalize), temperature=True),
        both,
    )
    return call.reduced(softplus(row), None if weight is None else weight.repeat(2), dtype, both)


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
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute the loss that ranks each query's document above all others of all ranks' batches.

    `fastloss.functional.multiple_negatives_ranking_loss` of all ranks' queries and documents: with
    :math:`s = a \cos` query :math:`i` has :math:`\log \sum e^{s} - s(q_i, d_i)`, over any of the four directions.
    The sums and their rounding are those of `clip_loss` here.

    Args:
        anchor: queries of this rank, shape `(b, D)`, any length of rows; float32, float64, bfloat16 or float16.
        positive: the queries' documents, of the same shape and type.
        negatives: hard negatives `(K, b, D)`, K for each query, or `(b, D)`; K is the same on every rank. Default:
            none.
        scale: :math:`a`, the same on every rank: a number or a tensor of one. Default: 20.
        directions, partition_mode, normalize: as of `fastloss.functional`.
        ids: `(b)` integers, with one meaning on all ranks; pairs with the same id are no negatives of each other.
            Default: all differ.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks' queries.
        sample_weight: `(b)`, a weight for each query of this rank. Default: 1.
        group, exchange, for_ddp, rows_per_rank: as of `clip_loss` here.

    Returns:
        As of `clip_loss` here.

    Raises:
        ValueError, RuntimeError, TypeError: as of `clip_loss` here.

    Source: https://arxiv.org/abs/1705.00652, GTE https://arxiv.org/abs/2308.03281;
    `MultipleNegativesRankingLoss` of sentence-transformers with `gather_across_devices`.
    """
    check_reduction(reduction)
    (x, d), _ = rows_of_features("anchor", anchor=anchor, positive=positive)
    if d.shape != x.shape:
        raise ValueError(f"positive: expected shape {tuple(x.shape)}, got {tuple(d.shape)}")
    number = number_of("scale", scale, x)
    each = 0
    if isinstance(negatives, Tensor):
        each = negatives.shape[0] if negatives.dim() == 3 else 1
    call = Call(
        "multiple_negatives_ranking_loss", x, group, exchange, for_ddp, rows_per_rank, reduction, anchor=anchor,
        positive=positive, negatives=negatives, scale=scale, ids=ids, sample_weight=sample_weight,
        normalize=bool(normalize), directions=tuple(directions), partition_mode=partition_mode, K=each,
    )  # fmt: skip
    docs = call.rows.times(1 + each)

    def softmax(inputs: SoftmaxInputs, attrs: SoftmaxAttrs):
        return call.softmax(inputs, attrs, call.rows if inputs.y is None else docs)

    a, p, n = call.features(anchor, positive, negatives)
    loss, weight, dtype = ranking_rows(
        a, p, n, call.number(number), directions, partition_mode, ids, normalize, sample_weight, 0, softmax,
        call.rows.begin, docs.begin,
    )  # fmt: skip
    return call.reduced(loss, weight, dtype, call.rows)
