"""A row loss of `input @ weight.T + bias`, without the matrix of all logits.

Rows are processed in chunks. The logits of a chunk lie in one buffer; the row kernels of the loss turn them into their
gradient in place; two more GEMMs turn that into gradients of input and weight. The buffer is reused by the next chunk.
Beyond the gradients, which are accumulated in float32 for half-precision dtypes, a call needs at most `BUDGET` bytes on
the CPU, unless one row needs more; on CUDA, where each chunk reads and writes the weight's gradient, as many as that
has, up to `MAX_CHUNK_BYTES`.

On the CPU the rows that count are selected first, and the GEMMs are packed ones, in which no row depends on its
neighbours; with AMX those of bfloat16 round the logits' gradient to bfloat16, as plain PyTorch does. On CUDA, where
selecting would synchronise, all rows are multiplied, by cuBLAS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastloss._ops import abi
from fastloss._ops.autograd import LIBRARY, REDUCTIONS
from fastloss._ops.checks import check_integer
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.logit_transforms import LogitTransform

BUDGET = 116 << 20
MAX_CHUNK_BYTES, MAX_CHUNK_ROWS = 1025 << 20, 4096
"""On CUDA: bytes and rows of a chunk where the weight is larger than `BUDGET`."""
NO_LIMIT = (1 << 63) - 1
"""The attribute `max_extra_bytes` where none is given."""
RESERVE = 12 << 20
"""On the CPU: bytes of a call beside those of a chunk, among them the packed panels of a GEMM."""
DIRECT = 1 << 24
"""Elements of a weight from which its gradient is written as bfloat16 at once: cuBLAS does not split its sums."""
INPUT, WEIGHT, BIAS = 1, 2, 4
"""Bits of `needs_grad_mask`."""
PANEL = abi.constant("linear_rows")
"""Rows that a CPU GEMM sums as a unit: chunks of whole panels give the same bits for any chunk size."""


class PackedProducts:
    """The packed GEMMs of the CPU; rows and logits in the accumulation dtype."""

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
    """The GEMMs by cuBLAS; rows and logits in the dtype of the weight, gradients accumulated in float32."""

    def __init__(self, operators: Any, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias
        self.logits_type = self.row_type = weight.dtype
        acc_dtype = accumulation_dtype(weight.dtype)
        self.out_dtype: dict[str, Any] = {} if acc_dtype == weight.dtype else {"out_dtype": acc_dtype}

    def logits(self, out: Tensor, x: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def input_gradient(self, out: Tensor, g: Tensor) -> None:
        torch.mm(g, self.weight, **self.out_dtype, out=out)

    def weight_gradient(
        self, out: Tensor | None, bias_out: Tensor | None, g: Tensor, x: Tensor, add: bool
    ) -> None:
        if out is not None and add:
            torch.addmm(out, g.t(), x, **self.out_dtype, out=out)
        elif out is not None:
            torch.mm(g.t(), x, **({} if out.dtype == g.dtype else self.out_dtype), out=out)
        if bias_out is not None:
            total = g.sum(0, dtype=bias_out.dtype)
            bias_out.add_(total) if add else bias_out.copy_(total)


PRODUCTS: dict[tuple[str, str], type] = {(LIBRARY, "cpu"): PackedProducts, (LIBRARY, "cuda"): BlasProducts}
"""The GEMMs by namespace of the kernels and type of device. Another build of the kernels adds its own."""


def products_for(operators: Any, x: Tensor) -> type:
    """Return the GEMMs that go with the kernels `operators` on the device of `x`."""
    return PRODUCTS[operators.name, "cuda" if x.is_cuda else "cpu"]


def _bytes_of_row(width: int, features: int, itemsize: int) -> int:
    """Return what a row of a chunk needs: `width` numbers, and the row itself, copied, packed, and its gradient."""
    return (width + 4 * features) * itemsize + 64


def extra_bytes(max_extra_bytes: int | None) -> int:
    """Return the argument of this name as the attribute of an operator."""
    return NO_LIMIT if max_extra_bytes is None else check_integer("max_extra_bytes", max_extra_bytes)


def rows_within(
    max_extra_bytes: int, classes: int, width: int, features: int, logits: torch.dtype, cpu: bool
) -> int:
    """Return the most rows of a chunk for which a call needs at most so many bytes beyond its gradients.

    `width` is how many numbers of the logits' dtype a row needs. Too few bytes for one row are an error.
    """
    row, rest = _bytes_of_row(width, features, logits.itemsize), RESERVE if cpu else 0
    if max_extra_bytes < rest + row:
        raise ValueError(
            f"max_extra_bytes: expected at least {rest + row}, which one row of {classes} logits needs here, got "
            f"{max_extra_bytes}"
        )
    return (max_extra_bytes - rest) // row


def rows_of_a_chunk(classes: int, features: int, logits: torch.dtype, cpu: bool, limit: int) -> int:
    """Return how many rows the budget allows, in whole panels where it allows one; a function of sizes alone."""
    row = _bytes_of_row(classes, features if cpu else 0, logits.itemsize)
    rows = max(1, BUDGET // row)
    if cpu:
        # more would gain little: the weight is packed once per chunk
        rows = min(rows, 2 * PANEL)
    else:
        # each chunk reads and writes the sum of the weight's gradients
        memory = min(classes * features * accumulation_dtype(logits).itemsize, MAX_CHUNK_BYTES)
        rows = max(rows, min(memory // row, MAX_CHUNK_ROWS))
    if limit:
        rows = min(rows, limit)
    unit = PANEL if cpu else 128
    return rows // unit * unit if rows >= unit else rows


def narrow_weight_gradient(products: type, weight: Tensor) -> bool:
    """Return whether forward leaves the weight's gradient in the type of the weight, divided by the norm of "mean".

    The rows of the GEMM are divided instead: bfloat16 has the exponent range of float32, so small values lose nothing.
    """
    return products is not PackedProducts and weight.dtype == torch.bfloat16 and weight.numel() >= DIRECT


def _check_targets(target: Tensor, ignore_index: int, classes: int) -> None:
    out = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if out.any():
        raise IndexError(f"Target {target[out][0].item()} is out of bounds.")


def aligned(x: Tensor) -> Tensor:
    """Return `x` aligned to 64 bytes: the order of cuBLAS's sums depends on alignment, our results must not."""
    return x.clone() if x.data_ptr() % 64 else x


class LinearInputs(NamedTuple):
    input: Tensor  # [rows, features]
    linear_weight: Tensor  # [classes, features]
    linear_bias: Tensor | None  # [classes]
    target: Tensor  # [rows] int64, or [rows, classes]
    weight: Tensor | None  # [classes]
    row_weight: Tensor | None  # [rows]


class LinearAttrs(NamedTuple):
    ignore_index: int
    reduction: int
    logit_scale: float
    softcap: float
    hparams: list[float]  # two of the row loss, then those of the logit transform
    out_fp32: bool
    chunk: int  # rows of a chunk at most; 0: as many as fit
    max_extra_bytes: int


def unweighted_rows(
    target: Tensor, weight: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> Tensor | None:
    """Return which rows are ignored, of a class of weight 0 or of weight 0 themselves; None if none can be."""
    off = None
    if not target.is_floating_point():
        off = target == ignore_index
        if weight is not None and weight.shape[0]:
            off = off | (weight == 0)[target.clamp(0, weight.shape[0] - 1).long()]
    if row_weight is not None:
        off = row_weight == 0 if off is None else off | (row_weight == 0)
    return off


def without_unweighted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Return the input [..., D] with 0 in rows that do not count, where 0 times what they hold might be NaN.

    A row of weight 0 that is not extreme stays: its loss is the derivative by its weight.
    """
    off = unweighted_rows(target, weight, row_weight, ignore_index)
    if off is None:
        return input
    if off.dim() >= input.dim():  # a row counts if one of its losses does
        off = off.flatten(input.dim() - 1).all(-1)
    if weight is not None or row_weight is not None:
        off = off & ~(input.detach().abs() < 1e15).all(-1)
    return torch.where(off.unsqueeze(-1), 0.0, input)


def forward(
    operators: Any, row_loss: str, logit_transform: type[LogitTransform] | None, inputs: LinearInputs,
    attrs: LinearAttrs, needs_grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return loss, norm, and the gradients of the mask of the sum of all rows' losses, in the accumulation dtype.

    The gradients are divided by the norm of "mean", except for half-precision dtypes: there the logits' gradient would
    underflow, so backward divides at the end, except for a weight's gradient in a half-precision dtype (see
    `narrow_weight_gradient`). The row loss's hyperparameters are followed by those of the logit transform.
    """
    input, linear_weight, linear_bias, target, weight, row_weight = inputs
    products = products_for(operators, input)
    on_cpu = products is PackedProducts
    if not on_cpu:
        input, linear_weight = aligned(input), aligned(linear_weight)
    (rows, features), classes = input.shape, linear_weight.shape[0]
    of_row_loss = len(abi.fact(row_loss, "hparams"))
    hparams, transform = attrs.hparams[:of_row_loss], None
    if logit_transform is not None:
        named = dict(zip(logit_transform.HPARAMS, attrs.hparams[of_row_loss:], strict=True))
        transform = logit_transform(features, **named)
    acc_dtype = accumulation_dtype(input.dtype)
    narrow = narrow_weight_gradient(products, linear_weight)
    row_kernel = getattr(operators, f"{row_loss}_rows")
    hard = not target.is_floating_point()
    row_weight = None if row_weight is None else row_weight.to(acc_dtype)

    counted = None  # the rows that count, where some do not
    smoothed = hparams[abi.fact(row_loss, "hparams").index("label_smoothing")] != 0
    class_weight = weight if hard and not smoothed else None
    unweighted = unweighted_rows(target, class_weight, row_weight, attrs.ignore_index)
    if on_cpu:
        if hard:
            _check_targets(target, attrs.ignore_index, transform.classes(classes) if transform else classes)
        # rows of a class of weight 0 are not left out: a mean of them alone is 0 / 0
        left_out = unweighted
        if class_weight is not None:
            left_out = unweighted_rows(target, None, row_weight, attrs.ignore_index)
        if left_out is not None and left_out.any():
            counted = (~left_out).nonzero().squeeze(1)
        if class_weight is None or not unweighted.any():
            unweighted = None

    def result(*shape: int) -> Tensor:
        return operators.scratch(input, shape)

    loss = result(rows) if counted is None else result(rows).zero_()
    norm = None
    if attrs.reduction == REDUCTIONS["mean"]:
        norm = operators.row_norm(loss, target, weight, row_weight, attrs.ignore_index)
    inner_norm = norm if input.dtype == acc_dtype else None
    dx = result(rows, features) if needs_grad_mask & INPUT else result(0)
    db = result(classes) if needs_grad_mask & BIAS else result(0)
    if needs_grad_mask & INPUT and counted is not None:
        dx.zero_()

    product = products(operators, linear_weight, linear_bias)
    total = rows if counted is None else counted.numel()
    width = classes + (transform.extra_per_row(classes) if transform else 0)
    most = rows_within(attrs.max_extra_bytes, classes, width, features, product.logits_type, on_cpu)
    most = min(attrs.chunk or most, most)
    step = min(rows_of_a_chunk(width, features, product.logits_type, on_cpu, most), max(total, 1))
    if needs_grad_mask & WEIGHT and narrow and total <= step:
        dw = input.new_empty(classes, features)
    else:
        dw = result(classes, features) if needs_grad_mask & WEIGHT else result(0)
    one_type = product.logits_type == acc_dtype
    workspace = result(step, classes) if one_type else input.new_empty(step, classes)
    for begin in range(0, total, step):
        size = min(step, total - begin)
        pick: slice | Tensor
        if counted is None:
            pick = slice(begin, begin + size)
            part_loss = loss[pick]
        else:
            pick = counted[begin : begin + size]
            part_loss = loss.new_empty(size)
        x = input[pick].to(product.row_type)
        if unweighted is not None:  # 0 times what they hold may be NaN in the weight's gradient
            x = x.masked_fill(unweighted[pick].unsqueeze(1), 0)
        if on_cpu:
            x = x.contiguous()
        g = workspace[:size]
        product.logits(g, x)
        z = transform.forward(g, target[pick]) if transform else g
        row_kernel(
            z, part_loss, target[pick], weight, None if row_weight is None else row_weight[pick], inner_norm,
            attrs.ignore_index, attrs.logit_scale, attrs.softcap, hparams, needs_grad_mask != 0,
        )  # fmt: skip
        if counted is not None:
            loss[pick] = part_loss
        if transform and needs_grad_mask:
            g = transform.backward(z)
        if needs_grad_mask & INPUT:
            if counted is None:
                product.input_gradient(dx[pick], g)
            else:
                part = dx.new_empty(size, features)
                product.input_gradient(part, g)
                dx[pick] = part
        if needs_grad_mask & (WEIGHT | BIAS):
            into = dw if needs_grad_mask & WEIGHT else None, db if needs_grad_mask & BIAS else None
            if narrow and norm is not None:
                x = torch.mul(x, (1 / (norm + (norm == 0))).view(1, 1), out=torch.empty_like(x))
            product.weight_gradient(*into, g, x, begin > 0)
    if total == 0:
        dw.zero_()
        db.zero_()
    value = operators.row_reduce(loss, norm) if attrs.reduction else loss
    if narrow:
        dw = dw.to(input.dtype)
    value = value if attrs.out_fp32 else value.to(input.dtype)
    return value, result(0) if norm is None else norm, dx, dw, db
