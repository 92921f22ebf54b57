"""Losses of angles and distances between embeddings and the centres of classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastloss.reference.classification import cross_entropy, hidden_without_unweighted, unweighted_rows
from fastloss.reference.options import one_of

__all__ = ["arcface_loss", "cosface_loss", "harmonic_loss"]


def with_margin(
    cosines: Tensor, target: Tensor, m: float, additive: bool, easy_margin: bool, straight: bool
) -> Tensor:
    """Return the cosines [N, C], the target's with its margin."""
    inside = (target >= 0) & (target < cosines.shape[1])
    at = torch.where(inside, target, 0).unsqueeze(1)
    c = cosines.gather(1, at)
    if additive:
        value = c - m
    else:
        sine = (1 - c * c).clamp(min=1e-7).sqrt()
        value = c * math.cos(m) - sine * math.sin(m)
        if easy_margin:
            value = torch.where(c > 0, value, c)
        else:
            value = torch.where(c > -math.cos(m), value, c - m * math.sin(m))
    if straight:
        value = c + (value - c).detach()
    return cosines.scatter(1, at, torch.where(inside.unsqueeze(1), value, c))


def nearest(products: Tensor, centres: int) -> Tensor:
    return products if centres == 1 else products.unflatten(1, (-1, centres)).max(-1).values


def margin_logits(
    products: Tensor,
    target: Tensor,
    m: float,
    additive: bool,
    easy_margin: bool,
    straight: bool,
    centres: int,
) -> Tensor:
    """Return cosines [N, C], the target's with its margin, from products [N, C * centres] of rows and centres."""
    return with_margin(nearest(products, centres), target, m, additive, easy_margin, straight)


def chosen(
    weight: Tensor, target: Tensor, classes: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return weight and target where only the classes listed take part."""
    if classes is None:
        return weight, target
    place = torch.full((weight.shape[0],), -1, device=target.device).scatter(
        0, classes, torch.arange(len(classes), device=target.device)
    )
    kept = target != ignore_index
    return weight[classes], torch.where(kept, place[torch.where(kept, target, 0)], ignore_index)


def _margin_loss(
    input, weight, target, s, m, reduction, additive, easy_margin, straight, classes, ignore_index,
    label_smoothing, sample_weight,
):  # fmt: skip
    weight, target = chosen(weight, target, classes, ignore_index)
    centres = weight.shape[1] if weight.dim() == 3 else 1
    input = hidden_without_unweighted(input, unweighted_rows(target, ignore_index, None, sample_weight))
    unit = F.normalize(weight.reshape(-1, weight.shape[-1]))
    cosines = nearest(F.normalize(input) @ unit.t(), centres)
    return cross_entropy(
        with_margin(cosines, target, m, additive, easy_margin, straight), target, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, logit_scale=s, sample_weight=sample_weight,
    )  # fmt: skip


def arcface_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    s: float = 64.0,
    m: float = 0.5,
    reduction: str = "mean",
    *,
    easy_margin: bool = False,
    margin_grad: str = "exact",
    classes: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Compute `fastloss.functional.arcface_loss`."""
    straight = one_of("margin_grad", margin_grad, ("exact", "straight_through")) == "straight_through"
    return _margin_loss(
        input, weight, target, s, m, reduction, False, easy_margin, straight, classes, ignore_index,
        label_smoothing, sample_weight,
    )  # fmt: skip


def cosface_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    s: float = 64.0,
    m: float = 0.35,
    reduction: str = "mean",
    *,
    classes: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Compute `fastloss.functional.cosface_loss`."""
    return _margin_loss(
        input, weight, target, s, m, reduction, True, False, False, classes, ignore_index, label_smoothing,
        sample_weight,
    )  # fmt: skip


def harmonic_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    n: float | None = None,
    reduction: str = "mean",
    *,
    eps: float = 1e-8,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    max_extra_bytes: int | None = None,
) -> Tensor:
    """Compute `fastloss.functional.harmonic_loss`, of the distances themselves."""
    dtype = input.dtype
    if dtype in (torch.bfloat16, torch.float16):
        input, weight = input.float(), weight.float()
        sample_weight = None if sample_weight is None else sample_weight.float()
    input = hidden_without_unweighted(input, unweighted_rows(target, ignore_index, None, sample_weight))
    squares = (input.unsqueeze(1) - weight).square().sum(-1) + eps
    n = math.sqrt(input.shape[1]) if n is None else n
    return cross_entropy(
        -n / 2 * squares.log(), target, reduction=reduction, ignore_index=ignore_index,
        sample_weight=sample_weight,
    ).to(dtype)  # fmt: skip
