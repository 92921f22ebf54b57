"""The exchange of columns between ranks: by an all-gather beforehand, or passed around a ring.

Both yield the columns of all ranks in blocks and return the gradients to the columns' owners. They implement `Columns`
of `fastloss._ops.similarity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastloss._ops.similarity import Block, Features, in_order, merged
from fastloss.distributed.collectives import Ranks


class Exchange:
    """The columns of all ranks, of which this rank has `y`, or without it its rows `x`.

    `gathered` is what `gather` returned in forward, from which backward starts.
    """

    count: int

    def __init__(self, x: Tensor, y: Tensor | None, gathered: Tensor, ranks: Ranks, normalize: bool):
        self._own, self._itself = x if y is None else y, y is None
        self._gathered, self._ranks, self._normalize = gathered, ranks, normalize
        self.first = ranks.begin

    @staticmethod
    def gather(own: Tensor, ranks: Ranks) -> Tensor:
        """Return the columns of other ranks that this rank holds from forward to backward."""
        raise NotImplementedError

    def own_statistics(self, blocks: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        of_cols = torch.stack([torch.cat(t) for t in zip(*blocks, strict=True)], 1)
        return merged(*self._ranks.parts(of_cols).unbind(2))

    def of_all(self, *arrays: Tensor) -> Sequence[Tensor]:
        return self._ranks.gathered(torch.stack(arrays, 1)).t().contiguous().unbind()

    def blocks(self) -> Iterator[Block]:
        raise NotImplementedError

    def add(self, dy: Tensor) -> None:
        raise NotImplementedError

    def gradient(self, dtype: torch.dtype | None = None) -> Tensor:
        dy = self._all_ranks_gradient()
        return dy if self._itself else Features(self._own, self._normalize).gradient(dy, dtype)

    def _all_ranks_gradient(self) -> Tensor:
        raise NotImplementedError


class Gathered(Exchange):
    """All columns in one block: memory for all of them, one all-gather, and one all-to-all of the gradient."""

    count = 1

    @staticmethod
    def gather(own: Tensor, ranks: Ranks) -> Tensor:
        found = ranks.gathered(own)
        return own.clone() if found is own else found

    def blocks(self) -> Iterator[Block]:
        yield Block(0, slice(0, self._ranks.total), Features(self._gathered, self._normalize))

    def add(self, dy: Tensor) -> None:
        self._parts = self._ranks.parts(dy)

    def _all_ranks_gradient(self) -> Tensor:
        return in_order(self._parts)


class Ring(Exchange):
    """One block per rank: memory for two of them; the next is received while one is used.

    The gradient follows its block around the ring and each rank adds its part, in a fixed order.
    """

    def __init__(self, x: Tensor, y: Tensor | None, gathered: Tensor, ranks: Ranks, normalize: bool):
        super().__init__(x, y, gathered, ranks, normalize)
        self.count = ranks.size
        self._coming: Callable[[], Tensor] | None = None

    @staticmethod
    def gather(own: Tensor, ranks: Ranks) -> Tensor:
        return own.new_empty(0)

    def blocks(self) -> Iterator[Block]:
        ranks, y = self._ranks, self._own
        for step in range(ranks.size):
            owner = (ranks.rank - step) % ranks.size
            self._next = ranks.counts[(owner - 1) % ranks.size]
            last = step + 1 == ranks.size
            coming = None if last else ranks.passed_on(y, self._next, tag=0)
            yield Block(owner, ranks.of(owner), Features(y, self._normalize))
            y = y if last else coming()

    def add(self, dy: Tensor) -> None:
        if self._coming is not None:
            dy.add_(self._coming())
        self._coming = self._ranks.passed_on(dy, self._next, tag=1)

    def _all_ranks_gradient(self) -> Tensor:
        return self._coming()


EXCHANGES = {"gather": Gathered, "ring": Ring}
