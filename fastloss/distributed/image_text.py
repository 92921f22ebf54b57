"""Contrastive losses of images and texts whose pairs are distributed over ranks.

A rank computes the similarities of its own rows to the columns of all ranks, and holds no more than its rows and the
columns' features. Apart from features and their gradients, the ranks exchange a few numbers per row. Every rank gets
the same loss, and for an upstream gradient that is the same on every rank the gradient of its own features, and all of
that of scale and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastloss._ops.autograd import REDUCTIONS
from fastloss._ops.checks import check_reduction, rows_of_features, weight_of_rows
from fastloss._ops.checks import number as number_of
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import softplus
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs, target_columns
from fastloss.distributed.call import Call
from fastloss.distributed.similarities import SigmoidInputs, SigmoidOptions, sigmoid

__all__ = ["clip_loss", "siglip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = False,
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute the CLIP loss over the pairs of all ranks: `fastloss.functional.clip_loss` of their concatenation.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle`, over the images and texts of all ranks, pair :math:`i` has

    .. math:: \tfrac12 \Big(\log \sum_j e^{s_{ij}} - s_{ii}\Big) + \tfrac12 \Big(\log \sum_j e^{s_{ji}} - s_{ii}\Big)

    A rank with b of all B pairs runs four GEMMs of b x D and D x B. It passes over its rows once for statistics of rows
    and for its part of those of columns, which the columns' owners merge, and once for the gradients, of which those of
    texts go to their owners. No matrix of size B x B or b x B is stored.

    Sums over ranks are taken in the order of ranks, or along the ring, regardless of the order of arrival: results are
    bitwise reproducible. One rank gives the bits of `fastloss.functional`. The number of ranks changes the order of
    sums, and so only the rounding: with unit :math:`u` (2^-24, in float64 2^-53), before the result is rounded to the
    features' type, a pair's loss by at most :math:`u (2 B + 8 \max |s| + 16)` of itself, and a gradient by that
    fraction of the sum of the magnitudes of its terms; on CUDA, where GEMMs of other sizes may sum in another order, by
    their rounding too.

    Args:
        image_features: :math:`x` of this rank, shape `(b, D)`; float32, float64, bfloat16 or float16. The number of
            rows may differ between ranks (but see `rows_per_rank`), D and the type may not.
        text_features: :math:`y` of this rank, of the same shape and type.
        logit_scale: :math:`a`, the same on every rank: a number or a tensor of one.
        logit_bias: changes nothing, and its gradient is 0. Default: none.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks. The mean is divided by the sum of all ranks'
            `sample_weight`.
        sample_weight: `(b)`, a weight for each pair of this rank. Default: 1.
        normalize: divide each row by its length first. Default: False.
        group: a process group. Default: all processes.
        exchange: `"gather"`: each rank holds the texts of all ranks, memory O(B D). `"ring"`: ranks pass them
            around, while each works on those that it has: memory O(b D), and more, smaller messages. Default:
            `"gather"`.
        for_ddp: whether the features' gradients are multiplied by the number of ranks. DistributedDataParallel and FSDP
            divide the sum of the ranks' parameter gradients by their number; but a rank's gradient comes from its own
            features alone, so that their sum is the gradient, not their mean. The gradient of scale and bias, which
            each rank has all of, stays as it is: its mean is itself. True where parameters' gradients are averaged,
            False for the gradients of the loss, where they are added up. Has to be given for more than one rank.
        rows_per_rank: how many rows each rank has. Default: on the CPU ranks tell each other; on CUDA, where the
            host would have to wait for that, each has as many as this one.

    Returns:
        A scalar, the same bits on every rank, or for `"none"` one number for each pair of this rank, of the
        features' type (float32 under autocast). It can be differentiated once, by all ranks together.

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes, types and options; and on the CPU for those that
            differ between ranks, where they must not.

    Source: https://arxiv.org/abs/2103.00020; `ClipLoss` of open_clip; for the ring Inf-CL,
    https://arxiv.org/abs/2410.17243.
    """
    check_reduction(reduction)
    (x, y), dtype = rows_of_features(
        "image_features", image_features=image_features, text_features=text_features
    )
    if x.shape != y.shape:
        raise ValueError(f"text_features: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    weight = weight_of_rows(sample_weight, x)
    scale = number_of("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else number_of("logit_bias", logit_bias, x)
    call = Call(
        "clip_loss", x, group, exchange, for_ddp, rows_per_rank, reduction, image_features=image_features,
        text_features=text_features, logit_scale=logit_scale, logit_bias=logit_bias, sample_weight=sample_weight,
        normalize=bool(normalize),
    )  # fmt: skip
    rows = call.rows
    x, y = call.features(x, y)
    target_col = torch.arange(rows.local.start, rows.local.stop, device=x.device)
    row, col, _ = call.softmax(
        SoftmaxInputs(x, y, call.number(scale), target_col=target_col),
        SoftmaxAttrs(normalize=bool(normalize), columns=True),
        rows,
    )
    loss = 0.5 * (softplus(row) + softplus(col))
    if bias is not None:
        loss = loss + 0 * call.number(bias).reshape(()).to(loss.dtype)
    return call.reduced(loss, weight, dtype, rows)


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
    group: Any = None,
    exchange: str = "gather",
    for_ddp: bool | None = None,
    rows_per_rank: Sequence[int] | None = None,
) -> Tensor:
    r"""Compute the SigLIP loss over the images and texts of all ranks: `fastloss.functional.siglip_loss` of them.

    With :math:`s_{ij} = a \langle x_i, y_j \rangle + b`, and :math:`z_{ij} = 1` where the two match and :math:`-1`
    elsewhere, image :math:`i` has :math:`-\sum_j \log \sigma(z_{ij} s_{ij})`, over the texts of all ranks.

    One pass, three GEMMs of this rank's rows and all columns. The sums and their rounding are those of `clip_loss`
    here, for B texts. On the CPU with `exchange="gather"` the loss has the same bits for any number of ranks.

    Args:
        image_features: :math:`x` of this rank, shape `(b, D)`; float32, float64, bfloat16 or float16.
        text_features: :math:`y` of this rank, `(n, D)`, of the same type.
        logit_scale, logit_bias: :math:`a, b`, the same on every rank: numbers or tensors of one.
        reduction: `"none"`, `"mean"` or `"sum"`: over all ranks' images.
        sample_weight: `(b)`, a weight for each image of this rank. Default: 1.
        normalize: divide each row by its length first. Default: False.
        label_offset: the text of this rank's image i is this rank's row i + offset; None: no text belongs to any
            image. Default: 0.
        group, exchange, for_ddp, rows_per_rank: as of `clip_loss` here; on CUDA n - b is the same on every rank.

    Returns:
        As of `clip_loss` here.

    Raises:
        ValueError, RuntimeError, TypeError: as of `clip_loss` here.

    Source: https://arxiv.org/abs/2303.15343; `SigLipLoss` of open_clip.
    """
    mode = check_reduction(reduction)
    (x, y), dtype = rows_of_features(
        "image_features", image_features=image_features, text_features=text_features
    )
    weight = weight_of_rows(sample_weight, x)
    scale = number_of("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else number_of("logit_bias", logit_bias, x)
    target_col = None
    if label_offset is not None:
        target_col = target_columns(x.shape[0], y.shape[0], label_offset, x, "text_features")
    call = Call(
        "siglip_loss", x, group, exchange, for_ddp, rows_per_rank, reduction, y.shape[0],
        image_features=image_features, text_features=text_features, logit_scale=logit_scale, logit_bias=logit_bias,
        sample_weight=sample_weight, normalize=bool(normalize), label_offset=label_offset is None,
    )  # fmt: skip
    x, y = call.features(x, y)
    target_col = None if target_col is None else target_col + call.columns.begin
    inputs = SigmoidInputs(
        x, y, call.number(scale), None if bias is None else call.number(bias), target_col, None, None
    )
    acc_dtype = accumulation_dtype(x.dtype)
    options = SigmoidOptions(
        reduction=mode, normalize=bool(normalize), out_dtype=dtype if mode else acc_dtype, rows=call.rows,
        columns=call.columns, exchange=call.exchange,
    )  # fmt: skip
    if mode == REDUCTIONS["none"]:
        return call.reduced(sigmoid(inputs, options), weight, dtype, call.rows)
    if weight is not None:
        weight = weight.to(acc_dtype)
        inputs = inputs._replace(weight=weight, weight_of_all=call.rows.gathered(weight.detach()))
    return sigmoid(inputs, options)
