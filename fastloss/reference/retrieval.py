"""Ranking of documents for queries within a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.contrastive import reduced

__all__ = ["multiple_negatives_ranking_loss"]


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
        lse = sum(s.logsumexp(1) for s in logits) / len(logits)  # type: ignore[assignment]
    return reduced(lse - first, sample_weight, reduction)
