"""Print the table of losses of the README: `python -m fastloss losses`."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

from fastloss._registry import Loss, entries


def cell(text: str) -> str:
    """Convert docstring markup to GitHub's Markdown: its math syntax, no bar that would end a table cell."""
    return re.sub(
        r":math:`([^`]*)`", lambda math: "$`" + re.sub(r"\|\s*", r"\\vert ", math[1]).strip() + "`$", text
    )


def row(loss: Loss) -> str:
    summary = cell((inspect.getdoc(loss.function) or "").splitlines()[0].rstrip("."))
    summary = re.sub(r"^Compute (the |a )?(\w)", lambda start: start[2].upper(), summary)
    replaces = f"`{loss.replaces}`" if loss.replaces else f"related: `{loss.related}`" if loss.related else ""
    return f"| `{loss.name}` | {loss.family} | {replaces} | {summary} |"


HEAD = "| function | family | replaces | description |"


def table() -> str:
    """Return the table: one line for each loss and each estimator, by family."""
    return "\n".join([HEAD, "|---|---|---|---|", *(row(loss) for loss in entries())])


def write(path: Path) -> None:
    """Replace the table in a file, from its first line to its last, by this one."""
    text = path.read_text()
    changed, found = re.subn(rf"^{re.escape(HEAD)}\n(?:\|.*\n)*", lambda _: table() + "\n", text, flags=re.M)
    if found != 1:
        raise ValueError(f"{path}: expected one table of losses, found {found}")
    if changed != text:
        path.write_text(changed)


def main(args: argparse.Namespace) -> int:
    if args.write:
        write(args.write)
    else:
        print(table())
    return 0
