"""Statistics of rows of `input @ weight.T + bias` (see `token_stats`), without the matrix of all logits.

Forward makes the logits of a chunk of rows and keeps a few numbers of each row; backward makes them again, turns
them into their gradient, and multiplies that on. Chunks and products are those of `_linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastloss._ops import autograd, chunked_linear
from fastloss._ops.dtypes import accumulation_dtype

_STATE = 6  # numbers of a row that backward needs


class _Chunks:
    """The rows that count, by chunks: where they are, their hidden states, room for their logits."""

    def __init__(
        self, operators: Any, products: type, input: Tensor, weight: Tensor, bias: Tensor | None,
        mask: Tensor | None,
    ):  # fmt: skip
        on_cpu = products is chunked_linear.PackedProducts
        if not on_cpu:
            input, weight = chunked_linear.aligned(input), chunked_linear.aligned(weight)
        self.operators, self.input = operators, input
        self.product = products(operators, weight, bias)
        self.mask = mask
        self.counted = None
        if on_cpu and mask is not None:
            self.mask = None
            if not mask.all():
                self.counted = mask.nonzero().squeeze(1)
        self.total = input.shape[0] if self.counted is None else self.counted.numel()
        classes, features = weight.shape
        rows = chunked_linear.rows_of_a_chunk(
            2 * classes, features, self.product.logits_type, on_cpu, 0
        )  # and their gradient
        self.step = min(rows, max(self.total, 1))
        self.shape = self.step, classes

    def one_product(self, weight: Tensor) -> bool:
        """Whether the weight's gradient is written at once, in the type of the weight."""
        return self.total <= self.step and chunked_linear.narrow_weight_gradient(type(self.product), weight)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        high = accumulation_dtype(self.input.dtype)
        if self.product.logits_type == high:
            room = self.operators.scratch(self.input, self.shape)
        else:
            room = self.input.new_empty(self.shape)
        for begin in range(0, self.total, self.step):
            end = min(begin + self.step, self.total)
            pick = slice(begin, end) if self.counted is None else self.counted[begin:end]
            x = self.input[pick].to(self.product.row_type).contiguous()
            logits = room[: end - begin]
            self.product.logits(logits, x)
            yield pick, x, logits


@torch.no_grad()
def forward(
    operators: Any, products: type, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None,
    index: Tensor | None, mask: Tensor | None, scale: float, cap: float, everything: bool, wanted: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Planes [4 + 2 K, rows] as `token_stats` has them, 0 in rows that are masked, and what backward needs."""
    rows, high = input.shape[0], accumulation_dtype(input.dtype)
    planes = input.new_zeros([4 + (2 * index.shape[-1] if index is not None else 0), rows], dtype=high)
    state = input.new_zeros([rows, _STATE], dtype=high)
    chunks = _Chunks(operators, products, input, linear_weight, linear_bias, mask)
    for pick, _, logits in chunks:
        of_chunk = None if index is None else index[pick]
        kept = None if chunks.mask is None else chunks.mask[pick]
        planes[:, pick], state[pick] = operators.token_stats_fwd(
            logits, of_chunk, kept, scale, cap, everything
        )
    return planes, state


@torch.no_grad()
def backward(
    operators: Any, products: type, grad: Tensor, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, index: Tensor | None, mask: Tensor | None, state: Tensor, scale: float,
    cap: float, everything: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that are wanted; the others are empty."""
    (rows, features), classes = input.shape, linear_weight.shape[0]

    def result(bit: int, *shape: int) -> Tensor:
        return operators.scratch(input, shape if wanted & bit else [0])

    dx = result(chunked_linear.INPUT, rows, features)
    db = result(chunked_linear.BIAS, classes)
    chunks = _Chunks(operators, products, input, linear_weight, linear_bias, mask)
    if wanted & chunked_linear.WEIGHT and chunks.one_product(linear_weight):
        dw = input.new_empty(classes, features)
    else:
        dw = result(chunked_linear.WEIGHT, classes, features)
    if chunks.counted is not None:
        dx.zero_()
    add = False
    for pick, x, logits in chunks:
        of_chunk = None if index is None else index[pick]
        kept = None if chunks.mask is None else chunks.mask[pick]
        g = operators.token_stats_bwd(
            grad[:, pick], logits, of_chunk, kept, state[pick], scale, cap, everything
        )
        if wanted & chunked_linear.INPUT:
            part = dx[pick] if chunks.counted is None else dx.new_empty(x.shape)
            chunks.product.input_gradient(part, g)
            if chunks.counted is not None:
                dx[pick] = part
        if wanted & (chunked_linear.WEIGHT | chunked_linear.BIAS):
            into = (
                dw if wanted & chunked_linear.WEIGHT else None,
                db if wanted & chunked_linear.BIAS else None,
            )
            chunks.product.weight_gradient(*into, g, x, add)
        add = True
    if not add:
        dw.zero_()
        db.zero_()
    return tuple(d if d.dtype == input.dtype else d.to(input.dtype) for d in (dx, dw, db))


class LinearStatsOp(autograd.PythonOp):
    """Tensors `(input, linear_weight, linear_bias, index, mask)`, of which the first three are differentiated.

    `options` are `scale, cap, everything`; the result are the planes of `token_stats`.
    """

    _TENSORS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor? index, Tensor? mask, "
    _OPTIONS = "float scale, float cap, bool everything, int wanted"
    schemas: ClassVar = {
        "fwd": f"({_TENSORS}{_OPTIONS}) -> (Tensor planes, Tensor state)",
        "bwd": f"(Tensor grad, {_TENSORS}Tensor state, {_OPTIONS}) "
        "-> (Tensor dinput, Tensor dweight, Tensor dbias)",
    }

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        def fake(input, linear_weight, linear_bias, index, mask, *options):
            high = accumulation_dtype(input.dtype)
            planes = 4 + (2 * index.shape[-1] if index is not None else 0)
            return (
                input.new_empty([planes, input.shape[0]], dtype=high),
                input.new_empty([input.shape[0], _STATE], dtype=high),
            )

        super().__init__(name, lambda *args: reference(*args[:-1]), fake, tensors=5, wrt=(0, 1, 2))

    def fake_backward(self, *args):
        like, wanted = args[1:4], args[-1]
        return tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if wanted >> i & 1
            else args[1].new_empty([0])
            for i, x in enumerate(like)
        )

    def implement(self, kind, operators, where):
        run = {"fwd": forward, "bwd": backward}[kind]
        return functools.partial(run, operators, chunked_linear.PRODUCTS[where])

    def flops(self, shapes, needed):
        (rows, features), (classes, _) = shapes[:2]
        again = any(needed[:2])  # backward makes the logits again
        return 2 * rows * features * classes * (1 + again + sum(needed[:2]))

    def __call__(self, tensors, options) -> Tensor:
        return super().__call__(tensors, (*options, autograd.wanted_bits(self, tensors)))
