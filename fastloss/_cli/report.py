"""The output of `bench`: a table, a JSON file with its provenance, a folder for many measurements."""

from __future__ import annotations

import datetime
import itertools
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

Row = dict[str, Any]

RESULTS = "results.json"
"""The numbers in the folder of a report."""
PLOT = "times.svg"
"""The plot in the folder of a report."""


class Ceiling(NamedTuple):
    unit: str
    what: str
    short: str


CEILINGS = {
    "copy": Ceiling("GB", "memcpy of the same traffic", "copy"),
    "products": Ceiling("GFLOP", "torch.mm of as many FLOPs", "GEMM"),
}
"""The ceiling of a measurement, its last candidate: the unit of its speed, what it is, and its column."""


def commit() -> str | None:
    """Return the commit of the checkout this package lies in, with "-dirty" where files differ from it."""
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
    """Return a report without rows: the machine, the commit and the command."""
    return {
        "machine": info.machine(),
        "command": "python -m fastloss " + shlex.join(sys.argv[1:]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "rows": [],
    }


def measurements(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows of a report by measurement: loss, case, shape, dtype, device and pass."""
    keys = ("loss", "case", "shape", "dtype", "device", "backward")
    return [list(group) for _, group in itertools.groupby(rows, lambda row: [row[k] for k in keys])]


def title(row: Row) -> str:
    passes = "forward + backward" if row["backward"] else "forward"
    shape = "x".join(map(str, row["shape"]))
    where = f"cpu, {row['threads']} threads" if row["device"] == "cpu" else "cuda"
    return f"{row['loss']} ({row['case']}) {shape} {row['dtype']}, {passes}, {where}"


def number(value: float | None) -> str:
    """Format about three significant digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the column names, on two lines, and the cells of the table of one measurement."""
    regimes = next((list(r["times"]) for r in rows if "times" in r), [])
    ceiling = next((r["candidate"] for r in rows if r["candidate"] in CEILINGS), "copy")
    unit, short = CEILINGS[ceiling].unit, CEILINGS[ceiling].short
    head = ["candidate"]
    for regime in regimes:
        head += [f"{regime}\nms", f"\n{unit}/s", f"% of\n{short}", "x\neager", "x\ncompile"]
    head += ["extra\nMiB", "x\ninput"]
    body = []
    for row in rows:
        name = row["candidate"]
        line = [CEILINGS[name].short if name in CEILINGS else name]
        for regime in regimes:
            found = row.get("times", {}).get(regime, {})
            line += [number(found.get("ms")), number(found.get(f"{unit}_per_s"))]
            fraction = found.get(f"of_{ceiling}")
            line.append("-" if fraction is None else f"{100 * fraction:.0f}")
            line += [number(found.get("x_eager")), number(found.get("x_compile"))]
        extra = row.get("extra_MiB")
        line.append("skipped" if "refused" in row else "-" if extra is None else f"{extra:.1f}")
        line.append(f"{row['extra_per_input']:.2f}" if "extra_per_input" in row else "-")
        body.append(line)
    return head, body


def table(rows: Sequence[Row]) -> Table:
    """Return the table of one measurement for the terminal."""
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
    """Return the table of one measurement for the report."""
    head, body = cells(rows)
    lines = [[name.replace("\n", " ").strip() for name in head], ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


EXPLANATION = (
    "Times are medians over interleaved rounds; `x eager` and `x compile` are medians of the speed-ups within a round, "
    "larger is faster. `malloc` is glibc's default allocator, `recycled` one that recycles pages. `% of copy` is "
    "achieved bandwidth relative to a memcpy of the same traffic, `% of GEMM` the FLOP rate relative to `torch.mm`, "
    "counting the GEMMs that eager needs. `extra` is the peak memory of a step beyond its inputs."
)


def write_folder(folder: Path, report: dict[str, Any]) -> None:
    """Write `results.json`, and `report.md` with a table of every measurement and a link to their plot."""
    write_json(folder / RESULTS, report)
    machine = report["machine"]
    gpus = ", ".join(g["name"] for g in machine["gpus"])
    text = [
        "# Benchmark",
        f"{machine['cpu']}, {machine['cores']} cores{', ' + gpus if gpus else ''}; "
        f"torch {machine['torch']} ({machine['torch_cpu_capability']}); "
        f"commit {report['commit']}; {report['date']}.",
        f"Command: `{report['command']}`.",
        EXPLANATION,
    ]
    if any("times" in row for row in report["rows"]):
        text.append(f"![times]({PLOT})")
    for rows in measurements(report["rows"]):
        text += [f"## {title(rows[0])}", markdown(rows)]
        text += [f"{row['candidate']} was not timed: {row['refused']}" for row in rows if "refused" in row]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
