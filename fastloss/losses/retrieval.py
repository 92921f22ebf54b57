"""Ranking losses of queries and documents; the similarity matrix is never stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastloss._ops.checks import (
    check_reduction,
    check_tensors,
    labels_of_rows,
    number,
    rows_of_features,
    weight_of_rows,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import log_sum_exp, softplus
from fastloss._ops.reductions import reduced
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs, target_columns
from fastloss.losses.contrastive import contrastive_softmax

__all__ = ["multiple_negatives_ranking_loss"]


DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


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
    r"""Compute the multiple negatives ranking loss: ranks each query's document above all others of the batch.

    With :math:`s = a \cos` query :math:`i` has :math:`\log \sum e^{s} - s(q_i, d_i)`, where the sum runs over

    ================  ============================================================================================
    query_to_doc      :math:`s(q_i, d_j)` for all documents :math:`j`, hard negatives too; always there
    doc_to_query      :math:`s(q_j, d_i)` for all queries :math:`j`
    query_to_query    :math:`s(q_i, q_j)` for all others
    doc_to_doc        :math:`s(d_i, d_j)` for all documents that do not belong to query :math:`i`
    ================  ============================================================================================

    of the chosen directions together (`"joint"`), or over each of them, and the mean of these losses is taken
    (`"per_direction"`). The similarity matrix is not stored.

    Args:
        anchor: queries, shape `(B, D)`; float32, float64, bfloat16 or float16.
        positive: documents `(N, D)` of the same type, those of the queries and possibly more.
        negatives: hard negatives `(K, N, D)`, K for the query of each document, or `(N, D)`; they are wrong documents
            for all queries. Default: none.
        scale: :math:`a`, a number or a tensor of one, which gets a gradient if it requires one. Default: 20.
        directions: which ones, `"query_to_doc"` first.
        partition_mode: `"joint"` or `"per_direction"`; the latter only with directions that have a positive.
        ids: `(N)` integers; documents with the same id, and their queries, are no negatives of each other.
            Default: all differ.
        normalize: divide each row by its length first; False: :math:`s = a \langle q, d \rangle`.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each query. Default: 1.
        label_offset: the document of query :math:`i` is row :math:`i +` offset of `positive`, for documents gathered
            from several processes. Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each query, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/1705.00652, GTE https://arxiv.org/abs/2308.03281;
    `MultipleNegativesRankingLoss` of sentence-transformers, without its hardness weights.
    """
    check_reduction(reduction)
    loss, weight, dtype = ranking_rows(
        anchor,
        positive,
        negatives,
        scale,
        directions,
        partition_mode,
        ids,
        normalize,
        sample_weight,
        label_offset,
    )
    return reduced(loss, weight, reduction, dtype)


def ranking_rows(
    anchor, positive, negatives, scale, directions, partition_mode, ids, normalize, sample_weight, label_offset=0,
    softmax=contrastive_softmax, first_query=0, first_doc=0,
):  # fmt: skip
    """Return the queries' losses, their weights, and the dtype of the result.

    Among the queries and documents that `softmax` sees, those given here begin at `first_query` and `first_doc`.
    """
    (q, d), dtype = rows_of_features("anchor", anchor=anchor, positive=positive)
    own_doc = target_columns(q.shape[0], d.shape[0], label_offset, q, "positive")
    directions = tuple(directions)
    if directions[:1] != DIRECTIONS[:1] or not set(directions) <= set(DIRECTIONS):
        raise ValueError(
            f"directions: expected 'query_to_doc' and others of {DIRECTIONS[1:]}, got {directions}"
        )
    if len(set(directions)) < len(directions):
        raise ValueError(f"directions: expected each once, got {directions}")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"partition_mode: expected 'joint' or 'per_direction', got {partition_mode!r}")
    if partition_mode == "per_direction" and set(directions) & set(DIRECTIONS[2:]):
        raise ValueError(
            "partition_mode: query_to_query and doc_to_doc have no positive of their own: use 'joint'"
        )
    weight = weight_of_rows(sample_weight, q)
    docs, of_query = d, torch.arange(first_query, first_query + d.shape[0], device=d.device)
    doc_ids = of_query if ids is None else labels_of_rows(ids, d, "ids")
    query_ids = doc_ids[own_doc]
    if negatives is not None:
        check_tensors(q, negatives=negatives)
        if negatives.dtype != anchor.dtype:
            raise RuntimeError(
                f"negatives: expected the dtype of anchor, {anchor.dtype}, got {negatives.dtype}"
            )
        hard = negatives.unsqueeze(0) if negatives.dim() == 2 else negatives
        if hard.dim() != 3 or hard.shape[1:] != d.shape:
            raise ValueError(f"negatives: expected shape {('K', *d.shape)}, got {tuple(negatives.shape)}")
        (hard,), _ = rows_of_features("negatives", negatives=hard.reshape(-1, q.shape[1]))
        docs = torch.cat([d, hard.to(d.dtype)])
        of_query = of_query.repeat(1 + hard.shape[0] // max(d.shape[0], 1))
        doc_ids = torch.cat([doc_ids, doc_ids.new_full((hard.shape[0],), torch.iinfo(torch.int64).min)])
    scale = number("scale", scale, q)
    if set(directions) & set(DIRECTIONS[2:]):  # its gradients are added up unrounded
        scale = scale.reshape(()).to(accumulation_dtype(q.dtype))
    both = "doc_to_query" in directions
    row_ids, col_ids = (None, None) if ids is None else (query_ids, doc_ids)
    attrs = SoftmaxAttrs(normalize=bool(normalize))
    row, col, first = softmax(
        SoftmaxInputs(q, docs, scale, target_col=own_doc + first_doc, row_ids=row_ids, col_ids=col_ids),
        attrs._replace(columns=both),
    )
    if partition_mode == "per_direction":
        loss = softplus(row) if not both else 0.5 * (softplus(row) + softplus(col))
        return loss, weight, dtype
    terms = [row, col] if both else [row]
    if "query_to_query" in directions:
        terms.append(softmax(SoftmaxInputs(q, None, scale, first, row_ids=query_ids), attrs)[0])
    if "doc_to_doc" in directions:
        if ids is not None:  # a row id cannot express both its query and its id
            raise ValueError("ids: not with the direction doc_to_doc")
        own = SoftmaxInputs(d[own_doc], docs, scale, first, row_ids=of_query[own_doc], col_ids=of_query)
        terms.append(softmax(own, attrs)[0])
    others = log_sum_exp(torch.stack(terms), 0) if len(terms) > 1 else row
    # with both directions the positive is in the sum twice
    loss = softplus(others - math.log(2)) + math.log(2) if both else softplus(others)
    return loss, weight, dtype
