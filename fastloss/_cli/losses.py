"""`python -m fastloss losses`: the table of losses that stands in the README."""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

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


HEAD = "| function | family | replaces | description |"


def table() -> str:
    """One line for each loss and each estimator, by family."""
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
