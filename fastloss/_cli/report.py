"""What `bench` prints and writes: a table, a JSON file with its provenance, a folder for `--all`."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastloss._cli import info

if TYPE_CHECKING:
    from rich.table import Table

    from fastloss._cli.bench_worker import Spec

Row = dict[str, Any]


class Ceiling(NamedTuple):
    unit: str
    what: str


CEILINGS = {
    "copy": Ceiling("GB", "a copy of the same bytes"),
    "products": Ceiling("GFLOP", "as many operations by the library"),
}
"""What the machine can do at best: the last candidate of every measurement, the unit of its speed, and what it is."""


def commit() -> str | None:
    """The commit of the checkout this package lies in, with "-dirty" where files differ from it."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def header() -> dict[str, Any]:
    """A report without rows: where, from which source and by which command it was made."""
    return {
        "machine": info.machine(),
        "command": "python -m fastloss " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "rows": [],
    }


def slug(spec: Spec) -> str:
    passes = "" if spec.backward else "-forward"
    return f"{spec.loss}-{spec.case}-{'x'.join(map(str, spec.shape))}-{spec.dtype}{passes}"


def title(row: Row) -> str:
    passes = "forward + backward" if row["backward"] else "forward"
    shape = "x".join(map(str, row["shape"]))
    where = f"cpu, {row['threads']} threads" if row["device"] == "cpu" else "cuda"
    return f"{row['loss']} ({row['case']}) {shape} {row['dtype']}, {passes}, {where}"


def number(value: float | None) -> str:
    """About three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column names, on two lines, and text of the table over all candidates of one measurement."""
    regimes = next((list(r["times"]) for r in rows if "times" in r), [])
    ceiling = next((r["candidate"] for r in rows if r["candidate"] in CEILINGS), "copy")
    unit = CEILINGS[ceiling].unit
    head = ["candidate"]
    for regime in regimes:
        head += [f"{regime}\nms", f"\n{unit}/s", f"of\n{ceiling}", "x\neager", "x\ncompile"]
    head += ["extra\nMiB", "x\ninput"]
    body = []
    for row in rows:
        line = [row["candidate"]]
        for regime in regimes:
            found = row.get("times", {}).get(regime, {})
            line += [number(found.get("ms")), number(found.get(f"{unit}_per_s"))]
            share = found.get(f"of_{ceiling}")
            line.append("-" if share is None else f"{share:.0%}")
            line += [number(found.get("x_eager")), number(found.get("x_compile"))]
        extra = row.get("extra_MiB")
        line.append("refused" if "refused" in row else "-" if extra is None else f"{extra:.1f}")
        line.append(f"{row['extra_per_input']:.2f}" if "extra_per_input" in row else "-")
        body.append(line)
    return head, body


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    from rich.table import Table

    head, body = cells(rows)
    made = Table(
        title=title(rows[0]), title_justify="left", box=None, header_style="bold", padding=(0, 1, 0, 0)
    )
    for column in head:
        made.add_column(column, justify="left" if column == "candidate" else "right", no_wrap=True)
    for line in body:
        made.add_row(*line, style="bold" if line[0].startswith("fastloss") else "")
    return made


def markdown(rows: Sequence[Row]) -> str:
    """For the report."""
    head, body = cells(rows)
    lines = [[name.replace("\n", " ").strip() for name in head], ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_folder(folder: Path, report: dict[str, Any], specs: Sequence[Spec]) -> None:
    """`results.json` and `report.md` over everything measured so far."""
    write_json(folder / "results.json", report)
    machine = report["machine"]
    gpus = ", ".join(g["name"] for g in machine["gpus"])
    text = [
        "# Benchmark",
        f"{machine['cpu']}, {machine['cores']} cores{', ' + gpus if gpus else ''}; "
        f"torch {machine['torch']} ({machine['torch_cpu_capability']}); "
        f"commit {report['commit']}; {report['date']}.",
        f"Command: `{report['command']}`.",
        "Times are medians; ratios are medians of the ratios within each round, larger is faster. `of copy` "
        "compares the least traffic of the loss per second with that of a copy measured in the same rounds, `of "
        "products` its fewest operations in products of matrices with the library's product of square ones. "
        "`extra` is the peak memory of a step beyond its inputs.",
    ]
    for spec in specs:
        key = (spec.loss, spec.case, list(spec.shape), spec.dtype, spec.backward)
        rows = [
            r for r in report["rows"] if (r["loss"], r["case"], r["shape"], r["dtype"], r["backward"]) == key
        ]
        text += [f"## {title(rows[0])}", markdown(rows)]
        text += [f"{r['candidate']} was not timed: {r['refused']}" for r in rows if "refused" in r]
        if any("times" in r for r in rows):
            text.append(f"![times]({slug(spec)}.png)")
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
