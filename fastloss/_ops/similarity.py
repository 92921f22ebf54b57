"""Losses of a matrix of similarities, s = scale * x y^T, that is never stored: operators and their autograd.

On the CPU one call walks the whole matrix in tiles, products included (csrc/cpu/kernels/similarity.h). On CUDA the
products are cuBLAS's, for a block of the matrix at a time that `BUDGET` bytes hold, and kernels of our own
(csrc/cuda/kernels/similarity.cu) make of such a block what is needed. What an entry counts as, `mark` and ids say: see
`EntryRule` in csrc/losses/similarity.h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastloss._ops import abi, autograd
from fastloss._ops.autograd import _functorch_active
from fastloss._ops.chunked_linear import aligned
from fastloss._ops.dtypes import accumulation_dtype

BUDGET = 256 << 20
"""Bytes of similarities that lie in memory on CUDA; their gradient in a half type takes half as many more."""
_PASSES = abi.enum("TilePass")
STATISTICS, SOFTMAX_GRADIENT = _PASSES["statistics"], _PASSES["softmax_gradient"]
PAIRS, PAIRS_GRADIENT = _PASSES["pairs"], _PASSES["pairs_gradient"]
SIGMOID, HARDEST = _PASSES["sigmoid"], _PASSES["hardest"]
_ARGUMENTS = [argument.name for argument in torch.ops.fastloss.tile_walk.default._schema.arguments]
ARRAYS = tuple(_ARGUMENTS[_ARGUMENTS.index("row_max") : _ARGUMENTS.index("hardest") + 1])
"""The arrays of rows and of columns that a pass reads or writes, in the order of the operators."""
_GRADIENTS = [ARRAYS.index(f"{name}_grad") for name in ("row", "col", "positive", "col_positive")]


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """`a @ b`, or that added to what `out` holds, summed in the type of `out`."""
    more: dict[str, Any] = {}
    if a.dtype != out.dtype:
        if out.is_cuda:
            more = {"out_dtype": out.dtype}
        else:  # where the CUDA kernels run on the CPU: the products of half types are exact in float32
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, **more, out=out)
    else:
        torch.mm(a, b, **more, out=out)


class Rows:
    """Rows of features as the walks take them: in the accumulation type, of length 1 if they are to be."""

    def __init__(self, x: Tensor, normalize: bool):
        self.dtype = x.dtype
        self.wide = x.to(accumulation_dtype(x.dtype)).contiguous()
        self.length = None
        if normalize:
            self.length = torch.linalg.vector_norm(self.wide, dim=1, keepdim=True).clamp_min_(1e-12)
            self.wide = self.wide / self.length

    def gradient(self, d: Tensor) -> Tensor:
        """Of x, from that of these rows."""
        if self.length is not None:
            d = (d - self.wide * (self.wide * d).sum(1, keepdim=True)) / self.length
        return d.to(self.dtype)


class Matrix:
    """Similarities of the rows `x` and `y`, or of `x` with itself, where a mark of i at j is one of j at i, too."""

    def __init__(
        self, operators, on_cpu, x, y, scale, bias, mark, row_ids, col_ids, flags, normalize, inverse=False
    ):  # fmt: skip
        self.operators, self.on_cpu = operators, on_cpu
        self.x = x if isinstance(x, Rows) else Rows(x, normalize)
        self.y = self.x if y is None else Rows(y, normalize)
        self.itself = y is None
        self.given_scale, self.inverse, self.low = scale, inverse, x.dtype
        scale = scale.reshape(()).to(self.x.wide.dtype)
        self.scale = 1 / scale if inverse else scale
        self.bias = None if bias is None else bias.reshape(()).to(scale.dtype)
        ids = row_ids, row_ids if col_ids is None else col_ids
        self.entries = tuple(None if t is None else t.contiguous() for t in (mark, *ids))
        self.flags = flags  # same_is_positive, with_positives
        self.m, self.n = self.x.wide.shape[0], self.y.wide.shape[0]

    def empty(self, *shape: int) -> Tensor:
        return self.operators.scratch(self.x.wide, shape)

    def walk(self, kind: int, gradients: bool = False, **arrays: Tensor | None) -> Sequence[Tensor]:
        """One pass. With `gradients` it gives those of x, y and the scale."""
        found = self.walk_wide(kind, gradients, **arrays)
        if not gradients:
            return ()
        dx, dy, dscale = found
        if self.itself and dy is not None:
            dx, dy = dx.add_(dy), None
        return (
            self.x.gradient(dx),
            dx.new_empty(0, dtype=self.low) if dy is None else self.y.gradient(dy),
            dscale,
        )

    def walk_wide(
        self, kind: int, gradients: bool = False, **arrays: Tensor | None
    ) -> Sequence[Tensor | None]:
        """One pass. With `gradients` it gives those of the rows `x.wide` and `y.wide`, and of the scale.

        On the CPU, of x with itself the gradient of s and its transpose are made as one matrix, with a row's arrays
        as the column's: one product fewer, and no gradient of y.
        """
        x, y = self.x.wide, self.y.wide
        both = self.itself and kind in (SOFTMAX_GRADIENT, PAIRS_GRADIENT) and arrays.get("col_grad") is None
        both = (
            both and self.on_cpu
        )  # the library's s_ij and s_ji differ, and so would what they are relative to
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
            self._walk_blocks(kind, given, dx, dy, dots)
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
        """Of rows and of columns the maximum and the log of the sum; of rows the positive or the positives' sum."""
        empty = self.x.wide.new_empty
        of_rows = [empty(self.m) if rows else None for _ in range(2)]
        of_cols = [empty(self.n) if columns else None for _ in range(2)]
        if self.m == 0 or self.n == 0:
            for array in (*of_rows, *of_cols):
                if array is not None:
                    array.fill_(-torch.inf if array is of_rows[1] or array is of_cols[1] else 0)
        positive = torch.zeros_like(empty(self.m))
        self.walk(
            STATISTICS, row_max=of_rows[0], row_log_sum=of_rows[1], col_max=of_cols[0], col_log_sum=of_cols[1],
            positive=positive,
        )  # fmt: skip
        return of_rows, of_cols, positive

    def _scale_gradient(self, d: Tensor) -> Tensor:
        d = -d * self.scale.square() if self.inverse else d
        return d.reshape(self.given_scale.shape)

    def _walk_blocks(
        self,
        kind: int,
        given: list[Tensor | None],
        dx: Tensor | None,
        dy: Tensor | None,
        dots: Tensor | None,
    ) -> None:
        if self.m == 0 or self.n == 0:
            return
        x, y = aligned(self.x.wide), aligned(self.y.wide)
        top = None
        if self.low != x.dtype:  # products of half types, summed in float32
            x, y = x.to(self.low), y.to(self.low)
            if dx is not None and self.low == torch.float16:
                # relative to the largest number among them, so that small ones are not lost
                places = [i for i in _GRADIENTS if given[i] is not None]
                finite = (given[i].abs().nan_to_num(0.0, 0.0) for i in places)
                top = torch.stack([g.amax() for g in finite]).amax()
                top = top + (top == 0)
                given = [g / top if i in places else g for i, g in enumerate(given)]
        rows, cols = block_shape(self.m, self.n, self.x.wide.element_size(), kind == HARDEST)
        pitch = -(-cols // 8) * 8
        room = self.empty(rows * pitch)
        low_room = None
        if dx is not None and x.dtype != room.dtype:
            low_room = x.new_empty(rows * pitch)
        for row in range(0, self.m, rows):
            down = slice(row, min(row + rows, self.m))
            for col in range(0, self.n, cols):
                across = slice(col, min(col + cols, self.n))
                s, g = (_block(t, down, across) for t in (room, low_room))
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
        if top is not None:
            for d in (dx, dy, dots):
                if d is not None:
                    d.mul_(top)


def block_shape(m: int, n: int, itemsize: int, whole_rows: bool = False) -> tuple[int, int]:
    """Rows and columns of the blocks of an m x n matrix: about as many of either, `BUDGET` bytes at most.

    Blocks that are alike, of multiples of 128 where there are several: sizes on which sums depend follow from m and n.
    """
    most = max(1, BUDGET // itemsize)

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
        return even(m, max(1, most // padded(n))), n
    side = max(8, math.isqrt(most) // 8 * 8)
    rows = even(m, max(side, most // padded(n)))
    return rows, even(n, max(8, most // rows // 8 * 8))


def _block(room: Tensor | None, down: slice, across: slice) -> Tensor | None:
    """A block in `room`, of rows that begin at multiples of 8."""
    if room is None:
        return None
    rows, cols = down.stop - down.start, across.stop - across.start
    pitch = -(-cols // 8) * 8
    return room[: rows * pitch].view(rows, pitch)[:, :cols]


class TileOp(autograd.PythonOp):
    """An operator over a matrix of similarities, written in Python over the walks.

    The first tensors are `(x, y or None, scale)`: without y it is x with itself, and without `col_ids` columns
    have the ids of rows. With `inverse` the scale is a temperature. The last option, `wanted`, is added here:
    as bits, the tensors whose gradients are.
    """

    def __init__(self, name: str, reference, *, tensors: int, wrt: Sequence[int], outputs: int):
        def without_wanted(*args):
            return reference(*args[:-1])

        super().__init__(name, without_wanted, self.shapes, tensors=tensors, wrt=wrt, outputs=outputs)

    def implement(self, kind, operators, where):
        run = self.forward if kind == "fwd" else self.backward
        return functools.partial(torch.no_grad()(run), operators, where == "cpu")

    def __call__(self, tensors, options):
        transformed = not torch.compiler.is_compiling() and _functorch_active()
        wanted = autograd.wanted_bits(self, tensors) if transformed or torch.is_grad_enabled() else 0
        return super().__call__(tensors, (*options, wanted))

    def shapes(self, *args):
        raise NotImplementedError

    def forward(self, operators, on_cpu, *args):
        raise NotImplementedError

    def fake_backward(self, *args):
        tensors = args[self.outputs : self.outputs + self.tensors]
        return tuple(
            tensors[0].new_empty([0])
            if t is None
            else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (tensors[i] for i in self.wrt)
        )


class SoftmaxOp(TileOp):
    """log sum exp of rows and columns relative to the positive.

    Tensors `(x, y, scale, base, mark, row_ids, col_ids, share)`, of which the first four are differentiated;
    options `same_is_positive, with_positives, normalize, inverse, rows, columns`. Of row i, with a positive or the sum
    of the positives t_i,

        row_i = log sum_j exp(s_ij) - share_i t_i - base_i,    col_i = log sum_k exp(s_kj) - t_i, j = mark_i

    and t_i itself; where nothing is summed it is -inf.
    """

    _TENSORS = (
        "Tensor x, Tensor? y, Tensor scale, Tensor? base, Tensor? mark, Tensor? row_ids, Tensor? col_ids, "
        "Tensor? share, "
    )
    _OPTIONS = (
        "bool same_is_positive, bool with_positives, bool normalize, bool inverse, bool rows, bool columns, "
        "int wanted"
    )
    _STATE = "Tensor row_max, Tensor row_log_sum, Tensor col_max, Tensor col_log_sum"
    schemas: ClassVar = {
        "fwd": f"({_TENSORS}{_OPTIONS}) -> (Tensor row, Tensor col, Tensor positive, {_STATE})",
        "bwd": f"(Tensor? row_grad, Tensor? col_grad, Tensor? positive_grad, {_TENSORS}{_STATE}, {_OPTIONS}) "
        "-> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbase)",
    }

    def __init__(self, name: str, reference):
        super().__init__(name, reference, tensors=8, wrt=(0, 1, 2, 3), outputs=3)

    def shapes(
        self,
        x,
        y,
        scale,
        base,
        mark,
        row_ids,
        col_ids,
        share,
        same,
        both,
        normalize,
        inverse,
        rows,
        columns,
        _,
    ):
        high = accumulation_dtype(x.dtype)
        m, n = x.shape[0], x.shape[0] if y is None else y.shape[0]
        one = [m if rows else 0], [m if columns else 0], [m]
        return tuple(
            x.new_empty(shape, dtype=high) for shape in (*one, one[0], one[0], *([[n if columns else 0]] * 2))
        )

    def forward(
        self, operators, on_cpu, x, y, scale, base, mark, row_ids, col_ids, share, same, both, normalize, inverse, rows,
        columns, _,
    ):  # fmt: skip
        s = Matrix(
            operators, on_cpu, x, y, scale, None, mark, row_ids, col_ids, (same, both), normalize, inverse
        )
        of_rows, of_cols, positive = s.statistics(rows, columns)
        empty = s.x.wide.new_empty
        row, col = empty(0), empty(0)
        if rows:
            row = of_rows[0] - (positive if share is None else positive * share)
            row = (row if base is None else row - base) + of_rows[1]
        if columns:
            col = (of_cols[0][mark] - positive) + of_cols[1][mark]
        kept = (empty(0) if array is None else array for array in (*of_rows, *of_cols))
        return row, col, positive, *kept

    def backward(
        self, operators, on_cpu, g_row, g_col, g_positive, x, y, scale, base, mark, row_ids, col_ids, share,
        row_max, row_log_sum, col_max, col_log_sum, same, both, normalize, inverse, rows, columns, wanted,
    ):  # fmt: skip
        s = Matrix(
            operators, on_cpu, x, y, scale, None, mark, row_ids, col_ids, (same, both), normalize, inverse
        )
        zero = torch.zeros_like(s.x.wide.new_empty(s.m))
        g_row = g_row.contiguous() if rows and g_row is not None else None
        g_col = g_col.contiguous() if columns and g_col is not None else None
        up = zero if g_positive is None else g_positive
        arrays = {}
        if g_row is not None:
            up = up - (g_row if share is None else g_row * share)
            arrays |= {"row_max": row_max, "row_log_sum": row_log_sum, "row_grad": g_row}
        if g_col is not None:
            up = up - g_col
            grad = torch.zeros_like(s.x.wide.new_empty(s.n)).scatter_(0, mark, g_col)
            arrays |= {"col_max": col_max, "col_log_sum": col_log_sum, "col_grad": grad}
        dbase = x.new_empty(0) if base is None else (-zero if g_row is None else -g_row)
        dx, dy, dscale = s.walk(SOFTMAX_GRADIENT, True, positive_grad=up.contiguous(), **arrays)
        return dx, dy, dscale.to(scale.dtype), dbase


def marks(rows: int, columns: int, offset: int, like: Tensor, keys: str = "") -> Tensor:
    if not isinstance(offset, int):
        raise TypeError(f"label_offset: expected an int, got {type(offset).__name__}")
    if offset < 0 or offset + rows > columns:
        raise ValueError(
            f"{keys}: expected the positives of {rows} rows from label_offset {offset} on, got {columns} rows"
        )
    return torch.arange(offset, offset + rows, device=like.device)
