"""`python -m fastloss losses`: the table of losses that stands in the README."""

from __future__ import annotations

import argparse
import inspect

from fastloss._registry import Loss, entries


def row(loss: Loss) -> str:
    summary = inspect.getdoc(loss.function).splitlines()[0].rstrip(".")
    replaces = f"`{loss.replaces}`" if loss.replaces else ""
    return f"| `{loss.name}` | {loss.family} | {replaces} | {summary} |"


def table() -> str:
    """One line for each loss and each estimator."""
    head = ["| function | family | replaces | what it is |", "|---|---|---|---|"]
    return "\n".join(head + [row(loss) for loss in entries()])


def main(args: argparse.Namespace) -> int:
    print(table())
    return 0
