"""Transforms between the GEMM of a chunk and its row loss, in place where possible, and their backward.

A logit transform is constructed from the number of features and its hyperparameters, `HPARAMS`. `forward` turns a chunk
of products into logits, `backward` the logits' gradient into that of the products; `classes` is the number of logits
per row, `extra_per_row` the number of elements per row that it allocates. Its state lasts for one chunk.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastloss._ops.dtypes import accumulation_dtype


class LogitTransform(Protocol):
    HPARAMS: ClassVar[tuple[str, ...]]  # keyword arguments of the class, after the number of features

    def __init__(self, features: int, *args: Any, **hparams: Any): ...
    def classes(self, products: int) -> int: ...
    def extra_per_row(self, products: int) -> int: ...
    def forward(self, products: Tensor, target: Tensor) -> Tensor: ...
    def backward(self, gradient: Tensor) -> Tensor: ...


MIN_SIN2 = 1e-7
"""Squared sines are clamped from below at this."""


class AngularMargin:
    """Cosines with a margin for the target; of several centres of a class the nearest counts.

    If `additive` is not 0, the margin is subtracted from the cosine instead of added to the angle.
    """

    HPARAMS: ClassVar[tuple[str, ...]] = ("additive", "margin", "easy", "straight", "centres")

    def __init__(
        self, features: int, *, additive: float, margin: float, easy: float, straight: float, centres: float
    ):
        self.margin = margin
        self.additive, self.easy, self.straight = additive != 0, easy != 0, straight != 0
        self.centres = int(centres)

    def classes(self, products: int) -> int:
        return products // self.centres

    def extra_per_row(self, products: int) -> int:
        return 3 * self.classes(products) if self.centres > 1 else 0  # the nearest, and which (64 bits)

    def forward(self, products: Tensor, target: Tensor) -> Tensor:
        self._products = cosines = products
        if self.centres > 1:
            cosines, self._nearest = products.view(len(products), -1, self.centres).max(-1)
        self._target = target.clamp(0, cosines.shape[1] - 1).unsqueeze(1)  # ignored rows stay ignored
        cosine = cosines.gather(1, self._target)
        value, self._slope = self._margin(cosine.to(accumulation_dtype(cosine.dtype)))
        return cosines.scatter_(1, self._target, value.to(cosines.dtype))

    def backward(self, gradient: Tensor) -> Tensor:
        of_target = gradient.gather(1, self._target)
        gradient.scatter_(1, self._target, (of_target * self._slope).to(gradient.dtype))
        if self.centres == 1:
            return gradient
        apart = self._products.zero_().view(len(gradient), -1, self.centres)
        apart.scatter_(2, self._nearest.unsqueeze(2), gradient.unsqueeze(2))
        return self._products

    def _margin(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine with its margin, and its derivative."""
        one = torch.ones_like(c)
        if self.additive:
            return c - self.margin, one
        cos, sin = math.cos(self.margin), math.sin(self.margin)
        square = 1 - c * c
        sine = square.clamp(min=MIN_SIN2).sqrt()
        value = c * cos - sine * sin
        slope = torch.where(square > MIN_SIN2, cos + sin * c / sine, cos)
        inside = c > (0.0 if self.easy else -cos)
        value = torch.where(inside, value, c if self.easy else c - self.margin * sin)
        return value, one if self.straight else torch.where(inside, slope, one)


class Harmonic:
    """Squared distances become -n log(distance).

    n = 0 stands for the square root of the embeddings' width (features - 2); `eps` is added to the squares.
    """

    HPARAMS: ClassVar[tuple[str, ...]] = ("n", "eps")

    def __init__(self, features: int, *, n: float, eps: float):
        self.n = n or math.sqrt(features - 2)
        self.eps = eps

    def classes(self, products: int) -> int:
        return products

    def extra_per_row(self, products: int) -> int:
        return products

    def forward(self, products: Tensor, target: Tensor) -> Tensor:
        self._squares = products.clamp_(min=0).add_(self.eps)
        return products.log().mul_(-self.n / 2)

    def backward(self, gradient: Tensor) -> Tensor:
        return torch.div(gradient.mul_(-self.n / 2), self._squares, out=self._squares)
