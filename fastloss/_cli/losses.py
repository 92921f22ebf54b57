"""`python -m fastloss losses`: the table of losses that stands in the README."""

from __future__ import annotations

import argparse
import inspect
import re

from fastloss._registry import Loss, entries


def cell(text: str) -> str:
    """Docstring markup as GitHub's Markdown: math in its syntax, without the bar that would end a table cell."""
    return re.sub(
        r":math:`([^`]*)`", lambda math: "$`" + re.sub(r"\|\s*", r"\\vert ", math[1]).strip() + "`$", text
    )


def row(loss: Loss) -> str:
    summary = cell((inspect.getdoc(loss.function) or "").splitlines()[0].rstrip("."))
    replaces = f"`{loss.replaces}`" if loss.replaces else ""
    return f"| `{loss.name}` | {loss.family} | {replaces} | {summary} |"


def table() -> str:
    """One line for each loss and each estimator, by family."""
    head = ["| function | family | replaces | description |", "|---|---|---|---|"]
    return "\n".join(head + [row(loss) for loss in entries()])


def main(args: argparse.Namespace) -> int:
    print(table())
    return 0
