"""Contrastive losses of two sets of features: of the similarities of all pairs, the matrix of which is never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import (
    check_floating,
    check_reduction,
    check_tensors,
    number,
    positive_temperature,
    rows_of_features,
    weight_of_rows,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.reductions import reduced
from fastloss._ops.similarity import SoftmaxOp, marks
from fastloss._ops.similarity_losses import SigmoidOp

__all__ = ["clip_loss", "info_nce", "siglip_loss"]


contrastive_softmax = SoftmaxOp("contrastive_softmax", reference.contrastive.softmax_rows)
_sigmoid = SigmoidOp("contrastive_sigmoid", reference.contrastive.sigmoid_rows)


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
    (x, y), dtype = rows_of_features(
        "image_features", image_features=image_features, text_features=text_features
    )
    if x.shape != y.shape:
        raise ValueError(f"text_features: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    weight = weight_of_rows(sample_weight, x)
    scale = number("logit_scale", logit_scale, x)
    options = (False, False, bool(normalize), False, True, True)
    mark = marks(x.shape[0], x.shape[0], 0, x)
    row, col, _ = contrastive_softmax((x, y, scale, None, mark, None, None, None), options)
    loss = 0.5 * (F.softplus(row) + F.softplus(col))
    if logit_bias is not None:
        loss = loss + 0 * number("logit_bias", logit_bias, x).reshape(()).to(loss.dtype)
    return reduced(loss, weight, reduction, dtype)


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
    r"""SigLIP's loss: binary classification of every image-text pair as matching or not.

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
    (x, y), dtype = rows_of_features(
        "image_features", image_features=image_features, text_features=text_features
    )
    weight = weight_of_rows(sample_weight, x)
    scale = number("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else number("logit_bias", logit_bias, x)
    mark = None if label_offset is None else marks(x.shape[0], y.shape[0], label_offset, x, "text_features")
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
    r"""InfoNCE: contrasts each query with its positive key against all other keys.

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
    loss, weight, dtype = info_nce_rows(
        query, positive_key, negative_keys, temperature, negative_mode, sample_weight, normalize, label_offset
    )
    return reduced(loss, weight, reduction, dtype)


def info_nce_rows(
    query, positive_key, negative_keys, temperature, negative_mode, sample_weight, normalize, label_offset,
    softmax=contrastive_softmax, first_key=0,
):  # fmt: skip
    """The queries' losses, their weights, and the type of the result; of the keys that `softmax` sees these begin
    with number `first_key`."""
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode: expected 'unpaired' or 'paired', got {negative_mode!r}")
    paired = negative_keys is not None and negative_mode == "paired"
    given = {"query": query, "positive_key": positive_key}
    if not paired:
        given["negative_keys"] = negative_keys
    (q, k, *rest), dtype = rows_of_features("query", **given)
    weight = weight_of_rows(sample_weight, q)
    if negative_keys is None:
        mark = marks(q.shape[0], k.shape[0], label_offset, q, "positive_key")
        row, *_ = contrastive_softmax(
            (q, k, positive_temperature(temperature, q), None, mark + first_key, None, None, None),
            (False, False, bool(normalize), True, True, False),
        )
        return F.softplus(row), weight, dtype
    if k.shape != q.shape:
        raise ValueError(f"positive_key: expected shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if label_offset != 0:
        raise ValueError("label_offset: keys have an order of their own only without negative_keys")
    high = accumulation_dtype(q.dtype)
    q, k = q.to(high), k.to(high)
    if normalize:
        q, k = F.normalize(q), F.normalize(k)
    temperature = positive_temperature(temperature, q).reshape(()).to(high)
    scale = 1 / temperature
    positive = scale * (q * k).sum(1)
    if paired:
        row = _paired(q, negative_keys, scale, normalize) - positive
    else:
        negative = rest[0].to(high)
        if normalize:
            negative = F.normalize(negative)
        row, *_ = contrastive_softmax(
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
