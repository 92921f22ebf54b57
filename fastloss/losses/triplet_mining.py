"""Triplet losses of a labelled batch, which find their triplets themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import Op
from fastloss._ops.checks import check_number, check_reduction, check_tensors
from fastloss._ops.chunked_linear import accumulation_type
from fastloss._ops.similarity_losses import HardestOp
from fastloss._registry import Draw
from fastloss.losses.metric_learning import pair_sums, register_metric, rows_alike

__all__ = ["batch_all_triplet_loss", "batch_hard_triplet_loss"]

_formulas = reference.metric_learning
_hardest = HardestOp("contrastive_hardest")
_triplets = Op(
    "triplets",
    _formulas.triplets,
    lambda x, ids, margin, root: x.new_empty([2, x.shape[0]]),
    tensors=2,
)


def _labelled_rows(embeddings: Tensor, labels: Tensor, distance: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Rows, of length 1 for cosines; their labels, and the type of the result."""
    if distance not in ("euclidean", "squared", "cosine"):
        raise ValueError(f"distance: expected 'euclidean', 'squared' or 'cosine', got {distance!r}")
    (x,), dtype, single = rows_alike(embeddings=embeddings)
    if single:
        raise ValueError(f"embeddings: expected shape (B, D), got {tuple(embeddings.shape)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    check_tensors(x, labels=labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels: expected one for each of {x.shape[0]} rows, got shape {tuple(labels.shape)}"
        )
    if distance == "cosine":
        x = F.normalize(x.to(accumulation_type(x.dtype)))
    return x, labels.long(), dtype


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | None = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet loss of each row with the farthest row of its class and the nearest of another.

    With these two distances :math:`d_p` and :math:`d_n` a row has :math:`\max(0, d_p - d_n + m)`, or without a
    margin :math:`\log(1 + e^{d_p - d_n})`. The two rows are found in tiles of the matrix of similarities, which
    is not stored; their distances are then computed from differences. A row without a positive or without a
    negative has 0 and does not count in the mean.

    Args:
        embeddings: shape `(B, D)`; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        margin: :math:`m`, or None. Default: 5.
        distance: `"euclidean"`, `"squared"` (its square) or `"cosine"` (:math:`1 - \cos`).
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the embeddings' type (float32 for half types under
        autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/1703.07737; `BatchHardTripletLoss` of sentence-transformers.
    """
    check_reduction(reduction)
    x, labels, dtype = _labelled_rows(embeddings, labels, distance)
    positive, negative = _hardest(x.detach(), labels).unbind(0)
    counts = (positive >= 0) & (negative >= 0)

    def distance_from(square: Tensor) -> Tensor:
        if distance == "cosine":
            return square / 2
        return square if distance == "squared" else _formulas.length(square)

    others = (x[i.clamp_min(0)] for i in (positive, negative))
    near, far = (distance_from(sums[3]) for sums in pair_sums(x, *others))
    gap = (near - far).masked_fill(~counts, -torch.inf)
    loss = F.softplus(gap) if margin is None else torch.relu(gap + check_number("margin", margin))
    if reduction == "none":
        return loss.to(dtype)
    return (loss.sum() / (counts.sum().clamp_min(1) if reduction == "mean" else 1)).to(dtype)


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet loss over all triplets of a batch, as a mean over those that are not satisfied.

    With the other rows :math:`P_i` of its class and the rows :math:`N_i` of other classes row :math:`i` has

    .. math:: \sum_{p \in P_i} \sum_{n \in N_i} \max(0, d(x_i, x_p) - d(x_i, x_n) + m)

    The mean is divided by the number of terms greater than 0, and :math:`10^{-16}`: it is 0 if there is none.

    Work grows with :math:`B^2 (D + \log B)`, not with the number of triplets, and memory with :math:`B D`: of a row
    the fewer of its positives and negatives are sorted, and each of the others finds its place among them.
    Distances are computed from differences.

    Args:
        embeddings: shape `(B, D)`; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        margin: :math:`m`. Default: 5.
        distance: `"euclidean"`, `"squared"` (its square) or `"cosine"` (:math:`1 - \cos`).
        reduction: `"none"`, the sum over each row's triplets, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the embeddings' type (float32 for half types under
        autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/1703.07737; `BatchAllTripletLoss` of sentence-transformers.
    """
    check_reduction(reduction)
    x, labels, dtype = _labelled_rows(embeddings, labels, distance)
    unit = 0.5 if distance == "cosine" else 1.0  # of rows of length 1: half the square of their distance
    margin = check_number("margin", margin) / unit
    x = x.to(accumulation_type(x.dtype))
    loss, number = _triplets((x, labels), (margin, distance == "euclidean")).unbind(0)
    loss = loss * unit
    if reduction == "none":
        return loss.to(dtype)
    return (loss.sum() / (number.sum() + 1e-16 if reduction == "mean" else 1)).to(dtype)


# ---- registry


def _labelled(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {"embeddings": draw.normal(*shape), "labels": draw.index(max(shape[0] // 3, 2), shape[0])}


register_metric(
    batch_hard_triplet_loss,
    {
        "soft": {"margin": None, "reduction": "sum"},
        "cosine": {"distance": "cosine", "margin": 0.2},
        "everything": {"distance": "squared", "margin": 3.0, "reduction": "none"},
    },
    replaces="sentence_transformers.losses.BatchHardTripletLoss",
    inputs=_labelled,
    wrt=("embeddings",),
    forward_arguments=("embeddings", "labels"),
    products=(1, 1),
    bench_shape=(1024, 128),
)
register_metric(
    batch_all_triplet_loss,
    {
        "cosine": {"distance": "cosine", "margin": 0.2},
        "two classes": {"labels": lambda d, s: d.index(2, s[0]), "margin": 1.0, "reduction": "sum"},
        "everything": {"distance": "squared", "margin": 30.0, "reduction": "none"},
    },
    replaces="sentence_transformers.losses.BatchAllTripletLoss",
    inputs=_labelled,
    wrt=("embeddings",),
    forward_arguments=("embeddings", "labels"),
    bench_shape=(256, 128),
)
