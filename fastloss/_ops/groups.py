"""Segment sums without float atomics: sort by group, then add up segment by segment.

The order of a sum, in float64, depends on the members of its group alone. Group ids are any integers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["Groups"]


class _Transfer(Function):
    """Sums members by group, or broadcasts sums back to the members: each is the derivative of the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor, lengths: Tensor, group: Tensor, to_groups: bool) -> Tensor:
        if not to_groups:
            return x[group]
        if not x.numel():
            return x.new_zeros(lengths.shape)
        sums = torch.segment_reduce(x[order].double(), "sum", lengths=lengths, axis=0, unsafe=True)
        return sums.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:4])
        ctx.to_groups = inputs[4]

    @staticmethod
    def backward(ctx, grad):
        return _Transfer.apply(grad, *ctx.saved_tensors, not ctx.to_groups), *[None] * 4


class Groups:
    """The members of groups: `ids` of shape (N), numbers in [0, count), or any where there is no count."""

    def __init__(self, ids: Tensor, count: int | None = None):
        ids = ids.long()
        if count is None:
            ordered, self.order = ids.sort(stable=True)
            place = torch.ones_like(ordered)
            place[1:] = ordered[1:] != ordered[:-1]
            place = place.cumsum(0) - 1  # 0 for the smallest id, and so on
            self.group = torch.empty_like(place).scatter(0, self.order, place)
        else:
            self.group = ids
            place, self.order = ids.sort(stable=True)
        numbers = torch.arange(ids.shape[0] if count is None else count, device=ids.device)
        self.ends = torch.searchsorted(place, numbers, right=True)
        self.lengths = self.ends.diff(prepend=self.ends.new_zeros(1))

    def sums(self, x: Tensor) -> Tensor:
        """Return the sum of each group."""
        return _Transfer.apply(x, self.order, self.lengths, self.group, True)

    def firsts(self, x: Tensor) -> Tensor:
        """Return for each member the first of its group, as a constant."""
        return x.detach()[self.order][(self.ends - self.lengths)[self.group]]

    def of(self, sums: Tensor) -> Tensor:
        """Return for each member the sum of its group."""
        return _Transfer.apply(sums, self.order, self.lengths, self.group, False)
