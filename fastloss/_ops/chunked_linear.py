"""A row loss of `input @ weight.T + bias` for all rows at once, without the matrix of all logits.

Rows are taken in chunks. The logits of a chunk lie in one buffer; the row kernels of the loss turn them into
their own gradient in place; two more products turn that into gradients of input and weight. The buffer serves
the next chunk. Beyond the gradients, which half types collect in float32, no call needs more than `BUDGET`
bytes on the CPU, unless one row does; on CUDA, where each chunk reads and writes the sum of the weight's
gradients, as many as that sum has, up to `MOST`.

On the CPU the rows that count are picked out first, and the products are packed ones, in which no row depends
on its neighbours; with AMX those of bfloat16 round the logits' gradient to bfloat16, as plain PyTorch does. On
CUDA, where counting would wait for the device, all rows are multiplied, by cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.logit_transforms import Shape

BUDGET = 116 << 20
MOST, MOST_ROWS = 1025 << 20, 4096
"""On CUDA: bytes and rows of a chunk where the weight is larger than `BUDGET`."""
DIRECT = 1 << 24
"""Elements of a weight so large that its gradient is written as bfloat16 at once: cuBLAS splits no sum then."""
INPUT, WEIGHT, BIAS = 1, 2, 4
"""Bits of the gradients that are wanted."""
PANEL = 384
"""Rows that a product on the CPU adds up as one: chunks of whole panels give the same bits whatever their size."""


class PackedProducts:
    """The products on the CPU; rows and logits in the accumulation type."""

    def __init__(self, operators: Any, weight: Tensor, bias: Tensor | None):
        self.operators, self.weight, self.bias = operators, weight, bias
        self.logits_type = self.row_type = accumulation_dtype(weight.dtype)

    def logits(self, out: Tensor, x: Tensor) -> None:
        self.operators.linear_logits(out, x, self.weight, self.bias)

    def input_gradient(self, out: Tensor, g: Tensor) -> None:
        self.operators.linear_dx(out, g, self.weight)

    def weight_gradient(
        self, out: Tensor | None, bias_out: Tensor | None, g: Tensor, x: Tensor, add: bool
    ) -> None:
        self.operators.linear_dw(out, bias_out, g, x, self.weight, add)


class BlasProducts:
    """The products by cuBLAS; rows and logits in the type of the weight, gradients summed in float32."""

    def __init__(self, operators: Any, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.logits_type = self.row_type = weight.dtype
        high = accumulation_dtype(weight.dtype)
        self.wide = {} if high == weight.dtype else {"out_dtype": high}

    def logits(self, out: Tensor, x: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def input_gradient(self, out: Tensor, g: Tensor) -> None:
        torch.mm(g, self.weight, **self.wide, out=out)

    def weight_gradient(
        self, out: Tensor | None, bias_out: Tensor | None, g: Tensor, x: Tensor, add: bool
    ) -> None:
        if out is not None and add:
            torch.addmm(out, g.t(), x, **self.wide, out=out)
        elif out is not None:
            torch.mm(g.t(), x, **({} if out.dtype == g.dtype else self.wide), out=out)
        if bias_out is not None:
            total = g.sum(0, dtype=bias_out.dtype)
            bias_out.add_(total) if add else bias_out.copy_(total)


class RowByRow:
    """In the place of cuBLAS where the CUDA kernels run on the CPU: products that know one row at a time."""

    def __init__(self, operators: Any, weight: Tensor, bias: Tensor | None):
        self.wide = weight.to(accumulation_dtype(weight.dtype))
        self.bias = 0 if bias is None else bias.to(self.wide.dtype)
        self.logits_type = self.row_type = weight.dtype

    def logits(self, out: Tensor, x: Tensor) -> None:
        for row, to in zip(x.to(self.wide.dtype), out, strict=True):
            to.copy_(torch.mv(self.wide, row) + self.bias)

    def input_gradient(self, out: Tensor, g: Tensor) -> None:
        for row, to in zip(g.to(self.wide.dtype), out, strict=True):
            to.copy_(torch.mv(self.wide.t(), row))

    def weight_gradient(
        self, out: Tensor | None, bias_out: Tensor | None, g: Tensor, x: Tensor, add: bool
    ) -> None:
        g = g.to(self.wide.dtype)
        for to, part in ((out, g.t() @ x.to(g.dtype)), (bias_out, g.sum(0))):
            if to is not None:
                to.add_(part) if add else to.copy_(part)


PRODUCTS = {"cpu": PackedProducts, "simt": RowByRow, "cuda": BlasProducts}


def rows_of_a_chunk(classes: int, features: int, logits: torch.dtype, cpu: bool, asked: int) -> int:
    """As many as the budget allows, in whole panels where it allows one; by the sizes alone."""
    # on the CPU a row also lies there itself, packed, and as its gradient
    row = (classes + (4 * features if cpu else 0)) * logits.itemsize + 64
    rows = max(1, BUDGET // row)
    if cpu:
        # more would gain little: the weight is packed once a chunk
        rows = min(rows, 2 * PANEL)
    else:
        # each chunk reads and writes the sum of the weight's gradients
        room = min(classes * features * accumulation_dtype(logits).itemsize, MOST)
        rows = max(rows, min(room // row, MOST_ROWS))
    if asked:
        rows = min(rows, asked)
    unit = PANEL if cpu else 128
    return rows // unit * unit if rows >= unit else rows


def narrow_weight_gradient(products: type, weight: Tensor) -> bool:
    """Whether forward leaves the weight's gradient in the type of the weight, divided by the norm of "mean".

    The rows that it is multiplied from are divided: bfloat16 has the exponents of float32, and they lose nothing
    by being small.
    """
    return products is not PackedProducts and weight.dtype == torch.bfloat16 and weight.numel() >= DIRECT


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    out = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if out.any():
        raise IndexError(f"Target {target[out][0].item()} is out of bounds.")


def aligned(x: Tensor) -> Tensor:
    """For products of the library, whose sums depend on how operands are aligned: ours must not."""
    return x.clone() if x.data_ptr() % 64 else x


@torch.no_grad()
def forward(
    name: str, shape: type[Shape] | None, operators: Any, products: type, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, row_weight: Tensor | None,
    ignore_index: int, reduction: int, logit_scale: float, softcap: float, numbers: list[float],
    wide: bool, chunk: int, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, norm, and the wanted gradients of the sum of all rows' losses, in the accumulation type.

    The gradients are divided by the norm of "mean", save for half types: there, what is that small would be lost
    in the logits' gradient, and backward divides at the end, all but a weight's gradient in a half type (see
    `narrow_weight_gradient`). The numbers after the row loss's two are those of the shape that stands between the
    products and the logits.
    """
    on_cpu = products is PackedProducts
    if not on_cpu:
        input, linear_weight = aligned(input), aligned(linear_weight)
    (rows, features), classes = input.shape, linear_weight.shape[0]
    between = shape(numbers[2:], features) if shape else None
    numbers = numbers[:2]
    high = accumulation_dtype(input.dtype)
    narrow = narrow_weight_gradient(products, linear_weight)
    row_kernel = getattr(operators, f"{name}_rows")
    hard = not target.is_floating_point()
    row_weight = None if row_weight is None else row_weight.to(high)

    counted = None  # the rows that count, where some do not
    if on_cpu:
        counts = None
        if hard:
            _check_targets(target, ignore_index, between.classes(classes) if between else classes)
            counts = target != ignore_index
        if row_weight is not None:
            counts = row_weight != 0 if counts is None else counts & (row_weight != 0)
        if counts is not None and not counts.all():
            counted = counts.nonzero().squeeze(1)

    def result(*shape: int) -> Tensor:
        return operators.scratch(input, shape)

    loss = result(rows) if counted is None else result(rows).zero_()
    norm = operators.row_norm(loss, target, weight, row_weight, ignore_index) if reduction == 1 else None
    inner_norm = norm if input.dtype == high else None
    dx = result(rows, features) if wanted & INPUT else result(0)
    db = result(classes) if wanted & BIAS else result(0)
    if wanted & INPUT and counted is not None:
        dx.zero_()

    product = products(operators, linear_weight, linear_bias)
    total = rows if counted is None else counted.numel()
    width = classes + (between.beside(classes) if between else 0)
    step = min(rows_of_a_chunk(width, features, product.logits_type, on_cpu, chunk), max(total, 1))
    if wanted & WEIGHT and narrow and total <= step:
        dw = input.new_empty(classes, features)
    else:
        dw = result(classes, features) if wanted & WEIGHT else result(0)
    room = result(step, classes) if product.logits_type == high else input.new_empty(step, classes)
    for begin in range(0, total, step):
        size = min(step, total - begin)
        if counted is None:
            pick = slice(begin, begin + size)
            part_loss = loss[pick]
        else:
            pick = counted[begin : begin + size]
            part_loss = loss.new_empty(size)
        x = input[pick].to(product.row_type)
        if on_cpu:
            x = x.contiguous()
        g = room[:size]
        product.logits(g, x)
        z = between.enter(g, target[pick]) if between else g
        row_kernel(
            z, part_loss, target[pick], weight, None if row_weight is None else row_weight[pick], inner_norm,
            ignore_index, logit_scale, softcap, numbers, wanted != 0,
        )  # fmt: skip
        if counted is not None:
            loss[pick] = part_loss
        if between and wanted:
            g = between.leave(z)
        if wanted & INPUT:
            if counted is None:
                product.input_gradient(dx[pick], g)
            else:
                part = dx.new_empty(size, features)
                product.input_gradient(part, g)
                dx[pick] = part
        if wanted & (WEIGHT | BIAS):
            into = dw if wanted & WEIGHT else None, db if wanted & BIAS else None
            if narrow and norm is not None:
                x = torch.mul(x, (1 / (norm + (norm == 0))).view(1, 1), out=torch.empty_like(x))
            product.weight_gradient(*into, g, x, begin > 0)
    if total == 0:
        dw.zero_()
        db.zero_()
    value = operators.row_reduce(loss, norm) if reduction else loss
    if narrow:
        dw = dw.to(input.dtype)
    return value if wide else value.to(input.dtype), result(0) if norm is None else norm, dx, dw, db


def scaled(operators: Any, d: Tensor, factor: Tensor, like: Tensor, own: bool) -> Tensor:
    """`factor * d` in the type of `like`; with `own` it may be `d` itself, written or left as it is."""
    if type(d) is not Tensor or not own:  # a tensor that stands for others, or for none
        return (d.to(factor.dtype) * factor).to(like.dtype)
    if d.dtype == like.dtype:
        if d.device.type == "cpu" and operators is torch.ops.fastloss:
            return d if factor.item() == 1 else d.mul_(factor)
        operators.linear_scale_(d, factor)  # the device looks whether it is 1
        return d
    if d.device.type == "cpu":
        if operators is torch.ops.fastloss:
            return operators.linear_scaled(d, factor, like)
        return (d * factor).to(like.dtype)
    return torch.mul(d, factor, out=torch.empty_like(d, dtype=like.dtype))
