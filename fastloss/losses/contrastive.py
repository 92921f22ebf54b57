"""Contrastive losses of two sets of features; the similarity matrix is never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import (
    check_floating,
    check_integer,
    check_reduction,
    check_tensors,
    number,
    positive_temperature,
    rows_of_features,
    weight_of_rows,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import log_sum_exp, softplus
from fastloss._ops.reductions import reduced
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs, SoftmaxOp, target_columns
from fastloss._ops.similarity_losses import SigmoidAttrs, SigmoidInputs, SigmoidOp

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
    r"""Compute the CLIP loss: cross-entropy of image-text similarities along rows and along columns.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle + b` pair :math:`i` has

    .. math:: \tfrac12 \Big(\log \sum_j e^{s_{ij}} - s_{ii}\Big) + \tfrac12 \Big(\log \sum_j e^{s_{ji}} - s_{ii}\Big)

    The matrix :math:`s` is computed in tiles, once for the statistics of rows and columns and once for the gradients of
    both sides: four GEMMs, and memory in proportion to the features. Maxima are exact, and the sums leave the positive
    out, so that a small loss keeps its relative precision.

    Args:
        image_features: :math:`x`, shape `(B, D)`; float32, float64, bfloat16 or float16. Not normalised unless
            `normalize` is set.
        text_features: :math:`y`, of the same shape and type; the text of image :math:`i` is row :math:`i`.
        logit_scale: :math:`a`, a number or a tensor of one; it gets a gradient if it requires one.
        logit_bias: :math:`b`; it changes nothing, and its gradient is 0. Default: none.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each pair. Default: 1.
        normalize: divide each row by its length first. Default: False.

    Returns:
        A scalar, or for `"none"` one number for each pair, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

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
    row, col, _ = contrastive_softmax(
        SoftmaxInputs(x, y, scale, target_col=target_columns(x.shape[0], x.shape[0], 0, x)),
        SoftmaxAttrs(normalize=bool(normalize), columns=True),
    )
    loss = 0.5 * (softplus(row) + softplus(col))
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
    r"""Compute the SigLIP loss: binary classification of every image-text pair as matching or not.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle + b`, and :math:`z_{ij} = 1` where the two match and :math:`-1`
    elsewhere, image :math:`i` has :math:`-\sum_j \log \sigma(z_{ij} s_{ij})`. The mean is over images, not over pairs.

    Value and gradients come from one pass over the matrix, which is never stored: three GEMMs.

    Args:
        image_features: :math:`x`, shape `(B, D)`; float32, float64, bfloat16 or float16. Not normalised unless
            `normalize` is set.
        text_features: :math:`y`, `(N, D)`, of the same type.
        logit_scale: :math:`a`, a number or a tensor of one; it gets a gradient if it requires one.
        logit_bias: :math:`b`, the same. Default: 0.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by :math:`B`, or the sum of `sample_weight`.
        sample_weight: `(B)`, a weight for each image. Default: 1.
        normalize: divide each row by its length first. Default: False.
        label_offset: the text of image :math:`i` is row :math:`i +` offset, for texts gathered from several
            processes; None: no text here belongs to any image. Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each image, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: https://arxiv.org/abs/2303.15343; `SigLipLoss` of open_clip.
    """
    mode = check_reduction(reduction)
    (x, y), dtype = rows_of_features(
        "image_features", image_features=image_features, text_features=text_features
    )
    weight = weight_of_rows(sample_weight, x)
    scale = number("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else number("logit_bias", logit_bias, x)
    target_col = None
    if label_offset is not None:
        target_col = target_columns(x.shape[0], y.shape[0], label_offset, x, "text_features")
    return _sigmoid(
        SigmoidInputs(x, y, scale, bias, target_col, weight),
        SigmoidAttrs(reduction=mode, normalize=bool(normalize), out_fp32=dtype != x.dtype),
    )


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
    r"""Compute the InfoNCE loss: contrasts each query with its positive key against all other keys.

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
        A scalar, or for `"none"` one number for each query, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

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
    """Return the queries' losses, their weights, and the dtype of the result.

    Among the keys that `softmax` sees, those given here begin at `first_key`.
    """
    if negative_mode not in ("unpaired", "paired"):
        raise ValueError(f"negative_mode: expected 'unpaired' or 'paired', got {negative_mode!r}")
    paired = negative_keys is not None and negative_mode == "paired"
    given = {"query": query, "positive_key": positive_key}
    if not paired:
        given["negative_keys"] = negative_keys
    (q, k, *negatives), dtype = rows_of_features("query", **given)
    weight = weight_of_rows(sample_weight, q)
    if negative_keys is None:
        target_col = target_columns(q.shape[0], k.shape[0], label_offset, q, "positive_key") + first_key
        row, *_ = softmax(
            SoftmaxInputs(q, k, positive_temperature(temperature, q), target_col=target_col),
            SoftmaxAttrs(normalize=bool(normalize), temperature=True),
        )
        return softplus(row), weight, dtype
    if k.shape != q.shape:
        raise ValueError(f"positive_key: expected shape {tuple(q.shape)}, got {tuple(k.shape)}")
    if check_integer("label_offset", label_offset) != 0:
        raise ValueError("label_offset: keys have an order of their own only without negative_keys")
    acc_dtype = accumulation_dtype(q.dtype)
    q, k = q.to(acc_dtype), k.to(acc_dtype)
    if normalize:
        q, k = F.normalize(q), F.normalize(k)
    temperature = positive_temperature(temperature, q).reshape(()).to(acc_dtype)
    scale = 1 / temperature
    positive = scale * (q * k).sum(1)
    if paired:
        row = _paired(q, negative_keys, scale, normalize, positive)
    else:
        negative = negatives[0].to(acc_dtype)
        if normalize:
            negative = F.normalize(negative)
        row, *_ = softmax(
            SoftmaxInputs(q, negative, temperature, base=positive),
            SoftmaxAttrs(normalize=False, temperature=True),
        )
    return softplus(row), weight, dtype


def _paired(q: Tensor, negative: Tensor, scale: Tensor, normalize: bool, positive: Tensor) -> Tensor:
    """Return the logsumexp over each query's own negatives, which are not copied, less its positive."""
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
    return log_sum_exp(scale * s - positive.unsqueeze(1), 1)
