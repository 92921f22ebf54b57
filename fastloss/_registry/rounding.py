"""Rounding at random: how far a result moves if each of its operations rounds anew."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Operations without rounding: they move, select, compare or change signs. A missing one is rounded needlessly.
# fmt: off
_EXACT = frozenset({
    "_local_scalar_dense", "_to_copy", "_unique2", "_unsafe_view", "abs", "alias", "all", "amax", "amin",
    "any", "argmax", "argmin", "argsort", "as_strided", "bernoulli", "bitwise_and", "bitwise_not",
    "bitwise_or", "broadcast_tensors", "bucketize", "cat", "ceil", "clamp", "clamp_max", "clamp_min",
    "clone", "constant_pad_nd", "contiguous", "copy", "detach", "diag_embed", "diagonal_backward",
    "embedding", "empty_like", "eq", "expand", "fill", "flip", "floor", "full_like", "gather", "ge", "gt",
    "index", "index_fill", "index_select", "isfinite", "isinf", "isnan", "isneginf", "isposinf", "le",
    "lift_fresh", "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "masked_scatter",
    "masked_select", "max", "maximum", "median", "min", "minimum", "mode", "nan_to_num", "narrow_copy",
    "ne", "neg", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "nonzero",
    "ones_like", "relu", "repeat", "repeat_interleave", "roll", "round", "scatter", "searchsorted",
    "select_backward", "select_scatter", "sgn", "sign", "slice_backward", "slice_scatter", "sort",
    "stack", "threshold", "threshold_backward", "topk", "tril", "triu", "unbind", "unfold_backward",
    "unique_dim", "value_selecting_reduction_backward", "where", "zero", "zeros_like",
})
# fmt: on

SUMS = ("sum", "mean")
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "addmv": 1, "baddbmm": 1}
"""Products of matrices, and which argument is the first matrix."""


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class RandomRounding(TorchDispatchMode):
    """Multiplies results of operations, and inputs of reductions and GEMMs, by 1 + d, d uniform in [-unit, unit].

    Operations named in `chains` add from their first to their last term, and each addition rounds.
    """

    def __init__(self, unit: float, seed: int, chains: Container[str] = ()) -> None:
        super().__init__()
        self.unit, self.generator, self.chains = unit, torch.Generator().manual_seed(seed), chains

    def deviations(self, shape: Sequence[int]) -> Tensor:
        d = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return d.mul_(2 * self.unit).sub_(self.unit)

    def factor(self, x: Tensor) -> Tensor:
        return self.deviations(x.shape).add_(1.0)

    def chained(self, x: Tensor, dims: Sequence[int] | None) -> Tensor:
        """Round `x`, whose sum over these dimensions is a chain: its terms by what every later addition rounds."""
        over = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
        each = [d for d in range(x.dim()) if d not in over]
        last = x.permute(each + over)
        d = self.deviations((*(x.shape[i] for i in each), math.prod(x.shape[i] for i in over)))
        later = d.flip(-1).cumsum(-1).flip(-1).view(last.shape)
        return (last * (1.0 + later)).permute(sorted(range(x.dim()), key=(each + over).__getitem__))

    def rounded(self, x: Any) -> Any:
        return x * self.factor(x) if is_float(x) else x

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name.removeprefix("aten::").rstrip("_")
        if op.is_view or name in _EXACT:
            return op(*args, **kwargs)
        in_place = op._schema.is_mutable
        if name in SUMS and name in self.chains and is_float(args[0]) and args[0].dim():
            args = (self.chained(args[0], args[1] if len(args) > 1 else None), *args[1:])
        elif name in PRODUCTS and name in self.chains:
            i = PRODUCTS[name]
            args = (*tree_map(self.rounded, args[:i]), self.chained(args[i], [-1]), *args[i + 1 :])
        elif torch.Tag.pointwise not in op.tags:
            kept = args[:1] if in_place else ()
            args = kept + tree_map(self.rounded, args[len(kept) :])
        result = op(*args, **kwargs)
        if in_place:
            for x in (result,) if isinstance(result, Tensor) else result:
                if is_float(x):
                    x.mul_(self.factor(x))
            return result
        return tree_map(self.rounded, result)
