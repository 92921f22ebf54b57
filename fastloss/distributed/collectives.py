"""Collectives: rows gathered, parts added up in the order of ranks, and the layout of rows over ranks."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastloss._ops.autograd import HALF_TYPES
from fastloss._ops.similarity import in_order

__all__ = ["all_gather", "sum_of_gradients"]

_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def check_group(group: Any) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: torch.distributed is not initialised; call init_process_group first")
    if dist.get_rank(group) < 0:
        raise RuntimeError("group: this process is not one of its ranks")


def check_once() -> None:
    """Raise in a backward pass with create_graph: its saved tensors depend on every rank's input."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the loss over several processes can be differentiated once: not with create_graph"
        )


def _added_up(x: Tensor, group: Any) -> Tensor:
    """All-reduce: return the sum over the ranks, in float32 for half-precision dtypes."""
    total = x.to(torch.float32 if x.dtype in HALF_TYPES else x.dtype, copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(x.dtype)


class _Linear(Function):
    """A linear map of one tensor, and its adjoint for gradients."""

    @staticmethod
    def forward(ctx, x, forward, adjoint):
        ctx.adjoint = adjoint
        return forward(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.adjoint(grad), None, None


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x)


def _once(adjoint: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the adjoint as a function that raises when its result is differentiated."""
    wrapped = once_differentiable(lambda _, grad: adjoint(grad))
    return lambda grad: wrapped(None, grad)


def all_gather(x: Tensor, group: Any = None) -> Tensor:
    """Return the tensors of all ranks one after another along their first dimension, differentiable.

    Backward adds the gradients up over the ranks and gives each its own part: that of the sum of all ranks' losses.

    Args:
        x: of the same shape and dtype on every rank.
        group: a process group. Default: all processes.
    """
    check_group(group)
    rows, begin = x.shape[0], dist.get_rank(group) * x.shape[0]

    def gather(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    def own_part(grad: Tensor) -> Tensor:
        return _added_up(grad, group)[begin : begin + rows].clone()

    return _Linear.apply(x.contiguous(), gather, _once(own_part))


def sum_of_gradients(x: Tensor, group: Any = None) -> Tensor:
    """Return `x`, which is replicated while each rank computes with a part of it: backward all-reduces its gradient."""
    check_group(group)
    return _Linear.apply(x, _alias, _once(lambda grad: _added_up(grad, group)))


# ---- rows that are distributed over ranks


class Ranks:
    """The ranks of a group and the number of rows of each; all rows together are in the order of ranks."""

    def __init__(self, group: Any, counts: Sequence[int]):
        self.group, self.counts = group, tuple(counts)
        self.rank, self.size = dist.get_rank(group), len(self.counts)
        self.starts = (0, *itertools.accumulate(self.counts))
        self.begin, self.total = self.starts[self.rank], self.starts[-1]
        self.local = self.of(self.rank)

    def of(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank + 1])

    def times(self, factor: int) -> Ranks:
        return Ranks(self.group, [factor * n for n in self.counts])

    def gathered(self, x: Tensor) -> Tensor:
        """All-gather: return all rows."""
        max_count = max(self.counts)
        if self.size == 1 or max_count == 0:
            return x
        pad = max_count - x.shape[0]
        padded = torch.cat([x, x.new_zeros(pad, *x.shape[1:])]) if pad else x.contiguous()
        found = x.new_empty(self.size * max_count, *x.shape[1:])
        _gather(found, padded, group=self.group)
        if self.total == found.shape[0]:
            return found
        return torch.cat([part[:n] for part, n in zip(found.split(max_count), self.counts, strict=True)])

    def parts(self, x: Tensor) -> Tensor:
        """All-to-all: return [size, local rows, ...], the rows of this rank in each rank's `x`, which has all rows."""
        local = self.counts[self.rank]
        if self.size == 1:
            return x.unsqueeze(0)
        found = x.new_empty(self.size * local, *x.shape[1:])
        dist.all_to_all_single(
            found, x.contiguous(), [local] * self.size, list(self.counts), group=self.group
        )
        return found.view(self.size, local, *x.shape[1:])

    def passed_on(self, x: Tensor, rows: int, tag: int) -> Callable[[], Tensor]:
        """Send `x` to the next rank; return a function that waits for the `rows` rows of the previous one."""
        if self.size == 1:
            return lambda: x
        found = x.new_empty(rows, *x.shape[1:])
        ends = (dist.isend, x.contiguous(), 1), (dist.irecv, found, -1)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(way, t, group=self.group, tag=tag, group_peer=(self.rank + step) % self.size)
                for way, t, step in ends
                if t.numel()
            ]
        )

        def wait():  # until then `ends` are held, which the device may still read
            for work in works:
                work.wait()
            return ends[1][1]

        return wait


def everyone(x: Tensor, ranks: Ranks) -> Tensor:
    """Return all rows, from which every rank computes the same scalar: each rank gets the gradient of its own rows."""

    def gather(x: Tensor) -> Tensor:
        found = ranks.gathered(x)
        return _alias(found) if found is x else found

    return _Linear.apply(x, gather, lambda grad: grad[ranks.local])


def completed(x: Tensor, ranks: Ranks) -> Tensor:
    """Return a replicated scalar whose gradient is added up over the ranks, in their order."""

    def add_up(grad: Tensor) -> Tensor:
        check_once()
        single = Ranks(ranks.group, [1] * ranks.size)
        return in_order(single.gathered(grad.reshape(1, 1).clone())).reshape(grad.shape)

    return _Linear.apply(x, _alias, add_up)


def multiplied(x: Tensor, factor: float) -> Tensor:
    """Return `x`, whose gradient is multiplied by `factor`."""
    return _Linear.apply(x, _alias, lambda grad: grad * factor)


# ---- agreement between ranks


_CAPACITY = 32


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def agreed(call: str, group: Any, counts: Sequence[int], same: dict[str, Any]) -> list[list[int]]:
    """Check on the CPU that all ranks make the same call with equal values in `same`; return each rank's `counts`."""
    codes = [v if _is_size(v) else zlib.crc32(repr(v).encode()) for v in same.values()]
    mine = [zlib.crc32(call.encode()), *counts, *codes]
    mine += [0] * (_CAPACITY - len(mine))
    world = Ranks(group, [1] * dist.get_world_size(group))
    found = world.gathered(torch.tensor([mine], device="cpu")).tolist()
    if any(row[0] != mine[0] for row in found):
        raise RuntimeError(f"{call}: other ranks compute another loss")
    for at, (name, value) in enumerate(same.items(), start=1 + len(counts)):
        of_ranks = [row[at] for row in found]
        if len(set(of_ranks)) > 1:
            what = f"got {of_ranks}" if _is_size(value) else f"rank {world.rank} has {value}"
            raise ValueError(f"{name}: expected the same on every rank, {what}")
    return [row[1 : 1 + len(counts)] for row in found]
