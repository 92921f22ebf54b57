"""Ranking of documents for queries within a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.contrastive import reduced
from fastloss.reference.options import select

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
    """Compute `fastloss.functional.multiple_negatives_ranking_loss`."""
    queries, docs = anchor, positive
    if negatives is not None:
        docs = torch.cat([positive, negatives.reshape(-1, negatives.shape[-1])])
    if normalize:
        queries, docs = F.normalize(queries), F.normalize(docs)
    rows, known = queries.shape[0], positive.shape[0]
    local = slice(label_offset, label_offset + rows)
    pairs = torch.arange(known, device=anchor.device)
    ids = pairs if ids is None else ids
    itself = torch.eye(known, dtype=torch.bool, device=anchor.device)
    equal = ids.unsqueeze(1) == ids
    hard = torch.zeros(rows, docs.shape[0] - known, dtype=torch.bool, device=anchor.device)
    of_one_query = pairs.repeat(docs.shape[0] // max(known, 1)) == pairs[local].unsqueeze(1)
    matrices = {
        "query_to_doc": (queries @ docs.t(), torch.cat([(equal & ~itself)[local], hard], 1)),
        "doc_to_query": (docs[local] @ queries.t(), (equal & ~itself)[local, local]),
        "query_to_query": (queries @ queries.t(), equal[local, local]),
        "doc_to_doc": (docs[local] @ docs.t(), of_one_query | torch.cat([equal[local], hard], 1)),
    }
    chosen = [select("directions", direction, matrices) for direction in directions]
    logits = [(scale * s).masked_fill(left_out, -torch.inf) for s, left_out in chosen]
    first = logits[0].diagonal(label_offset)
    partition = select("partition_mode", partition_mode, {
        "joint": lambda: torch.cat(logits, 1).logsumexp(1),
        "per_direction": lambda: torch.stack([s.logsumexp(1) for s in logits]).mean(0),
    })  # fmt: skip
    lse = partition()
    return reduced(lse - first, sample_weight, reduction)
