"""Contrastive losses of a batch with itself: the positives of a row are the other rows of its class, or a view."""

from __future__ import annotations

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import (
    check_integer,
    check_reduction,
    labels_of_rows,
    positive_temperature,
    rows_of_features,
    weight_of_rows,
)
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.exponentials import softplus
from fastloss._ops.reductions import reduced, reduced_over
from fastloss._ops.similarity import SoftmaxAttrs, SoftmaxInputs, target_columns
from fastloss._ops.similarity_losses import PairsAttrs, PairsInputs, PairsOp
from fastloss.losses.contrastive import contrastive_softmax

__all__ = ["nt_xent_loss", "pair_nt_xent_loss", "sup_con_loss"]


_pairs = PairsOp("contrastive_pairs", reference.contrastive.pairs)


def _among(
    x: Tensor, keys: Tensor | None, labels: Tensor, key_labels: Tensor | None, offset: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return labels of rows and of keys, the key that a row is itself, and how many others have its label."""
    labels = labels_of_rows(labels, x)
    if keys is None:
        if key_labels is not None:
            raise ValueError("key_labels: only with keys")
        if offset is None or check_integer("label_offset", offset) != 0:
            raise ValueError("label_offset: only with keys")
        itself = target_columns(x.shape[0], x.shape[0], 0, x)
        return labels, None, itself, class_sizes(labels, labels) - 1
    key_labels = labels_of_rows(key_labels, keys, "key_labels")
    found = class_sizes(labels, key_labels)
    if offset is None:
        return labels, key_labels, None, found
    itself = target_columns(x.shape[0], keys.shape[0], offset, x, "keys")
    return labels, key_labels, itself, found - (key_labels[itself] == labels).long()


def class_sizes(labels: Tensor, among: Tensor) -> Tensor:
    """Return for each label how often it occurs in `among`."""
    order, labels = among.sort().values, labels.contiguous()
    return torch.searchsorted(order, labels, right=True) - torch.searchsorted(order, labels)


def sup_con_loss(
    features: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    label_offset: int | None = 0,
) -> Tensor:
    r"""Compute the supervised contrastive loss: contrasts each row with the rows of its class against all others.

    With :math:`s = \cos / \tau` and the other rows :math:`P_i` of its class, row :math:`i` has

    .. math:: \log \sum_{a \ne i} e^{s_{ia}} - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip}

    A row that is alone in its class has 0 and does not count in the mean; if all are, the loss is 0.

    Args:
        features: shape `(B, D)`; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is over rows that are not alone, divided by the sum of
            their `sample_weight`.
        sample_weight: `(B)`, a weight for each row. Default: 1.
        normalize: divide each row by its length first; False: :math:`s = \langle x_i, x_a \rangle / \tau`.
        keys: `(N, D)`, of the features' type: the rows to compare with instead of the batch, such as the rows of
            several processes or of earlier batches. Default: `features`.
        key_labels: `(N)` integers, with `keys`.
        label_offset: row :math:`i` is itself the key :math:`i +` offset; None: rows are not among the keys.
            Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each row, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: https://arxiv.org/abs/2004.11362; `SupConLoss` of pytorch-metric-learning.
    """
    check_reduction(reduction)
    (x, y), dtype = rows_of_features("features", features=features, keys=keys)
    weight = weight_of_rows(sample_weight, x)
    labels, key_labels, itself, others = _among(x, y, labels, key_labels, label_offset)
    inv_num_positives = torch.where(others > 0, 1 / others.clamp_min(1).to(accumulation_dtype(x.dtype)), 0.0)
    row, *_ = contrastive_softmax(
        SoftmaxInputs(
            x, y, positive_temperature(temperature, x), target_col=itself, row_ids=labels, col_ids=key_labels,
            inv_num_positives=inv_num_positives,
        ),
        SoftmaxAttrs(
            normalize=bool(normalize), temperature=True, labels_are_positives=True, positives_in_denominator=True
        ),
    )  # fmt: skip
    loss = row.masked_fill(others == 0, 0.0)
    return reduced_over(loss, others > 0, weight, reduction, dtype)


def pair_nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    label_offset: int | None = 0,
) -> Tensor:
    r"""Compute NT-Xent over all positive pairs of a labelled batch, as pytorch-metric-learning defines it.

    With :math:`s = \cos / \tau`, the other rows :math:`P_i` of its class and the rows :math:`N_i` of other
    classes, row :math:`i` has

    .. math:: \sum_{p \in P_i} -\log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{n \in N_i} e^{s_{in}}}

    The mean is over pairs :math:`(i, p)`, and 0 if there is none. Work grows with :math:`B^2`, not with the
    number of pairs times :math:`B`.

    Args:
        embeddings: shape `(B, D)`; float32, float64, bfloat16 or float16.
        labels: `(B)` integers.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, the sum over each row's pairs, `"mean"` or `"sum"`. The mean is divided by the sum over
            pairs of `sample_weight`.
        sample_weight: `(B)`, a weight for the pairs of each row. Default: 1.
        normalize: divide each row by its length first; False: :math:`s_{ij} = \langle x_i, x_j \rangle / \tau`.
        keys: `(N, D)`, of the embeddings' type: the rows to pair with instead of the batch, such as the rows of several
            processes or of earlier batches. Default: `embeddings`.
        key_labels: `(N)` integers, with `keys`.
        label_offset: row :math:`i` is itself the key :math:`i +` offset; None: rows are not among the keys.
            Default: 0.

    Returns:
        A scalar, or for `"none"` one number for each row, of the features' type (float32 under autocast, where the
        GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: https://arxiv.org/abs/2002.05709 over the pairs of classes, as `NTXentLoss` of pytorch-metric-learning;
    without the constant that bounds its logarithm.
    """
    check_reduction(reduction)
    (x, y), dtype = rows_of_features("embeddings", embeddings=embeddings, keys=keys)
    weight = weight_of_rows(sample_weight, x)
    labels, key_labels, itself, others = _among(x, y, labels, key_labels, label_offset)
    loss = _pairs(
        PairsInputs(x, y, positive_temperature(temperature, x), itself, labels, key_labels),
        PairsAttrs(normalize=bool(normalize), temperature=True),
    )
    return reduced_over(loss, others, weight, reduction, dtype)


def nt_xent_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""Compute SimCLR's NT-Xent loss: contrasts the two views of each sample against all other samples.

    With the :math:`2 B` rows :math:`z = (z_1, z_2)`, :math:`s = \cos / \tau` and the other view :math:`p_i`,
    row :math:`i` has :math:`\log \sum_{a \ne i} e^{s_{ia}} - s_{i p_i}`.

    Args:
        z1, z2: the views, of one shape `(B, D)`; float32, float64, bfloat16 or float16.
        temperature: :math:`\tau > 0`, a number or a tensor of one, which gets a gradient if it requires one.
        reduction: `"none"`, `"mean"` or `"sum"`. The mean is divided by the sum of the rows' `sample_weight`.
        sample_weight: `(B)`, a weight for each sample, that both its views have. Default: 1.
        normalize: divide each row by its length first; False: :math:`s_{ij} = \langle z_i, z_j \rangle / \tau`.

    Returns:
        A scalar, or for `"none"` the losses of the rows of `z1` and then of `z2`, `(2 B)`, of the features' type
        (float32 under autocast, where the GEMMs run in the autocast dtype).

    Raises:
        ValueError, RuntimeError, TypeError: for unsupported shapes and types.

    Source: https://arxiv.org/abs/2002.05709.
    """
    check_reduction(reduction)
    (x, y), dtype = rows_of_features("z1", z1=z1, z2=z2)
    if x.shape != y.shape:
        raise ValueError(f"z2: expected shape {tuple(x.shape)}, got {tuple(y.shape)}")
    weight = weight_of_rows(sample_weight, x)
    rows = torch.arange(2 * x.shape[0], device=x.device)
    temperature = positive_temperature(temperature, x)
    row, *_ = contrastive_softmax(
        SoftmaxInputs(torch.cat([x, y]), None, temperature, target_col=rows.roll(x.shape[0]), row_ids=rows),
        SoftmaxAttrs(normalize=bool(normalize), temperature=True),
    )
    return reduced(softplus(row), None if weight is None else weight.repeat(2), reduction, dtype)
