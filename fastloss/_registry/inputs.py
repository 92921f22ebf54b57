"""Inputs, shapes and traffic that several families share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastloss._registry.spec import InputSampler


def classes_of(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.index(shape[1], shape[0], *shape[2:])


def some_ignored(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    target = classes_of(draw, shape)
    return torch.where(draw.index(3, *target.shape) == 0, -100, target)


def logps(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(*shape, low=-6.0, high=-0.05)


def of_logps(*names: str):
    return lambda draw, shape: {name: logps(draw, shape) for name in names}


def traffic_of(inputs: int, trained: int):
    """Return a traffic function: every input read once, the gradients of trained ones written in the same pass."""
    return lambda shape, itemsize, backward: (inputs + backward * trained) * math.prod(shape) * itemsize


LOGPS_SHAPES = ((7, 1), (3, 33), (2, 1025), (2, 5, 3))
LOGPS_BENCH = (64, 4096)


def two_sets(first: str, second: str, draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Draw two sets of features of length about 1."""
    rows, features = shape
    size = features**-0.5
    return {first: draw.normal(rows, features, scale=size), second: draw.normal(rows, features, scale=size)}


def labelled(name: str, draw: InputSampler, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: draw.normal(*shape), "labels": draw.index(max(shape[0] // 3, 2), shape[0])}


def drawn_weight(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(shape[0], low=0.0, high=2.0)


def drawn_temperature(draw: InputSampler, shape: tuple[int, ...]) -> Tensor:
    return draw.uniform(low=0.2, high=0.4)


class _Result(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data  # no view, which autograd would follow to the leaf

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with `inplace_backward`, called with leaves as if they were results of a model.

    The results lie in the leaves' memory, so that a call takes no more of it than that of a trained model.
    """

    def call(**kwargs: Any) -> Tensor:
        results = {
            k: _Result.apply(v) if isinstance(v, Tensor) and v.requires_grad else v for k, v in kwargs.items()
        }
        return function(**results, inplace_backward=True)

    return call
