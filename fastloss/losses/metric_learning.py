"""Losses of pairs and triplets of feature rows, which are read once."""

from __future__ import annotations

from functools import reduce as fold

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.autograd import Op, contiguous_like, runs_on_cpu
from fastloss._ops.checks import (
    check_floating,
    check_number,
    check_real,
    check_reduction,
    check_same_shape,
    check_tensor,
    check_tensors,
    legacy_reduction,
    real_number,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import softplus
from fastloss._ops.similarity_losses import HardestOp

__all__ = [
    "batch_all_triplet_loss",
    "batch_hard_triplet_loss",
    "contrastive_loss",
    "cosine_embedding_loss",
    "kelp_ranking_loss",
    "triplet_margin_loss",
]


_sums = Op(
    "feature_pairs",
    reference.metric_learning.pair_sums,
    lambda a, b, c, eps: a.new_empty([4 if c is None else 8, a.shape[0]], dtype=accumulation_dtype(a.dtype)),
    tensors=3,
    wrt=(0, 1, 2),
    gradient_like=contiguous_like,
)


def rows_alike(**tensors: Tensor) -> tuple[list[Tensor], torch.dtype, bool]:
    """Check that all are rows of one shape and dtype; return matrices, the output dtype, and if they were vectors."""
    (first, x), *_ = tensors.items()
    check_tensor(first, x)
    for name, t in tensors.items():
        check_tensors(x, **{name: t})
        check_floating(name, t)
        if not 1 <= t.dim() <= 2:
            raise RuntimeError(f"{name}: expected shape (D) or (N, D), got {tuple(t.shape)}")
        check_same_shape(name, t, first, x)
        if t.dtype != x.dtype:
            raise RuntimeError(f"{name}: expected the dtype of {first}, {x.dtype}, got {t.dtype}")
    out_fp32 = torch.is_autocast_enabled(x.device.type)
    dtype = accumulation_dtype(x.dtype) if out_fp32 else x.dtype
    single = x.dim() == 1
    return [t.unsqueeze(0) if single else t for t in tensors.values()], dtype, single


def rows_together(flags: bool, **tensors: Tensor) -> tuple[list[Tensor], torch.dtype, torch.Size]:
    """Check feature rows (..., D) as torch does, broadcast and promote them.

    Some may be integers, and with `flags` booleans, beside others in floating point. Returns matrices of their rows,
    the output dtype, and the shape without D.
    """
    (first, x), *others = tensors.items()
    check_tensor(first, x)
    if x.dim() == 0:
        raise RuntimeError(f"{first}: expected shape (..., D), got a tensor without dimensions")
    for name, t in tensors.items():
        check_tensors(x, **{name: t})
        if t.is_complex() or (t.dtype == torch.bool and not flags):
            check_floating(name, t)
        if t.dim() != x.dim():
            raise RuntimeError(f"{name}: expected {x.dim()} dimensions as {first} has, got {t.dim()}")
    shape = x.shape
    for name, t in others:
        try:
            shape = torch.broadcast_shapes(shape, t.shape)
        except RuntimeError:
            raise RuntimeError(
                f"{name}: expected a shape that broadcasts with {tuple(shape)}, got {tuple(t.shape)}"
            ) from None
    dtype = fold(torch.promote_types, (t.dtype for t in tensors.values()))
    if not dtype.is_floating_point:
        check_floating(first, x)
    found = [t.to(dtype).expand(shape).reshape(-1, shape[-1]) for t in tensors.values()]
    return found, accumulation_dtype(dtype) if torch.is_autocast_enabled(x.device.type) else dtype, shape[:-1]


def reduced(loss: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def _length(square: Tensor) -> Tensor:
    """Return the square root, with derivative 0 at 0."""
    nothing = square == 0
    return square.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)


def pair_sums(a: Tensor, *others: Tensor, eps: float = 0.0) -> list[Tensor]:
    """Return for each of one or two others b, in one read, [4, rows]: <a, b>, <a, a>, <b, b>, |a - b + eps|^2."""
    b, c = others if len(others) == 2 else (*others, None)
    return list(_sums((a, b, c), (eps,)).split(4))


def _cosines(a: Tensor, *others: Tensor, eps: float, floor: float) -> list[Tensor]:
    return [
        dot / ((aa + eps) * (bb + eps)).clamp_min(floor).sqrt() for dot, aa, bb, _ in pair_sums(a, *others)
    ]


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the cosine embedding loss: pulls pairs with target 1 together, pushes pairs with target -1 apart.

    A pair has :math:`1 - \cos(x_1, x_2)` if its target is :math:`y = 1`, and :math:`\max(0, \cos(x_1, x_2) - m)` if
    :math:`y = -1`.

    Args:
        input1, input2: rows `(N, D)` or `(D)`, of one D, where N may be 1; float32, float64, bfloat16 or float16. One
            of them may be integers.
        target: 1 or -1 for each row, `(N)` or `(1)`; for one row without a batch `()`.
        margin: :math:`m`, usually in [0, 0.5]. Default: 0.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the inputs' promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.cosine_embedding_loss`.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    check_reduction(reduction)
    (a, b), dtype, shape = rows_together(True, input1=input1, input2=input2)
    if input1.shape[-1] != input2.shape[-1]:  # torch takes each length over its own features
        raise RuntimeError(
            f"input2: expected {input1.shape[-1]} features as input1 has, got {input2.shape[-1]}"
        )
    check_tensors(a, target=target)
    if len(shape) > 1:
        raise RuntimeError(f"input1: expected shape (D) or (N, D), got {tuple(input1.shape)}")
    if target.dim() != len(shape) or target.shape not in (shape, (1,)):
        raise RuntimeError(
            f"target: expected shape {tuple(shape)}, one number for each row, got {tuple(target.shape)}"
        )
    margin = check_number("margin", margin)
    (cos,) = _cosines(a, b, eps=1e-12, floor=0.0)
    target = target.reshape(-1)
    loss = (1 - cos).masked_fill(target != 1, 0.0) + torch.relu(cos - margin).masked_fill(target != -1, 0.0)
    return reduced(loss.reshape(shape), reduction, dtype)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    squared: bool = False,
) -> Tensor:
    r"""Compute the triplet loss: anchor-positive distance below anchor-negative distance by a margin.

    .. math:: \max(0, d(a, p) - d(a, n) + m), \quad d(x, y) = \lVert x - y + \epsilon \rVert_p

    Args:
        anchor, positive, negative: rows `(..., D)` such as `(N, D)` or `(D)`, of shapes that broadcast and of one
            number of dimensions; float32, float64, bfloat16 or float16. Not all of them may be integers.
        margin: :math:`m`. Default: 1.
        p: the norm. Default: 2; others are computed by torch's operations.
        eps: :math:`\epsilon`. Default: 1e-6.
        swap: take the smaller of :math:`d(a, n)` and :math:`d(p, n)`. Default: False.
        size_average, reduce: deprecated, as in torch.
        reduction: `"none"`, `"mean"` or `"sum"`.
        squared: distances are squared, as in FaceNet, there with margin 0.2 on rows of length 1. Default: False.

    Returns:
        A scalar, or for `"none"` one number for each row, of the inputs' promoted type (float32 for half-precision
        dtypes under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: `torch.nn.functional.triplet_margin_loss`; FaceNet https://arxiv.org/abs/1503.03832.
    """
    reduction = legacy_reduction(size_average, reduce, reduction)
    check_reduction(reduction)
    (a, b, c), dtype, shape = rows_together(False, anchor=anchor, positive=positive, negative=negative)
    p = real_number("p", p)
    margin, eps = check_number("margin", margin), check_number("eps", eps)
    if margin <= 0:
        raise ValueError(f"margin: expected a number greater than 0, got {margin}")
    if p == 2:

        def distances(x: Tensor, *others: Tensor) -> list[Tensor]:
            squares = (sums[3] for sums in pair_sums(x, *others, eps=eps))
            return [square if squared else _length(square) for square in squares]
    else:

        def distances(x: Tensor, *others: Tensor) -> list[Tensor]:
            acc_dtype = accumulation_dtype(x.dtype)
            found = (F.pairwise_distance(x.to(acc_dtype), y.to(acc_dtype), p, eps) for y in others)
            return [d.square() if squared else d for d in found]

    positive_distance, negative_distance = distances(a, b, c)
    if swap:
        negative_distance = torch.minimum(negative_distance, *distances(b, c))
    loss = torch.relu(positive_distance - negative_distance + margin)
    return reduced(loss.reshape(shape), reduction, dtype)


def contrastive_loss(
    input1: Tensor, input2: Tensor, label: Tensor, margin: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    r"""Compute Hadsell's contrastive loss: pulls similar pairs together, pushes others apart up to a margin.

    With the distance :math:`D` of a pair and its label :math:`Y`, 0 for similar,

    .. math:: \tfrac12 (1 - Y) D^2 + \tfrac12 Y \max(0, m - D)^2

    Where two rows are equal the derivative of :math:`D` is taken to be 0.

    Args:
        input1, input2: rows of one shape `(N, D)`; float32, float64, bfloat16 or float16.
        label: `(N)`, 0 for a similar pair, 1 for another.
        margin: :math:`m`. Default: 1.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each pair, of the inputs' type (float32 for half-precision dtypes under
        autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: Hadsell, Chopra, LeCun 2006, https://doi.org/10.1109/CVPR.2006.100.
    """
    check_reduction(reduction)
    (a, b), dtype, single = rows_alike(input1=input1, input2=input2)
    if single:
        raise ValueError(f"input1: expected shape (N, D), got {tuple(input1.shape)}")
    check_tensors(a, label=label)
    check_real(label=label)
    if label.shape != a.shape[:1]:
        raise ValueError(
            f"label: expected one number for each of {a.shape[0]} rows, got {tuple(label.shape)}"
        )
    square = pair_sums(a, b)[0][3]
    apart = torch.relu(check_number("margin", margin) - _length(square)).square()
    y = label.to(square.dtype)
    alike = ((1 - y) * square).masked_fill(y == 1, 0.0)  # of distant pairs the square is infinite
    return reduced(0.5 * (alike + y * apart), reduction, dtype)


def kelp_ranking_loss(
    query: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 0.5,
    *,
    variant: str = "ranking",
    reduction: str = "sum",
) -> Tensor:
    r"""Compute KELP's ranking loss of knowledge paths: contrasts each query with a useful path against another.

    Query :math:`i` has :math:`\max(0, \cos(q_i, n_i) - \cos(q_i, p_i) + m)`. The variant `"mean_cosine"`, as in the
    released code, takes means over queries:
    :math:`\max(0, 1 - \overline{\cos(q, p)}) + \max(0, 1 + \overline{\cos(q, n)})`.

    Args:
        query, positive, negative: rows of one shape `(N, D)`; float32, float64, bfloat16 or float16.
        margin: :math:`m`, of the ranking alone. Default: 0.5.
        variant: `"ranking"` or `"mean_cosine"`.
        reduction: `"none"`, `"mean"` or `"sum"`, of the ranking alone. Default: `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each query, of the inputs' type (float32 for half-precision dtypes
        under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: KELP, Liu et al. 2024, https://arxiv.org/abs/2406.13862.
    """
    check_reduction(reduction)
    if variant not in ("ranking", "mean_cosine"):
        raise ValueError(f"variant: expected 'ranking' or 'mean_cosine', got {variant!r}")
    (q, p, n), dtype, single = rows_alike(query=query, positive=positive, negative=negative)
    if single:
        raise ValueError(f"query: expected shape (N, D), got {tuple(query.shape)}")
    positive_cos, negative_cos = _cosines(q, p, n, eps=0.0, floor=1e-32)
    if variant == "mean_cosine":
        return (torch.relu(1 - positive_cos.mean()) + torch.relu(1 + negative_cos.mean())).to(dtype)
    gap = negative_cos - positive_cos
    return reduced(torch.relu(gap + check_number("margin", margin)), reduction, dtype)


_hardest = HardestOp("contrastive_hardest")
_triplets = Op(
    "triplets",
    reference.metric_learning.triplets,
    lambda x, ids, margin, root: x.new_empty([2, x.shape[0]]),
    tensors=2,
    gradient_like=contiguous_like,
)


def _labelled_rows(embeddings: Tensor, labels: Tensor, distance: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check and return the rows (of length 1 for cosines), their labels, and the dtype of the result."""
    if distance not in ("euclidean", "squared", "cosine"):
        raise ValueError(f"distance: expected 'euclidean', 'squared' or 'cosine', got {distance!r}")
    (x,), dtype, single = rows_alike(embeddings=embeddings)
    if single:
        raise ValueError(f"embeddings: expected shape (B, D), got {tuple(embeddings.shape)}")
    check_tensor("labels", labels)
    check_tensors(x, labels=labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"labels: expected integers, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels: expected one for each of {x.shape[0]} rows, got shape {tuple(labels.shape)}"
        )
    if distance == "cosine":
        x = F.normalize(x.to(accumulation_dtype(x.dtype)))
    return x, labels.long(), dtype


def _centred(x: Tensor) -> Tensor:
    """Return the rows less their mean: products of an offset would hide their distances."""
    x = x.detach()
    mean = x.mean(0, dtype=torch.float64).to(x.dtype)
    return x - torch.where(mean.isfinite(), mean, 0.0)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return these rows; one that occurs several times gets its gradients in a fixed order.

    Of `index_select` they are added by atomics on CUDA, of indexing on the CPU.
    """
    return x.index_select(0, index) if runs_on_cpu(x) else x[index]


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float | None = 5.0,
    *,
    distance: str = "euclidean",
    reduction: str = "mean",
) -> Tensor:
    r"""Compute the triplet loss of each row with the farthest row of its class and the nearest of another.

    With these two distances :math:`d_p` and :math:`d_n` a row has :math:`\max(0, d_p - d_n + m)`, or without a margin
    :math:`\log(1 + e^{d_p - d_n})`. The two rows are found in tiles of the similarity matrix of the rows less their
    mean, which is not stored; their distances are then computed from differences. A row without a positive or without a
    negative has 0 and does not count in the mean.

    Args:
        embeddings: shape `(B, D)`; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        margin: :math:`m`, or None. Default: 5.
        distance: `"euclidean"`, `"squared"` (its square) or `"cosine"` (:math:`1 - \cos`).
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the embeddings' type (float32 for half-precision dtypes
        under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/1703.07737; `BatchHardTripletLoss` of sentence-transformers.
    """
    check_reduction(reduction)
    x, labels, dtype = _labelled_rows(embeddings, labels, distance)
    x = x.to(accumulation_dtype(x.dtype))
    positive, negative = _hardest.indices(_centred(x), labels).unbind(0)
    counts = (positive >= 0) & (negative >= 0)

    def distance_from(square: Tensor) -> Tensor:
        if distance == "cosine":
            return square / 2
        return square if distance == "squared" else _length(square)

    others = (_rows_at(x, i.clamp_min(0)) for i in (positive, negative))
    squares = (sums[3].masked_fill(~counts, 0.0) for sums in pair_sums(x, *others))
    positive_distance, negative_distance = (distance_from(square) for square in squares)
    gap = (positive_distance - negative_distance).masked_fill(~counts, -torch.inf)
    loss = softplus(gap) if margin is None else torch.relu(gap + check_number("margin", margin))
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
    r"""Compute the triplet loss over all triplets of a batch, as a mean over those that violate the margin.

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
        A scalar, or for `"none"` one number for each row, of the embeddings' type (float32 for half-precision dtypes
        under autocast).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options.

    Source: https://arxiv.org/abs/1703.07737; `BatchAllTripletLoss` of sentence-transformers.
    """
    check_reduction(reduction)
    x, labels, dtype = _labelled_rows(embeddings, labels, distance)
    unit = 0.5 if distance == "cosine" else 1.0  # 1 - cos is half the squared distance of unit rows
    margin = check_number("margin", margin) / unit
    x = x.to(accumulation_dtype(x.dtype))
    loss, number = _triplets((x, labels), (margin, distance == "euclidean")).unbind(0)
    loss = loss * unit
    if reduction == "none":
        return loss.to(dtype)
    return (loss.sum() / (number.sum() + 1e-16 if reduction == "mean" else 1)).to(dtype)
