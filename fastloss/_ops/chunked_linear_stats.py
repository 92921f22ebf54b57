"""Statistics of rows of `input @ weight.T + bias` (see `token_stats`), without the matrix of all logits.

Forward computes the logits of a chunk of rows and keeps a few numbers per row; backward computes them again, turns them
into their gradient, and multiplies that by hidden states and weight. Chunks and GEMMs are those of `chunked_linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastloss._ops import abi, autograd, chunked_linear
from fastloss._ops.dtypes import accumulation_dtype
from fastloss._ops.flops import count_passes
from fastloss._ops.rowwise import state_width

_STATE = state_width("token_stats")
_STATISTICS = abi.fact("token_stats", "outputs")


class LinearStatsInputs(NamedTuple):
    input: Tensor  # [rows, features]
    linear_weight: Tensor  # [classes, features]
    linear_bias: Tensor | None  # [classes]
    index: Tensor | None  # type: ignore[assignment]  # [rows, K] int64; hides tuple.index
    mask: Tensor | None  # [rows] bool


class LinearStatsAttrs(NamedTuple):
    logit_scale: float
    softcap: float
    everything: bool
    max_extra_bytes: int


class LinearStatsOutputs(NamedTuple):
    outputs: Tensor  # [statistics + 2 K, rows] as those of `token_stats`, 0 in rows that are masked


class LinearStatsState(NamedTuple):
    state: Tensor  # [rows, numbers that backward needs]


class LinearStatsGradients(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor


class _Chunks:
    """Iterates over chunks of the rows that count: their indices, hidden states and logits."""

    def __init__(self, operators: Any, inputs: LinearStatsInputs, max_extra_bytes: int):
        input, weight, mask = inputs.input, inputs.linear_weight, inputs.mask
        products = chunked_linear.products_for(operators, input)
        on_cpu = products is chunked_linear.PackedProducts
        if not on_cpu:
            input, weight = chunked_linear.aligned(input), chunked_linear.aligned(weight)
        self.operators, self.input = operators, input
        self.product = products(operators, weight, inputs.linear_bias)
        self.mask = mask
        self.counted = None
        if on_cpu and mask is not None:
            self.mask = None
            if not mask.all():
                self.counted = mask.nonzero().squeeze(1)
        self.total = input.shape[0] if self.counted is None else self.counted.numel()
        classes, features = weight.shape
        width, dtype = 2 * classes, self.product.logits_type  # the logits and their gradient
        most = chunked_linear.rows_within(max_extra_bytes, classes, width, features, dtype, on_cpu)
        rows = chunked_linear.rows_of_a_chunk(width, features, dtype, on_cpu, most)
        self.step = min(rows, max(self.total, 1))
        self.shape = self.step, classes

    def one_product(self, weight: Tensor) -> bool:
        """Return whether one GEMM writes the weight's gradient, in the dtype of the weight."""
        return self.total <= self.step and chunked_linear.narrow_weight_gradient(type(self.product), weight)

    def __iter__(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        if self.product.logits_type == accumulation_dtype(self.input.dtype):
            workspace = self.operators.scratch(self.input, self.shape)
        else:
            workspace = self.input.new_empty(self.shape)
        for begin in range(0, self.total, self.step):
            end = min(begin + self.step, self.total)
            pick = slice(begin, end) if self.counted is None else self.counted[begin:end]
            x = self.input[pick].to(self.product.row_type)
            if self.mask is not None:  # 0 times what it holds may be NaN in the weight's gradient
                x = x.masked_fill(~self.mask[pick].unsqueeze(1), 0)
            x = x.contiguous()
            logits = workspace[: end - begin]
            self.product.logits(logits, x)
            yield pick, x, logits


class LinearStatsOp(autograd.PythonOp):
    """The statistics of `token_stats`, of which the first three inputs are differentiated."""

    Inputs, Attrs, Outputs = LinearStatsInputs, LinearStatsAttrs, LinearStatsOutputs
    State, Gradients = LinearStatsState, LinearStatsGradients
    masked = True

    def __init__(self, name: str, reference: Callable[..., Tensor]):
        super().__init__(name, reference, wrt=(0, 1, 2))
        count_passes(self)

    def shapes(self, inputs, attrs, mask):
        input, index = inputs.input, inputs.index
        num_outputs = _STATISTICS + (2 * index.shape[-1] if index is not None else 0)
        for shape in ([num_outputs, input.shape[0]], [input.shape[0], _STATE]):
            yield input.new_empty(shape, dtype=accumulation_dtype(input.dtype))

    def forward(self, operators, inputs, attrs, mask):
        input, index = inputs.input, inputs.index
        rows, acc_dtype = input.shape[0], accumulation_dtype(input.dtype)
        outputs = input.new_zeros(
            [_STATISTICS + (2 * index.shape[-1] if index is not None else 0), rows], dtype=acc_dtype
        )
        state = input.new_zeros([rows, _STATE], dtype=acc_dtype)
        chunks = _Chunks(operators, inputs, attrs.max_extra_bytes)
        for pick, _, logits in chunks:
            of_chunk = None if index is None else index[pick]
            kept = None if chunks.mask is None else chunks.mask[pick]
            outputs[:, pick], state[pick] = operators.token_stats_fwd(logits, of_chunk, kept, *attrs[:-1])
        return outputs, state

    def backward(self, operators, grads, inputs, state, attrs, mask):
        input, index = inputs.input, inputs.index
        (rows, features), classes = input.shape, inputs.linear_weight.shape[0]

        def result(bit: int, *shape: int) -> Tensor:
            return operators.scratch(input, shape if mask & bit else [0])

        dx = result(chunked_linear.INPUT, rows, features)
        db = result(chunked_linear.BIAS, classes)
        chunks = _Chunks(operators, inputs, attrs.max_extra_bytes)
        if mask & chunked_linear.WEIGHT and chunks.one_product(inputs.linear_weight):
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
                grads.outputs[:, pick], logits, of_chunk, kept, state.state[pick], *attrs[:-1]
            )
            if mask & chunked_linear.INPUT:
                part = dx[pick] if chunks.counted is None else dx.new_empty(x.shape)
                chunks.product.input_gradient(part, g)
                if chunks.counted is not None:
                    dx[pick] = part
            if mask & (chunked_linear.WEIGHT | chunked_linear.BIAS):
                into = (
                    dw if mask & chunked_linear.WEIGHT else None,
                    db if mask & chunked_linear.BIAS else None,
                )
                chunks.product.weight_gradient(*into, g, x, add)
            del g  # before the next chunk's takes its place
            add = True
        if not add:
            dw.zero_()
            db.zero_()
        return tuple(d if d.dtype == input.dtype else d.to(input.dtype) for d in (dx, dw, db))

    def flops(self, shapes, needed):
        (rows, features), (classes, _) = shapes[:2]
        return 2 * rows * features * classes * (1 + sum(needed[:2]))  # backward makes the logits again
