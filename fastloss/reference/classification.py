"""Token classification losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction

from fastloss.reference.options import reduced, weighed

__all__ = ["cross_entropy", "poly1_cross_entropy", "softmax_focal_loss"]


def logits_of(input: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    z = input * logit_scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def one_hot(index: Tensor, classes: int) -> Tensor:
    """Return a bool for each class, along a new last dimension; it can be traced, as values are not read."""
    return index.unsqueeze(-1) == torch.arange(classes, device=index.device)


def nll_of(z: Tensor, one_hot: Tensor, dim: int) -> Tensor:
    """Return -log softmax(z) of the class of `one_hot`: -logsigmoid(its logit - lse of the others).

    Keeps its relative precision however far the class wins, where lse - logit would cancel.
    """
    alone = (one_hot | (z == -torch.inf)).all(dim)  # nothing to lose against: the loss is exactly 0
    others = torch.where(alone.unsqueeze(dim), 0.0, z.masked_fill(one_hot, -torch.inf)).logsumexp(dim)
    own = torch.where(one_hot, z, 0.0).sum(dim)
    return torch.where(alone, (own - own).nan_to_num(nan=torch.nan), -F.logsigmoid(own - others))


def without_unweighted(x: Tensor, unweighted: Tensor, dim: int) -> Tensor:
    """Return logits with 0 in rows of weight 0 without a finite loss; the others have a derivative by the weight."""
    extreme = ~(x.abs() < 1e15) & (x != -torch.inf)
    extreme = extreme.any(dim) | (x == -torch.inf).all(dim)
    return torch.where((unweighted & extreme).unsqueeze(dim), 0.0, x)


def unweighted_rows(
    target: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return which rows do not count."""
    off = torch.zeros((), dtype=torch.bool, device=target.device)
    if not target.is_floating_point():
        off = target == ignore_index
        if weight is not None and not label_smoothing:
            off = off | (weight[torch.where(off, 0, target)] == 0)
    return off if sample_weight is None else off | (sample_weight == 0)


def hidden_without_unweighted(hidden: Tensor, unweighted: Tensor) -> Tensor:
    """Return hidden states [..., D] with 0 in rows of weight 0 whose logits might not be finite."""
    if unweighted.dim() >= hidden.dim():  # a row counts if one of its losses does
        unweighted = unweighted.flatten(hidden.dim() - 1).all(-1)
    extreme = ~(hidden.abs() < 1e15).all(-1)
    return torch.where((unweighted & extreme).unsqueeze(-1), 0.0, hidden)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute `fastloss.functional.cross_entropy`; `inplace_backward` has no effect here."""
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    dim = 0 if input.dim() == 1 else 1
    if input.dim() == 1 and not target.is_floating_point():
        target = target.reshape(())
    if target.is_floating_point():
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    classes = max(input.shape[dim], 1)
    valid = torch.ones((), dtype=torch.bool, device=input.device)
    y = torch.zeros_like(target, dtype=torch.int64)
    if not target.is_floating_point():
        valid = target != ignore_index
        y = torch.where(valid, target, 0)
    unweighted = unweighted_rows(target, ignore_index, weight, sample_weight, label_smoothing)
    z = logits_of(without_unweighted(input, unweighted, dim), logit_scale, softcap)
    top = z.detach().amax(dim, keepdim=True) if input.shape[dim] else z.new_zeros(())
    top = torch.where(top.isfinite(), top, 0.0)
    z = z - top  # the loss does not change; far from zero, lse itself would not be exact enough
    lse = z.logsumexp(dim)
    square = z_loss * (lse + top.squeeze(dim) if top.dim() else lse).square() if z_loss else 0.0
    w = torch.ones(classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)
    per_class = w.view([-1 if d == dim else 1 for d in range(z.dim())])

    if target.is_floating_point():
        smoothed = (1 - label_smoothing) * target + label_smoothing / classes
        loss = weighed(per_class * smoothed, lse.unsqueeze(dim) - z).sum(dim)
        loss = torch.where(lse == -torch.inf, torch.nan, loss)  # of no class, as in torch
        row = torch.ones_like(lse)
        loss = loss + square
    else:
        of_class = one_hot(y, classes).movedim(-1, dim)
        row = torch.where(valid, w[y], 0.0)
        loss = w[y] * ((1 - label_smoothing) * nll_of(z, of_class, dim) + square)
        if label_smoothing:
            loss = loss + label_smoothing / classes * weighed(per_class, lse.unsqueeze(dim) - z).sum(dim)
    loss = torch.where(valid, loss, 0.0)
    if sample_weight is not None:
        loss, row = loss * sample_weight.to(z.dtype), row * sample_weight.to(z.dtype)
    return reduced(loss, reduction, row.sum())


def nll_of_classes(
    input: Tensor, target: Tensor, ignore_index: int, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return -log softmax(input) of each row's class, the classes (0 for ignored rows), and which rows count."""
    dim = 0 if input.dim() == 1 else 1
    target = target.reshape(()) if dim == 0 else target
    valid = target != ignore_index
    y = torch.where(valid, target, 0)
    read = without_unweighted(input, unweighted_rows(target, ignore_index, weight, None), dim)
    return nll_of(read, one_hot(y, input.shape[dim]).movedim(-1, dim), dim), y, valid


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    background_class: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute `fastloss.functional.softmax_focal_loss`; `inplace_backward` has no effect here."""
    weight = alpha if isinstance(alpha, Tensor) else None
    nll, y, valid = nll_of_classes(input, target, ignore_index, weight)
    one_minus_p = -torch.expm1(-nll)
    certain = one_minus_p == 0  # where a power below one has no derivative, and the loss is 0
    loss = torch.where(certain, nll * (gamma == 0), torch.where(certain, 1.0, one_minus_p) ** gamma * nll)
    if isinstance(alpha, Tensor):
        loss = alpha.to(loss.dtype)[y] * loss
    elif alpha is not None:
        loss = (
            torch.where(y == background_class, 1 - alpha, alpha).to(loss.dtype) * loss
            if (background_class is not None)
            else alpha * loss
        )
    loss = torch.where(valid, loss, 0.0)
    return reduced(loss, reduction, valid.sum())


def poly1_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    epsilon: float = 1.0,
    *,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute `fastloss.functional.poly1_cross_entropy`; `inplace_backward` has no effect here."""
    nll, y, valid = nll_of_classes(input, target, ignore_index, weight)
    w = torch.ones_like(nll) if weight is None else weight.to(input.dtype)[y]
    loss = torch.where(valid, w * (nll - epsilon * torch.expm1(-nll)), 0.0)
    return reduced(loss, reduction, torch.where(valid, w, 0.0).sum())
