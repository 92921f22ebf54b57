"""The FLOPs of the operators that multiply matrices, for `torch.utils.flop_counter.FlopCounterMode`.

What is counted are the products that an operator runs, by shapes alone: as if every row counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastloss._ops.autograd import LIBRARY, PythonOp
from fastloss._ops.precomputed import PrecomputedOp

_operators = getattr(torch.ops, LIBRARY)


def _shapes(tensors: Sequence[Tensor | None]) -> list[torch.Size | None]:
    return [None if t is None else t.shape for t in tensors]


def _of_mask(mask: int, tensors: int) -> list[bool]:
    return [bool(mask >> i & 1) for i in range(tensors)]


def count(name: str, formula: Callable[..., int]) -> None:
    """Register the formula of an operator, which takes the operator's arguments."""

    def with_result(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    register_flop_formula(getattr(_operators, name), get_raw=True)(with_result)


def count_passes(op: PythonOp) -> None:
    """Register the formulas of both passes of an operator, from its `flops`."""
    tensors, outputs, wrt = op.tensors, op.outputs, op.wrt

    def forward(*args: Any) -> int:
        needed = _of_mask(args[-1], tensors) if isinstance(op, PrecomputedOp) else ()
        return op.flops(_shapes(args[:tensors]), needed if any(needed) else ())

    def backward(*args: Any) -> int:
        inputs = args[outputs : outputs + tensors]
        if isinstance(op, PrecomputedOp) and op.is_precomputed(inputs, *args[outputs + tensors :]):
            return 0
        needed = _of_mask(args[-1], tensors) if op.masked else [i in wrt for i in range(tensors)]
        return op.flops(_shapes(inputs), needed)

    count(f"{op.name}_fwd", forward)
    if op.Gradients is not None:
        count(f"{op.name}_bwd", backward)
