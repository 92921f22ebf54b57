"""Which combinations of a test's parameters run: enough that every pair of values meets."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import pytest


def covering(rows: Sequence[tuple[int, ...]]) -> list[int]:
    """Of these rows of values those, by number, in which every pair of values occurs that occurs in any of them.

    Greedy: always the row, of equals the first, that brings most pairs that are not there yet.
    """

    def pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    covered: set[tuple[tuple[int, int], ...]] = set()
    waiting = [(-len(pairs(row)), i) for i, row in enumerate(rows)]
    heapq.heapify(waiting)
    chosen = []
    while waiting:
        gain, i = heapq.heappop(waiting)
        new = len(pairs(rows[i]) - covered)
        if new == -gain and new:
            chosen.append(i)
            covered |= pairs(rows[i])
        elif new:  # gains only shrink: it is looked at again when no other promises more
            heapq.heappush(waiting, (-new, i))
    return sorted(chosen)


def values(item: pytest.Item) -> dict[str, str]:
    """The parameters of one item; a case is one of its loss."""
    found = {name: getattr(v, "name", None) or repr(v) for name, v in item.callspec.params.items()}
    if "case" in found:
        found["case"] = f"{found.pop('loss')} {found['case']}"
    return found


def of_every_pair(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items of the contract's tests in which every two of loss and case, dtype, device, layout and so on meet.

    Tests of a single loss keep all, and so do tests of two parameters, whose combinations are the pairs.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept: set[int] = set()
    for group in tests.values():
        if all(hasattr(item, "callspec") and "loss" in item.callspec.params for item in group):
            rows = [values(item) for item in group]
            columns = []
            for name in rows[0]:
                number = {value: i for i, value in enumerate(dict.fromkeys(row[name] for row in rows))}
                if len(number) > 1:
                    columns.append([number[row[name]] for row in rows])
            if len(columns) > 2:
                group = [group[i] for i in covering(list(zip(*columns, strict=True)))]
        kept |= set(map(id, group))
    return [item for item in items if id(item) in kept]
