"""Losses of a similarity matrix, s = scale * x y^T + bias, that is never stored: operators and their autograd.

On the CPU one call runs over the whole matrix in tiles, GEMMs included (csrc/cpu/kernels/similarity.h). On CUDA the
GEMMs are cuBLAS's, for a block of the matrix at a time that `BUDGET` bytes hold, with a fused epilogue on each block
(csrc/cuda/kernels/similarity.cu). `target_col` and ids determine the role of an entry: see `EntryRule` in
csrc/losses/similarity.h.

The columns come in blocks: one here (`OneBlock`), several in `fastloss.distributed.exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastloss._ops import abi
from fastloss._ops.autograd import PythonOp, runs_on_cpu
from fastloss._ops.checks import check_integer
from fastloss._ops.chunked_linear import aligned
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.flops import count, count_passes

BUDGET = 256 << 20
"""Bytes of similarities in memory on CUDA; their gradient in a half-precision dtype takes half as many more."""
_PASSES = abi.enum("TilePass")
STATISTICS, SOFTMAX_GRADIENT = _PASSES["statistics"], _PASSES["softmax_gradient"]
PAIRS, PAIRS_GRADIENT = _PASSES["pairs"], _PASSES["pairs_gradient"]
SIGMOID, HARDEST = _PASSES["sigmoid"], _PASSES["hardest"]
_ARGUMENTS = [argument.name for argument in torch.ops.fastloss.tile_walk.default._schema.arguments]
ARRAYS = tuple(_ARGUMENTS[_ARGUMENTS.index("row_max") : _ARGUMENTS.index("hardest") + 1])
"""The arrays of rows and of columns that a pass reads or writes, in the order of the operators."""
_GRADIENTS = [ARRAYS.index(f"{name}_grad") for name in ("row", "col", "positive", "col_positive")]


def _flops_of_walk(*args: Any) -> int:
    """Return the FLOPs of a call of `tile_walk`: s, and the gradients of rows and of columns that it writes."""
    given = dict(zip(_ARGUMENTS, args, strict=True))
    (m, features), n = given["x"].shape, given["y"].shape[0]
    return 2 * m * n * features * (1 + (given["dx"] is not None) + (given["dy"] is not None))


count("tile_walk", _flops_of_walk)


def target_columns(rows: int, columns: int, offset: int, like: Tensor, keys: str = "") -> Tensor:
    """Return the column of each row's positive, or of the row itself: `offset` and the following."""
    offset = check_integer("label_offset", offset)
    if offset < 0 or offset + rows > columns:
        raise ValueError(
            f"{keys}: expected the positives of {rows} rows from label_offset {offset} on, got {columns} rows"
        )
    return torch.arange(offset, offset + rows, device=like.device)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """Write `a @ b` to `out`, or add it to `out`; accumulated in the dtype of `out`."""
    more: dict[str, Any] = {}
    if a.dtype != out.dtype:
        if out.is_cuda:
            more = {"out_dtype": out.dtype}
        else:  # where the CUDA kernels run on the CPU: the products of half-precision dtypes are exact in float32
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, **more, out=out)
    else:
        torch.mm(a, b, **more, out=out)


class Features:
    """Feature rows for the passes: `acc`, in the accumulation dtype, of length 1 if normalised."""

    def __init__(self, x: Tensor, normalize: bool):
        self.dtype = x.dtype
        self.acc = x.to(accumulation_dtype(x.dtype)).contiguous()
        self.length = None
        if normalize:
            self.length = torch.linalg.vector_norm(self.acc, dim=1, keepdim=True).clamp_min_(1e-12)
            self.acc = self.acc / self.length

    def gradient(self, d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the gradient with respect to the unnormalised rows, from that of `acc`; in their dtype or `dtype`."""
        if self.length is not None:
            d = (d - self.acc * (self.acc * d).sum(1, keepdim=True)) / self.length
        return d.to(self.dtype if dtype is None else dtype)


# ---- columns


class Block(NamedTuple):
    """Some columns of the matrix."""

    index: int  # type: ignore[assignment]  # its position in the order of columns; hides tuple.index
    columns: slice  # among the columns of all blocks
    y: Features | None  # [columns, features]; None: the rows themselves


class Columns(Protocol):
    """The columns of all processes in blocks, and how their gradients return to their owners."""

    first: int  # of this process's own columns, among all
    count: int  # of blocks

    def blocks(self) -> Iterable[Block]: ...

    def add(self, dy: Tensor | None) -> None:
        """Add this process's part of the gradient of the block that was given last."""
        ...

    def gradient(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the gradient of this process's own columns over all processes; that of the rows if there is no y."""
        ...

    def own_statistics(self, blocks: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Return maximum and log sum of this process's own columns, from the blocks' over this process's rows."""
        ...

    def of_all(self, *arrays: Tensor) -> Sequence[Tensor]:
        """Gather `arrays`, which hold this process's own columns, over the columns of all processes."""
        ...


class OneBlock:
    """All columns in one block: those of `y`, or without it the rows themselves."""

    first, count = 0, 1

    def __init__(self, rows: Features, y: Tensor | None, normalize: bool):
        self._rows = rows
        self._y = None if y is None else Features(y, normalize)

    def blocks(self) -> Sequence[Block]:
        y = self._rows if self._y is None else self._y
        return (Block(0, slice(0, y.acc.shape[0]), self._y),)

    def add(self, dy: Tensor | None) -> None:
        self._gradient = dy

    def gradient(self, dtype: torch.dtype | None = None) -> Tensor | None:
        dy = self._gradient
        return dy if self._y is None else self._y.gradient(dy, dtype)

    def own_statistics(self, blocks: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        return blocks[0]

    def of_all(self, *arrays: Tensor) -> Sequence[Tensor]:
        return arrays


def in_order(parts: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the sum of the parts, added up in their order; overwrites the first."""
    total, *others = parts
    for part in others:
        total.add_(part)
    return total


class BlockSums:
    """Sums over the blocks of a matrix: gradients of rows in order of arrival, arrays in the order of columns."""

    def __init__(self, blocks: int):
        self.dx: Tensor | None = None
        self._arrays: list[Any] = [None] * blocks

    def add(self, index: int, dx: Tensor | None, *arrays: Tensor) -> None:
        self.dx = dx if self.dx is None or dx is None else self.dx.add_(dx)
        self._arrays[index] = arrays

    def arrays(self) -> list[Tensor]:
        return [in_order(parts) for parts in zip(*self._arrays, strict=True)]


def merged(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the online softmax's states of all parts: maxima and logs of sums [parts, n]."""
    total_max = maxima.masked_fill(log_sums == -torch.inf, -torch.inf).amax(0)
    total_max = total_max.masked_fill(total_max == -torch.inf, 0.0)
    return total_max, ((maxima - total_max) + log_sums).logsumexp(0)


# ---- the matrix


class Matrix:
    """Similarities of the rows `x` and a block of columns, or of `x` with itself.

    With itself, where row i has the target column j, row j has i.
    """

    def __init__(
        self,
        operators: Any,
        x: Features,
        block: Block,
        scale: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: bool = False,
        target_col: Tensor | None = None,
        row_ids: Tensor | None = None,
        col_ids: Tensor | None = None,
        labels_are_positives: bool = False,
        positives_in_denominator: bool = False,
    ):
        self.operators, self.on_cpu = operators, runs_on_cpu(x.acc, operators)
        self.x, self.y, self.itself = x, x if block.y is None else block.y, block.y is None
        self.given_scale, self.temperature = scale, temperature
        scale = scale.reshape(()).to(x.acc.dtype)
        self.scale = 1 / scale if temperature else scale
        self.bias = None if bias is None else bias.reshape(()).to(scale.dtype)
        begin = block.columns.start
        if target_col is not None and begin:
            target_col = target_col - begin  # outside of the block there is none
        col_ids = row_ids if col_ids is None else col_ids[block.columns]
        self.entries = tuple(None if t is None else t.contiguous() for t in (target_col, row_ids, col_ids))
        self.flags = labels_are_positives, positives_in_denominator
        self.m, self.n = x.acc.shape[0], self.y.acc.shape[0]

    def empty(self, *shape: int) -> Tensor:
        return self.operators.scratch(self.x.acc, shape)

    def zeros(self, length: int) -> Tensor:
        return torch.zeros_like(self.x.acc.new_empty(length))

    def run(self, kind: int, gradients: bool = False, **arrays: Tensor | None) -> Sequence[Tensor | None]:
        """Run one pass over the matrix. With `gradients` it returns those of the rows `x.acc`, `y.acc`, and the scale.

        On the CPU, of x with itself the gradient of s and its transpose are computed as one matrix, with a row's arrays
        as the column's: one GEMM fewer, and no gradient of y.
        """
        x, y = self.x.acc, self.y.acc
        both = self.itself and kind in (SOFTMAX_GRADIENT, PAIRS_GRADIENT) and arrays.get("col_grad") is None
        both = both and self.on_cpu  # cuBLAS's s_ij and s_ji differ, and so would their maxima
        if both:
            of_rows = ("row_max", "row_log_sum", "row_grad")
            arrays |= {name.replace("row", "col"): arrays.get(name) for name in of_rows}
            arrays["col_positive_grad"] = arrays.get("positive_grad")
        given = [arrays.get(name) for name in ARRAYS]
        dx = dy = dots = None
        if gradients:
            dx, dots = self.empty(*x.shape), self.empty(self.m)
            dy = None if both else self.empty(*y.shape)
            if self.m == 0 or self.n == 0:
                dx, dots = dx.zero_(), dots.zero_()
                dy = None if both else dy.zero_()
        if self.on_cpu:
            bias = 0.0 if self.bias is None else self.bias.item()
            self.operators.tile_walk(
                kind, *self.flags, x, y, self.scale.item(), bias, *self.entries, *given, dx, dy, dots
            )
        else:
            self._run_in_blocks(kind, given, dx, dy, dots)
        if not gradients:
            return ()
        if not self.on_cpu:
            dx, dy = dx.mul_(self.scale), dy.mul_(self.scale)
        if both:
            dots *= 0.5
        return dx, dy, self._scale_gradient(self.operators.row_reduce(dots, None))

    def statistics(
        self, rows: bool, columns: bool
    ) -> tuple[list[Tensor | None], list[Tensor | None], Tensor]:
        """Return max and log sum of rows, the same of columns, and the positive (or sum of positives) of rows."""
        empty = self.x.acc.new_empty
        of_rows = [empty(self.m) if rows else None for _ in range(2)]
        of_cols = [empty(self.n) if columns else None for _ in range(2)]
        if self.m == 0 or self.n == 0:
            for array in (*of_rows, *of_cols):
                if array is not None:
                    array.fill_(-torch.inf if array is of_rows[1] or array is of_cols[1] else 0)
        positive = self.zeros(self.m)
        self.run(
            STATISTICS, row_max=of_rows[0], row_log_sum=of_rows[1], col_max=of_cols[0], col_log_sum=of_cols[1],
            positive=positive,
        )  # fmt: skip
        return of_rows, of_cols, positive

    def _scale_gradient(self, d: Tensor) -> Tensor:
        d = -d * self.scale.square() if self.temperature else d
        return d.reshape(self.given_scale.shape)

    def _run_in_blocks(
        self,
        kind: int,
        given: list[Tensor | None],
        dx: Tensor | None,
        dy: Tensor | None,
        dots: Tensor | None,
    ) -> None:
        if self.m == 0 or self.n == 0:
            return
        x, y = aligned(self.x.acc), aligned(self.y.acc)
        max_grad, dtype = None, self.x.dtype
        if dtype != x.dtype:  # GEMMs of half-precision dtypes, accumulated in float32
            x, y = x.to(dtype), y.to(dtype)
            if dx is not None and dtype == torch.float16:
                # relative to their maximum, so that small ones do not underflow
                places = [i for i in _GRADIENTS if given[i] is not None]
                finite = (given[i].abs().nan_to_num(0.0, 0.0) for i in places)
                max_grad = torch.stack([g.amax() for g in finite]).amax()
                max_grad = max_grad + (max_grad == 0)
                given = [g / max_grad if i in places else g for i, g in enumerate(given)]
        rows, cols = block_shape(self.m, self.n, self.x.acc.element_size(), kind == HARDEST)
        ld = -(-cols // 8) * 8
        workspace = self.empty(rows * ld)
        low_workspace = None
        if dx is not None and x.dtype != workspace.dtype:
            low_workspace = x.new_empty(rows * ld)
        for row in range(0, self.m, rows):
            down = slice(row, min(row + rows, self.m))
            for col in range(0, self.n, cols):
                across = slice(col, min(col + cols, self.n))
                s, g = (_block(t, down, across) for t in (workspace, low_workspace))
                _multiply(s, x[down], y[across].t())
                self.operators.tile_chunk(
                    kind, *self.flags, s, g, self.scale, self.bias, row, self.m, col, self.n, *self.entries, *given,
                    dots,
                )  # fmt: skip
                if dx is not None:
                    g = s if g is None else g
                    _multiply(dx[down], g, y[across], add=col > 0)
                    if dy is not None:
                        _multiply(dy[across], g.t(), x[down], add=row > 0)
        if max_grad is not None:
            for d in (dx, dy, dots):
                if d is not None:
                    d.mul_(max_grad)


def block_shape(m: int, n: int, itemsize: int, whole_rows: bool = False) -> tuple[int, int]:
    """Return rows and columns of the blocks of an m x n matrix: about square, `BUDGET` bytes at most.

    Blocks are equal, of multiples of 128 where there are several: the order of sums follows from m and n alone.
    """
    max_entries = max(1, BUDGET // itemsize)

    def even(length: int, limit: int) -> int:
        if length <= limit:
            return length
        unit = 128 if limit >= 128 else 1
        limit = limit // unit * unit
        part = -(-length // -(-length // limit))
        return -(-part // unit) * unit

    def padded(cols: int) -> int:
        return -(-cols // 8) * 8

    if whole_rows:
        return even(m, max(1, max_entries // padded(n))), n
    side = max(8, math.isqrt(max_entries) // 8 * 8)
    rows = even(m, max(side, max_entries // padded(n)))
    return rows, even(n, max(8, max_entries // rows // 8 * 8))


def _block(workspace: Tensor | None, down: slice, across: slice) -> Tensor | None:
    """Return a block in `workspace` whose rows begin at multiples of 8."""
    if workspace is None:
        return None
    rows, cols = down.stop - down.start, across.stop - across.start
    ld = -(-cols // 8) * 8
    return workspace[: rows * ld].view(rows, ld)[:, :cols]


# ---- the operators


class SimilarityOp(PythonOp):
    """An operator over a similarity matrix, written in Python over passes.

    The first inputs are `x`, `y` or None, and `scale`. Without y the columns are those of x, and without `col_ids` they
    have the ids of rows. With the attribute `temperature` the scale is a temperature, by which s is divided.
    """

    passes: ClassVar[int] = 1
    """Passes over the matrix in forward; in backward there is one, which also makes the gradients."""

    def __init__(self, name: str, reference: Callable[..., Any] | None, *, wrt: Sequence[int] = ()):
        super().__init__(name, reference, wrt=wrt)
        count_passes(self)

    def flops(self, shapes, needed):
        (m, features), columns = shapes[0], shapes[1] if "y" in self.Inputs._fields else None
        product = 2 * m * features * (m if columns is None else columns[0])
        if not any(needed):
            return self.passes * product
        # of x with itself both gradients are one product: on the CPU, see `Matrix.run`
        return product * (2 if columns is None else 3)


class SoftmaxInputs(NamedTuple):
    x: Tensor  # [m, features]
    y: Tensor | None  # [n, features]
    scale: Tensor  # one element
    base: Tensor | None = None  # [m], subtracted from a row's loss
    target_col: Tensor | None = None  # [m] int64: the column of the positive, or of the row itself
    row_ids: Tensor | None = None  # [m] int64
    col_ids: Tensor | None = None  # [n] int64
    inv_num_positives: Tensor | None = None  # [m]


class SoftmaxAttrs(NamedTuple):
    normalize: bool
    labels_are_positives: bool = (
        False  # entries of equal ids; else that of `target_col`, and equal ids are left out
    )
    positives_in_denominator: bool = False
    temperature: bool = False
    rows: bool = True
    columns: bool = False


class SoftmaxOutputs(NamedTuple):
    row: Tensor
    col: Tensor
    positive: Tensor


class SoftmaxState(NamedTuple):
    row_max: Tensor
    row_log_sum: Tensor
    col_max: Tensor
    col_log_sum: Tensor


class SoftmaxGradients(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    base: Tensor


class SoftmaxOp(SimilarityOp):
    """The log of the sum of exponentials of rows and columns, relative to the positive.

    For row i, with the positive or the sum of positives t_i,

        row_i = log sum_j exp(s_ij) - inv_num_positives_i t_i - base_i
        col_i = log sum_k exp(s_kj) - t_i, j = target_col_i

    and t_i itself; an empty sum of exponentials gives -inf.
    """

    Inputs, Attrs, Outputs, State = SoftmaxInputs, SoftmaxAttrs, SoftmaxOutputs, SoftmaxState
    Gradients = SoftmaxGradients

    def __init__(self, name: str, reference):
        super().__init__(name, reference, wrt=(0, 1, 2, 3))

    def shapes(self, inputs, attrs):
        x, y = inputs.x, inputs.y
        m, n = x.shape[0], x.shape[0] if y is None else y.shape[0]
        row, col, all_cols = (
            [m if attrs.rows else 0],
            [m if attrs.columns else 0],
            [n if attrs.columns else 0],
        )
        return (
            x.new_empty(shape, dtype=accumulation_dtype(x.dtype))
            for shape in (row, col, [m], row, row, all_cols, all_cols)
        )

    def forward(self, operators, inputs, attrs):
        rows = Features(inputs.x, attrs.normalize)
        return softmax_forward(operators, inputs, attrs, rows, OneBlock(rows, inputs.y, attrs.normalize))

    def backward(self, operators, grads, inputs, state, attrs):
        rows = Features(inputs.x, attrs.normalize)
        columns = OneBlock(rows, inputs.y, attrs.normalize)
        dx, dy, dscale, dbase = softmax_backward(operators, grads, inputs, state, attrs, rows, columns)
        dy = inputs.x.new_empty(0) if dy is None else dy
        dbase = inputs.x.new_empty(0) if dbase is None else dbase
        return dx, dy, dscale.to(inputs.scale.dtype), dbase


def _softmax_matrix(
    operators: Any, inputs: SoftmaxInputs, attrs: SoftmaxAttrs, rows: Features, block: Block
) -> Matrix:
    return Matrix(
        operators, rows, block, inputs.scale, temperature=attrs.temperature, target_col=inputs.target_col,
        row_ids=inputs.row_ids, col_ids=inputs.col_ids, labels_are_positives=attrs.labels_are_positives,
        positives_in_denominator=attrs.positives_in_denominator,
    )  # fmt: skip


def softmax_forward(
    operators: Any, inputs: SoftmaxInputs, attrs: SoftmaxAttrs, rows: Features, columns: Columns
) -> Sequence[Tensor]:
    """Return the fields of `SoftmaxOutputs` and `SoftmaxState`, of this process's rows and its own columns.

    `target_col` and `col_ids` are among the columns of all.
    """
    parts: list[Any] = [None] * columns.count
    for block in columns.blocks():
        s = _softmax_matrix(operators, inputs, attrs, rows, block)
        parts[block.index] = s.statistics(attrs.rows, attrs.columns)
    of_rows, of_cols, positives = zip(*parts, strict=True)
    positive = in_order(positives)
    if attrs.rows:
        row_max, row_log_sum = of_rows[0]
        if len(of_rows) > 1:
            row_max, row_log_sum = merged(*(torch.stack(t) for t in zip(*of_rows, strict=True)))
        t = positive if inputs.inv_num_positives is None else positive * inputs.inv_num_positives
        row = row_max - t
        row = (row if inputs.base is None else row - inputs.base) + row_log_sum
    else:
        row, row_max, row_log_sum = (positive.new_empty(0) for _ in range(3))
    if attrs.columns:
        col_max, col_log_sum = columns.own_statistics(of_cols)
        own = inputs.target_col - columns.first if columns.first else inputs.target_col
        col = (col_max[own] - positive) + col_log_sum[own]
    else:
        col, col_max, col_log_sum = (positive.new_empty(0) for _ in range(3))
    return row, col, positive, row_max, row_log_sum, col_max, col_log_sum


def softmax_backward(
    operators: Any, grads: SoftmaxOutputs, inputs: SoftmaxInputs, state: SoftmaxState, attrs: SoftmaxAttrs,
    rows: Features, columns: Columns,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Return the gradients of this process's `x`, `y`, scale and base; None for what is not given."""
    zero = torch.zeros_like(rows.acc.new_empty(rows.acc.shape[0]))
    g_row = grads.row.contiguous() if attrs.rows and grads.row is not None else None
    g_col = grads.col.contiguous() if attrs.columns and grads.col is not None else None
    up = zero if grads.positive is None else grads.positive
    arrays: dict[str, Tensor] = {}
    of_cols: Sequence[Tensor] = ()
    if g_row is not None:
        up = up - (g_row if inputs.inv_num_positives is None else g_row * inputs.inv_num_positives)
        arrays |= {"row_max": state.row_max, "row_log_sum": state.row_log_sum, "row_grad": g_row}
    if g_col is not None:
        up = up - g_col
        own = inputs.target_col - columns.first if columns.first else inputs.target_col
        grad = torch.zeros_like(state.col_max).scatter_(0, own, g_col)
        of_cols = columns.of_all(state.col_max, state.col_log_sum, grad)
    arrays["positive_grad"] = up.contiguous()
    sums = BlockSums(columns.count)
    for block in columns.blocks():
        if g_col is not None:
            here = of_cols if columns.count == 1 else [array[block.columns] for array in of_cols]
            arrays["col_max"], arrays["col_log_sum"], arrays["col_grad"] = here
        s = _softmax_matrix(operators, inputs, attrs, rows, block)
        dx, dy, dscale = s.run(SOFTMAX_GRADIENT, True, **arrays)
        sums.add(block.index, dx, dscale)
        columns.add(dy)
    (dscale,), dx, dy = sums.arrays(), sums.dx, columns.gradient()
    if inputs.y is None and dy is not None:
        dx, dy = dx.add_(dy), None
    dbase = None if inputs.base is None else (-zero if g_row is None else -g_row)
    return rows.gradient(dx), dy, dscale, dbase
