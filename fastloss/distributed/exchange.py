"""How a rank comes to see the columns that others hold: gathered beforehand, or passed around a ring.

Both give the columns of all ranks in blocks, and bring what each rank finds as their gradient to their owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastloss.distributed.collectives import Ranks, in_order


class Block(NamedTuple):
    index: int  # its place in the order of columns
    columns: slice  # of all
    y: Tensor  # [columns, features]


class Gathered:
    """One block: memory in proportion to all columns, and one exchange."""

    def __init__(self, y: Tensor, ranks: Ranks):
        self._y, self._ranks = y, ranks

    @staticmethod
    def kept(y: Tensor, ranks: Ranks) -> Tensor:
        """Of this rank's columns what forward and backward are made of."""
        return ranks.gathered(y)

    @staticmethod
    def own(kept: Tensor, ranks: Ranks) -> Tensor:
        return kept[ranks.own]

    def blocks(self) -> Iterator[Block]:
        yield Block(0, slice(0, self._ranks.total), self._y)

    def add(self, dy: Tensor) -> None:
        """This rank's part of the gradient of the block that was given last."""
        self._parts = self._ranks.parts(dy)

    def gradient(self) -> Tensor:
        """Of this rank's columns, all ranks' parts added up."""
        return in_order(self._parts)


class Ring:
    """A block a rank: memory in proportion to one, and while it is used the next one comes.

    The gradient travels with its block from its owner on, and each rank adds its part: an order that is fixed.
    """

    def __init__(self, y: Tensor, ranks: Ranks):
        self._y, self._ranks, self._coming = y, ranks, None

    @staticmethod
    def kept(y: Tensor, ranks: Ranks) -> Tensor:
        return y

    @staticmethod
    def own(kept: Tensor, ranks: Ranks) -> Tensor:
        return kept

    def blocks(self) -> Iterator[Block]:
        ranks, y = self._ranks, self._y
        for step in range(ranks.size):
            owner = (ranks.rank - step) % ranks.size
            self._next = ranks.counts[(owner - 1) % ranks.size]
            last = step + 1 == ranks.size
            coming = None if last else ranks.passed_on(y, self._next, tag=0)
            yield Block(owner, ranks.of(owner), y)
            y = y if last else coming()

    def add(self, dy: Tensor) -> None:
        if self._coming is not None:
            dy.add_(self._coming())
        self._coming = self._ranks.passed_on(dy, self._next, tag=1)

    def gradient(self) -> Tensor:
        return self._coming()


EXCHANGES = {"gather": Gathered, "ring": Ring}
