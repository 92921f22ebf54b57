"""Features as the contrastive losses take them: checks of their arguments, and their place in the registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastloss import reference
from fastloss._ops.checks import check_floating, check_tensors, check_weight_type
from fastloss._ops.chunked_linear import accumulation_type
from fastloss._ops.similarity import SoftmaxOp
from fastloss._registry import Draw, Loss, register

_formulas = reference.contrastive
softmax = SoftmaxOp("contrastive_softmax", _formulas.softmax_rows)


def rows_of_features(first: str, **tensors: Tensor | None) -> tuple[list[Tensor | None], torch.dtype | None]:
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


def number(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """As a tensor of one number; one that is given stays what it is."""
    if isinstance(value, Tensor):
        check_tensors(like, **{name: value})
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one number, got {value.dtype} of shape {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a Tensor, got {type(value).__name__}")
    return like.new_full((), value, dtype=accumulation_type(like.dtype))


def positive_temperature(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"temperature: expected a positive number, got {value}")
    return number("temperature", value, like)


def weight_of_rows(weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_tensors(x, sample_weight=weight)
    check_weight_type("sample_weight", weight, x)
    if weight.shape != x.shape[:1]:
        raise ValueError(
            f"sample_weight: expected one number for each of {x.shape[0]} rows, got shape {tuple(weight.shape)}"
        )
    return weight


def labels_of_rows(labels: Tensor, x: Tensor, name: str = "labels") -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(labels).__name__}")
    check_tensors(x, **{name: labels})
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: expected one label for each of {x.shape[0]} rows, got shape {tuple(labels.shape)}"
        )
    return labels.long()


def marks(rows: int, columns: int, offset: int, like: Tensor, keys: str = "") -> Tensor:
    if not isinstance(offset, int):
        raise TypeError(f"label_offset: expected an int, got {type(offset).__name__}")
    if offset < 0 or offset + rows > columns:
        raise ValueError(
            f"{keys}: expected the positives of {rows} rows from label_offset {offset} on, got {columns} rows"
        )
    return torch.arange(offset, offset + rows, device=like.device)


def reduced(loss: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    return _formulas.reduced(loss, weight, reduction).to(dtype)


# ---- registry


def two_sets(first: str, second: str, draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Features of length about 1."""
    rows, features = shape
    size = features**-0.5
    return {first: draw.normal(rows, features, scale=size), second: draw.normal(rows, features, scale=size)}


def labelled(name: str, draw: Draw, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: draw.normal(*shape), "labels": draw.index(max(shape[0] // 3, 2), shape[0])}


def drawn_weight(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(shape[0], low=0.0, high=2.0)


def drawn_temperature(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(low=0.2, high=0.4)


SHAPES = ((5, 7), (1, 3), (23, 16), (4, 33), (210, 40))


def register_contrastive(function: Callable[..., Tensor], **entry) -> None:
    register(
        Loss(
            name=function.__name__,
            family="contrastive",
            function=function,
            reference=getattr(reference, function.__name__),
            products=(1, 3),
            shapes=SHAPES,
            traffic=lambda shape, itemsize, backward: (4 if backward else 2) * shape[0] * shape[1] * itemsize,
            **entry,
        )
    )
