"""Print the table of losses of the README: `python -m fastloss losses`."""

from __future__ import annotations

import argparse
import inspect
import re

from fastloss._registry import Loss, entries


def cell(text: str) -> str:
    """Convert docstring markup to GitHub's Markdown: its math syntax, no bar that would end a table cell."""
    return re.sub(
        r":math:`([^`]*)`", lambda math: "$`" + re.sub(r"\|\s*", r"\\vert ", math[1]).strip() + "`$", text
    )


def row(loss: Loss) -> str:
    summary = cell((inspect.getdoc(loss.function) or "").splitlines()[0].rstrip("."))
    summary = re.sub(r"^Compute (the |a )?(\w)", lambda start: start[2].upper(), summary)
    replaces = f"`{loss.replaces}`" if loss.replaces else ""
    return f"| `{loss.name}` | {loss.family} | {replaces} | {summary} |"


def table() -> str:
    """Return the table: one line for each loss and each estimator, by family."""
    head = ["| function | family | replaces | description |", "|---|---|---|---|"]
    return "\n".join(head + [row(loss) for loss in entries()])


def main(args: argparse.Namespace) -> int:
    print(table())
    return 0
