"""Contrastive losses: of the similarities of all pairs in a batch, the matrix of which is never stored."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._checks import check_floating, check_reduction, check_tensors, check_weight_type
from fastloss._linear import accumulation_type
from fastloss._registry import Draw, Loss, register
from fastloss._tiles import PairsOp, SigmoidOp, SoftmaxOp

__all__ = reference.contrastive.__all__

_formulas = reference.contrastive
_softmax = SoftmaxOp("contrastive_softmax", _formulas.softmax_rows)
_pairs = PairsOp("contrastive_pairs", _formulas.pairs)
_sigmoid = SigmoidOp("contrastive_sigmoid", _formulas.sigmoid_rows)


# ---- arguments


def _features(first: str, **tensors: Tensor | None) -> tuple[list[Tensor | None], torch.dtype | None]:
    """Checks that all are rows of the same features; under autocast in its type. And what the loss is to be in."""
    x = tensors[first]
    if not isinstance(x, Tensor):
        raise TypeError(f"{first}: expected a Tensor, got {type(x).__name__}")
    for name, t in tensors.items():
        if t is None:
            continue
        check_tensors(x, **{name: t})
        check_floating(name, t)
        if t.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, features), got {tuple(t.shape)}")
        if t.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected {x.shape[1]} features as {first} has, got {t.shape[1]}")
        if t.dtype != x.dtype:
            raise RuntimeError(f"{name}: expected the dtype of {first}, {x.dtype}, got {t.dtype}")
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors.values()), x.dtype
    low = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(low) for t in tensors.values()], (
        accumulation_type(x.dtype)
    )


def _number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """As a tensor of one number; one that is given stays what it is."""
    if isinstance(value, Tensor):
        check_tensors(like, **{name: value})
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one number, got {value.dtype} of shape {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a Tensor, got {type(value).__name__}")
    return like.new_full((), value, dtype=accumulation_type(like.dtype))


def _temperature(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"temperature: expected a positive number, got {value}")
    return _number("temperature", value, like)


def _weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_tensors(x, sample_weight=weight)
    check_weight_type("sample_weight", weight, x)
    if weight.shape != x.shape[:1]:
        raise ValueError(
            f"sample_weight: expected one number for each of {x.shape[0]} rows, got shape {tuple(weight.shape)}"
        )
    return weight


def _labels(labels: Tensor, x: Tensor, name: str = "labels") -> Tensor:
    check_tensors(x, **{name: labels})
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: expected one label for each of {x.shape[0]} rows, got shape {tuple(labels.shape)}"
        )
    return labels.long()


def _marks(rows: int, columns: int, offset: int, like: Tensor, keys: str = "") -> Tensor:
    if not isinstance(offset, int):
        raise TypeError(f"label_offset: expected an int, got {type(offset).__name__}")
    if offset < 0 or offset + rows > columns:
        raise ValueError(
            f"{keys}: expected the positives of {rows} rows from label_offset {offset} on, got {columns} rows"
        )
    return torch.arange(offset, offset + rows, device=like.device)


def _reduced(loss: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    return _formulas.reduced(loss, weight, reduction).to(dtype)


# ---- losses


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
    r"""CLIP's loss: cross-entropy of the similarities of images and texts along rows and along columns.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle + b` pair :math:`i` has

    .. math:: \tfrac12 \Big(\log \sum_j e^{s_{ij}} - s_{ii}\Big) + \tfrac12 \Big(\log \sum_j e^{s_{ji}} - s_{ii}\Big)

    The matrix :math:`s` is made in tiles, once for the statistics of rows and columns and once for the gradients
    of both sides: four products of matrices in all, and memory in proportion to the features. Maxima are exact,
    and the sums leave the positive out, so that a small loss keeps its digits.

    Args:
        image_features: :math:`x`, shape `(B, D)`; float32, float64, bfloat16 or float16. As they are given:
            normalise them before, or with `normalize`.
        text_features: :math:`y`, of the same shape and type; the text of image :math:`i` is row :math:`i`.
        logit_scale: :math:`a`, a number or a tensor of one; it gets a gradient if it requires one.
        logit_bias: :math:`b`; it changes nothing, and its gradient is 0. Default: none.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each pair. Default: 1.
        normalize: divide each row by its length first. Default: False.

    Returns:
        A scalar, or for `"none"` one number for each pair, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/2103.00020; `ClipLoss` of open_clip.
    """
    check_reduction(reduction)
    (x, y), dtype = _features("image_features", image_features=image_features, text_features=text_features)
    if x.shape != y.shape:
        raise ValueError(f"text_features: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    weight = _weight(sample_weight, x)
    scale = _number("logit_scale", logit_scale, x)
    options = (False, False, bool(normalize), False, True, True)
    mark = _marks(x.shape[0], x.shape[0], 0, x)
    row, col, _ = _softmax((x, y, scale, None, mark, None, None, None), options)
    loss = 0.5 * (F.softplus(row) + F.softplus(col))
    if logit_bias is not None:
        loss = loss + 0 * _number("logit_bias", logit_bias, x).reshape(()).to(loss.dtype)
    return _reduced(loss, weight, reduction, dtype)


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
    r"""SigLIP's loss: every pair of an image and a text is one two-class decision.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle + b`, and :math:`z_{ij} = 1` where the two belong together
    and :math:`-1` elsewhere, image :math:`i` has :math:`-\sum_j \log \sigma(z_{ij} s_{ij})`. The mean is over
    images, not over pairs.

    Value and gradients come from one walk over the matrix, which is never stored: three products of matrices.

    Args:
        image_features: :math:`x`, shape `(B, D)`; float32, float64, bfloat16 or float16. As they are given:
            normalise them before, or with `normalize`.
        text_features: :math:`y`, `(N, D)`, of the same type.
        logit_scale: :math:`a`, a number or a tensor of one; it gets a gradient if it requires one.
        logit_bias: :math:`b`, the same. Default: 0.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by :math:`B`, or the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each image. Default: 1.
        normalize: divide each row by its length first. Default: False.
        label_offset: the text of image :math:`i` is row :math:`i +` offset, for texts gathered from several
            processes; None: no text here belongs to any image. Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each image, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/2303.15343; `SigLipLoss` of open_clip.
    """
    mode = check_reduction(reduction)
    (x, y), dtype = _features("image_features", image_features=image_features, text_features=text_features)
    weight = _weight(sample_weight, x)
    scale = _number("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else _number("logit_bias", logit_bias, x)
    mark = None if label_offset is None else _marks(x.shape[0], y.shape[0], label_offset, x, "text_features")
    return _sigmoid((x, y, scale, bias, mark, None, None, weight), (mode, bool(normalize), dtype != x.dtype))


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
    r"""InfoNCE: each query is to be nearer to its key than to all others.

    With :math:`s = \cos / \tau` query :math:`i` has

    .. math:: -\log \frac{e^{s(q_i, k_i)}}{e^{s(q_i, k_i)} + \sum_j e^{s(q_i, n_j)}}

    where the negatives :math:`n` are the other queries' keys, or those given. With temperature 0.05 and two
    dropout views this is SimCSE's loss.

    Args:
        query: shape `(B, D)`; float32, float64, bfloat16 or float16.
        positive_key: `(B, D)`, of the same type; without `negative_keys` it may have more rows.
        negative_keys: `(M, D)`, the same for all queries; or with `negative_mode="paired"` `(B, M, D)`, some for
            each. Default: the other rows of `positive_key`.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of `sample_weight`.
        negative_mode: `"unpaired"` or `"paired"`.
        sample_weight: `(B)`, a weight for each query. Default: 1.
        normalize: divide each row by its length first; False: :math:`s = \langle q, k \rangle / \tau`.
        label_offset: the key of query :math:`i` is row :math:`i +` offset, for keys gathered from several
            processes; without `negative_keys`. Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each query, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/1807.03748; `info_nce` of info-nce-pytorch.
    """
    check_reduction(reduction)
    rows = _info_nce_rows(
        query, positive_key, negative_keys, temperature, negative_mode, sample_weight, normalize, label_offset
    )
    return _reduced(*rows[:2], reduction, rows[2])


def _info_nce_rows(
    query, positive_key, negative_keys, temperature, negative_mode, sample_weight, normalize, label_offset,
    softmax=_softmax, first_key=0,
):  # fmt: skip
    """The queries' losses, their weights, and the type of the result; of the keys that `softmax` sees these begin
    with number `first_key`."""
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode: expected 'unpaired' or 'paired', got {negative_mode!r}")
    paired = negative_keys is not None and negative_mode == "paired"
    given = {"query": query, "positive_key": positive_key}
    if not paired:
        given["negative_keys"] = negative_keys
    (q, k, *rest), dtype = _features("query", **given)
    weight = _weight(sample_weight, q)
    if negative_keys is None:
        mark = _marks(q.shape[0], k.shape[0], label_offset, q, "positive_key")
        row, *_ = softmax(
            (q, k, _temperature(temperature, q), None, mark + first_key, None, None, None),
            (False, False, bool(normalize), True, True, False),
        )
        return F.softplus(row), weight, dtype
    if k.shape != q.shape:
        raise ValueError(f"positive_key: expected shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if label_offset != 0:
        raise ValueError("label_offset: keys have an order of their own only without negative_keys")
    high = accumulation_type(q.dtype)
    q, k = q.to(high), k.to(high)
    if normalize:
        q, k = F.normalize(q), F.normalize(k)
    temperature = _temperature(temperature, q).reshape(()).to(high)
    scale = 1 / temperature
    positive = scale * (q * k).sum(1)
    if paired:
        row = _paired(q, negative_keys, scale, normalize) - positive
    else:
        negative = rest[0].to(high)
        if normalize:
            negative = F.normalize(negative)
        row, *_ = softmax(
            (q, negative, temperature, positive, None, None, None, None),
            (False, False, False, True, True, False),
        )
    return F.softplus(row), weight, dtype


def _paired(q: Tensor, negative: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    """log sum exp over each query's own negatives, which are read where they lie."""
    check_tensors(q, negative_keys=negative)
    check_floating("negative_keys", negative)
    if negative.dim() != 3 or negative.shape[::2] != q.shape:
        raise ValueError(
            f"negative_keys: expected shape {(q.shape[0], 'M', q.shape[1])}, got {tuple(negative.shape)}"
        )
    negative = negative.to(q.dtype)
    s = (negative @ q.unsqueeze(-1)).squeeze(-1)
    if normalize:
        s = s / torch.linalg.vector_norm(negative, dim=-1).clamp_min(1e-12)
    return (scale * s).logsumexp(1)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Supervised contrastive loss: rows of one class are to be nearer to each other than to the rest.

    With :math:`s = \cos / \tau` and the other rows :math:`P_i` of its class, row :math:`i` has

    .. math:: \log \sum_{a \ne i} e^{s_{ia}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip}

    A row that is alone in its class has 0 and does not count in the mean; if all are, the loss is 0.

    Args:
        features: shape `(B, D)`, any length of rows; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/2004.11362; `SupConLoss` of pytorch-metric-learning.
    """
    check_reduction(reduction)
    (x,), dtype = _features("features", features=features)
    labels = _labels(labels, x)
    others = _class_sizes(labels) - 1
    share = torch.where(others > 0, 1 / others.clamp_min(1).to(accumulation_type(x.dtype)), 0.0)
    mark = torch.arange(x.shape[0], device=x.device)
    row, *_ = _softmax(
        (x, None, _temperature(temperature, x), None, mark, labels, None, share),
        (True, True, True, True, True, False),
    )
    loss = row.masked_fill(others == 0, 0.0)
    return _formulas._mean_over(loss, others > 0, reduction).to(dtype)


def _class_sizes(labels: Tensor) -> Tensor:
    """Of each row, how many rows have its label."""
    order = labels.sort().values
    return torch.searchsorted(order, labels, right=True) - torch.searchsorted(order, labels)


def pair_nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""NT-Xent over all positive pairs of a labelled batch, as pytorch-metric-learning defines it.

    With :math:`s = \cos / \tau`, the other rows :math:`P_i` of its class and the rows :math:`N_i` of other
    classes, row :math:`i` has

    .. math:: \sum_{p \in P_i} -\log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n \in N_i} e^{s_{in}}}

    The mean is over pairs :math:`(i, p)`, and 0 if there is none. Work grows with :math:`B^2`, not with the
    number of pairs times :math:`B`.

    Args:
        embeddings: shape `(B, D)`, any length of rows; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, the sum over each row's pairs, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` one number for each row, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/2002.05709 over the pairs of classes, as `NTXentLoss` of pytorch-metric-learning;
    without the constant that bounds its logarithm.
    """
    check_reduction(reduction)
    (x,), dtype = _features("embeddings", embeddings=embeddings)
    labels = _labels(labels, x)
    mark = torch.arange(x.shape[0], device=x.device)
    loss = _pairs((x, None, _temperature(temperature, x), mark, labels, None), (True, True))
    return _formulas._mean_over(loss, _class_sizes(labels) - 1, reduction).to(dtype)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""SimCLR's NT-Xent: the two views of a sample are to be nearer to each other than to all others.

    With the :math:`2 B` rows :math:`z = (z_1, z_2)`, :math:`s = \cos / \tau` and the other view :math:`p_i`,
    row :math:`i` has :math:`\log \sum_{a \ne i} e^{s_{ia}} - s_{i p_i}`.

    Args:
        z1, z2: the views, of one shape `(B, D)`, any length of rows; float32, float64, bfloat16 or float16.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, `"mean"` or `"sum"`.

    Returns:
        A scalar, or for `"none"` the losses of the rows of `z1` and then of `z2`, `(2 B)`, of the features' type
        (float32 under autocast, where the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes and types other than these.

    Source: https://arxiv.org/abs/2002.05709.
    """
    check_reduction(reduction)
    (x, y), dtype = _features("z1", z1=z1, z2=z2)
    if x.shape != y.shape:
        raise ValueError(f"z2: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    rows = torch.arange(2 * x.shape[0], device=x.device)
    row, *_ = _softmax(
        (
            torch.cat([x, y]),
            None,
            _temperature(temperature, x),
            None,
            rows.roll(x.shape[0]),
            rows,
            None,
            None,
        ),
        (False, False, True, True, True, False),
    )
    return _reduced(F.softplus(row), None, reduction, dtype)


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
) -> Tensor:
    r"""Ranks each query's document above all others of the batch, hard negatives among them.

    With :math:`s = a \cos` query :math:`i` has :math:`\log \sum e^{s} - s(q_i, d_i)`, where the sum runs over

    ================  ============================================================================================
    query_to_doc      :math:`s(q_i, d_j)` for all documents :math:`j`, hard negatives too; always there
    doc_to_query      :math:`s(q_j, d_i)` for all queries :math:`j`
    query_to_query    :math:`s(q_i, q_j)` for all others
    doc_to_doc        :math:`s(d_i, d_j)` for all documents that do not belong to query :math:`i`
    ================  ============================================================================================

    of the chosen directions together (`"joint"`), or over each of them, and the mean of these losses is taken
    (`"per_direction"`). No matrix of similarities is stored.

    Args:
        anchor: queries, shape `(B, D)`, any length of rows; float32, float64, bfloat16 or float16.
        positive: the queries' documents, of the same shape and type.
        negatives: hard negatives `(K, B, D)`, K for each query, or `(B, D)`; for all queries they are documents
            that are wrong. Default: none.
        scale: :math:`a`, a number or a tensor of one, which gets a gradient if it requires one. Default: 20.
        directions: which ones, `"query_to_doc"` first.
        partition_mode: `"joint"` or `"per_direction"`; the latter only with directions that have a positive.
        ids: `(B)` integers; pairs with the same id are no negatives of each other. Default: all differ.
        normalize: divide each row by its length first; False: :math:`s = a \langle q, d \rangle`.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each query. Default: 1.

    Returns:
        A scalar, or for `"none"` one number for each query, of the features' type (float32 under autocast, where
        the products are done in the autocast type).

    Raises:
        ValueError, RuntimeError, TypeError: for shapes, types and options other than these.

    Source: https://arxiv.org/abs/1705.00652, GTE https://arxiv.org/abs/2308.03281;
    `MultipleNegativesRankingLoss` of sentence-transformers, without its hardness weights.
    """
    check_reduction(reduction)
    rows = _ranking_rows(
        anchor, positive, negatives, scale, directions, partition_mode, ids, normalize, sample_weight
    )
    return _reduced(*rows[:2], reduction, rows[2])


def _ranking_rows(
    anchor, positive, negatives, scale, directions, partition_mode, ids, normalize, sample_weight,
    softmax=_softmax, first_query=0, first_doc=0,
):  # fmt: skip
    """The queries' losses, their weights, and the type of the result; of the queries and documents that `softmax`
    sees these begin with the numbers `first_query` and `first_doc`."""
    (q, d), dtype = _features("anchor", anchor=anchor, positive=positive)
    if d.shape != q.shape:
        raise ValueError(f"positive: expected shape {tuple(q.shape)}, got {tuple(d.shape)}")
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
    weight = _weight(sample_weight, q)
    rows = q.shape[0]
    own = torch.arange(first_query, first_query + rows, device=q.device)
    same = own if ids is None else _labels(ids, q, "ids")
    docs, of_query, doc_ids = d, own, same
    if negatives is not None:
        check_tensors(q, negatives=negatives)
        if negatives.dtype != anchor.dtype:
            raise RuntimeError(
                f"negatives: expected the dtype of anchor, {anchor.dtype}, got {negatives.dtype}"
            )
        hard = negatives.unsqueeze(0) if negatives.dim() == 2 else negatives
        if hard.dim() != 3 or hard.shape[1:] != q.shape:
            raise ValueError(f"negatives: expected shape {('K', *q.shape)}, got {tuple(negatives.shape)}")
        (hard,), _ = _features("negatives", negatives=hard.reshape(-1, q.shape[1]))
        docs = torch.cat([d, hard.to(d.dtype)])
        of_query = own.repeat(1 + hard.shape[0] // max(rows, 1))
        doc_ids = torch.cat([same, torch.full_like(of_query[rows:], torch.iinfo(torch.int64).min)])
    scale = _number("scale", scale, q)
    if set(directions) & set(DIRECTIONS[2:]):  # several gradients of it, to be added up unrounded
        scale = scale.reshape(()).to(accumulation_type(q.dtype))
    options = (False, False, bool(normalize), False, True)
    known = (None, None) if ids is None else (same, doc_ids)
    both = "doc_to_query" in directions
    mark = own + (first_doc - first_query)
    row, col, first = softmax((q, docs, scale, None, mark, *known, None), (*options, both))
    if partition_mode == "per_direction":
        loss = F.softplus(row) if not both else 0.5 * (F.softplus(row) + F.softplus(col))
        return loss, weight, dtype
    terms = [row, col] if both else [row]
    if "query_to_query" in directions:
        terms.append(softmax((q, None, scale, first, None, same, None, None), (*options, False))[0])
    if "doc_to_doc" in directions:
        if ids is not None:  # of one query or of one id, which are not both expressed by one number for a row
            raise ValueError("ids: not with the direction doc_to_doc")
        terms.append(softmax((d, docs, scale, first, None, own, of_query, None), (*options, False))[0])
    others = torch.stack(terms).logsumexp(0) if len(terms) > 1 else row
    # with both directions the positive stands in the sum twice
    loss = F.softplus(others - math.log(2)) + math.log(2) if both else F.softplus(others)
    return loss, weight, dtype


# ---- registry


def _two(first: str, second: str, draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Features of length about 1."""
    rows, features = shape
    size = features**-0.5
    return {first: draw.normal(rows, features, scale=size), second: draw.normal(rows, features, scale=size)}


def _images_and_texts(draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    scale = draw.uniform(low=4.0, high=6.0)
    return _two("image_features", "text_features", draw, shape) | {"logit_scale": scale}


def _labelled(name: str, draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: draw.normal(*shape), "labels": draw.index(max(shape[0] // 3, 2), shape[0])}


def _sample_weight(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(shape[0], low=0.0, high=2.0)


def _drawn_temperature(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(low=0.2, high=0.4)


SHAPES = ((5, 7), (1, 3), (23, 16), (4, 33), (210, 40))


def _register(name: str, **entry) -> None:
    function = globals()[name]
    register(
        Loss(
            name=name,
            family="contrastive",
            function=function,
            reference=getattr(reference, name),
            multiplies=True,
            shapes=SHAPES,
            traffic=lambda shape, itemsize, backward: (4 if backward else 2) * shape[0] * shape[1] * itemsize,
            **entry,
        )
    )


_register(
    "clip_loss",
    replaces="open_clip.ClipLoss",
    inputs=_images_and_texts,
    wrt=("image_features", "text_features", "logit_scale"),
    forward_arguments=("image_features", "text_features", "logit_scale", "logit_bias", "sample_weight"),
    cases={
        "plain": {},
        "number": {"logit_scale": 10.0, "reduction": "sum"},
        "everything": {"normalize": True, "reduction": "none", "sample_weight": _sample_weight},
    },
    bench_shape=(8192, 256),
)
_register(
    "siglip_loss",
    replaces="open_clip.SigLipLoss",
    inputs=_images_and_texts,
    wrt=("image_features", "text_features", "logit_scale", "logit_bias"),
    forward_arguments=("image_features", "text_features", "logit_scale", "logit_bias", "sample_weight"),
    cases={
        "plain": {},
        "bias": {"logit_bias": lambda d, s: d.uniform(low=-5.0, high=-3.0)},
        "gathered": {
            "text_features": lambda d, s: d.normal(s[0] + 3, s[1], scale=s[1] ** -0.5),
            "label_offset": 2,
            "reduction": "none",
        },
        "everything": {
            "logit_bias": lambda d, s: d.uniform(low=-5.0, high=-3.0),
            "normalize": True,
            "reduction": "sum",
            "sample_weight": _sample_weight,
        },
    },
    bench_shape=(4096, 512),
)
_register(
    "info_nce",
    replaces="info_nce.info_nce",
    inputs=lambda d, s: _two("query", "positive_key", d, s),
    wrt=("query", "positive_key", "negative_keys", "temperature"),
    forward_arguments=("query", "positive_key", "negative_keys", "sample_weight"),
    cases={
        "plain": {"temperature": 0.2},
        "features as they are": {"temperature": _drawn_temperature, "normalize": False, "reduction": "none"},
        "unpaired": {
            "negative_keys": lambda d, s: d.normal(2 * s[0] + 1, s[1]),
            "temperature": _drawn_temperature,
        },
        "paired": {
            "negative_keys": lambda d, s: d.normal(s[0], 4, s[1]),
            "negative_mode": "paired",
            "temperature": 0.2,
        },
        "everything": {
            "temperature": _drawn_temperature,
            "reduction": "sum",
            "sample_weight": _sample_weight,
        },
    },
    bench_shape=(4096, 512),
)
_register(
    "nt_xent_loss",
    inputs=lambda d, s: _two("z1", "z2", d, s),
    wrt=("z1", "z2", "temperature"),
    forward_arguments=("z1", "z2"),
    cases={"plain": {}, "everything": {"temperature": _drawn_temperature, "reduction": "none"}},
    bench_shape=(2048, 128),
)
_register(
    "sup_con_loss",
    replaces="pytorch_metric_learning.losses.SupConLoss",
    inputs=lambda d, s: _labelled("features", d, s),
    wrt=("features", "temperature"),
    forward_arguments=("features", "labels"),
    cases={
        "plain": {"temperature": 0.2},
        "everything": {"temperature": _drawn_temperature, "reduction": "none"},
    },
    bench_shape=(2048, 128),
)
_register(
    "pair_nt_xent_loss",
    replaces="pytorch_metric_learning.losses.NTXentLoss",
    inputs=lambda d, s: _labelled("embeddings", d, s),
    wrt=("embeddings", "temperature"),
    forward_arguments=("embeddings", "labels"),
    cases={
        "plain": {"temperature": 0.2},
        "everything": {"temperature": _drawn_temperature, "reduction": "none"},
    },
    bench_shape=(256, 128),
)
_register(
    "multiple_negatives_ranking_loss",
    replaces="sentence_transformers.losses.MultipleNegativesRankingLoss",
    inputs=lambda d, s: _two("anchor", "positive", d, s),
    wrt=("anchor", "positive", "negatives", "scale"),
    forward_arguments=("anchor", "positive", "negatives", "sample_weight"),
    cases={
        "plain": {"scale": 5.0},
        "hard negatives": {
            "negatives": lambda d, s: d.normal(2, *s),
            "scale": lambda d, s: d.uniform(low=4.0, high=6.0),
            "ids": lambda d, s: d.index(3 * s[0], s[0]),
        },
        "four directions": {
            "negatives": lambda d, s: d.normal(*s),
            "directions": DIRECTIONS,
            "scale": lambda d, s: d.uniform(low=4.0, high=6.0),
            "sample_weight": _sample_weight,
            "reduction": "sum",
        },
        "everything": {
            "negatives": lambda d, s: d.normal(2, *s),
            "directions": DIRECTIONS[:2],
            "partition_mode": "per_direction",
            "scale": lambda d, s: d.uniform(low=4.0, high=6.0),
            "sample_weight": _sample_weight,
            "reduction": "none",
        },
    },
    bench_shape=(2048, 384),
)
