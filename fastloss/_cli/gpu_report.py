"""The report of a run of `make gpu`, from its results.jsonl.

This file imports the standard library alone: `benchmarks/gpu.py` runs it by its path, before anything is built.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]

RESULTS = "results.jsonl"


def read(folder: Path) -> list[Record]:
    """Return the records of a run, in the order in which they were written."""
    found = []
    for i, line in enumerate((folder / RESULTS).read_text().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise ValueError(f"line {i} of {folder / RESULTS} is not JSON: {line[:60]}") from None
    return found


def row_name(row: Record) -> str:
    """Return loss, shape, dtype, case and pass of a row of the table."""
    name = f"{row['loss']} {'x'.join(map(str, row['shape']))} {row['dtype']}"
    name += f" ({row['case']})" if "case" in row else ""
    return name + (", forward" if row.get("forward_only") else "")


def candidate(record: Record) -> str:
    """Return what was timed: a row's fastloss of another tree is another candidate."""
    return record["candidate"] + (f" ({record['tree']})" if record.get("tree") else "")


def timed(records: list[Record]) -> dict[str, list[Record]]:
    """Return what was timed, or could not be, by row."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r["stage"] in ("times", "peers") and "candidate" in r:
            found.setdefault(row_name(r["row"]), []).append(r)
    return found


def markdown(records: list[Record], plot: str | None = None) -> str:
    """Return the report, with a link to the plot if there is one."""

    def of(stage: str) -> list[Record]:
        return [r for r in records if r["stage"] == stage]

    lines = ["# What a GPU showed", ""]
    for r in of("start"):
        lines += [f"* {key}: {value}" for key, value in r.items() if key != "stage"]
    for r in of("ceilings"):
        if "ceiling" in r:
            rate = f"{r['GB_per_s']:.0f} GB/s" if "GB_per_s" in r else f"{r['TFLOP_per_s']:.0f} TFLOP/s"
            lines.append(f"* {r['ceiling']} {r.get('dtype', '')}: {rate}")
    lines += ["", "| stage | ended | seconds |", "|---|---|---|"]
    lines += [f"| {r['stage']} | {r['ended']} | {r['seconds']} |" for r in records if "ended" in r]

    smoke, checked = of("smoke"), [r for r in of("numbers") if "comparisons" in r]
    lines += [
        "",
        f"{sum(r['calls'] for r in smoke if 'calls' in r)} calls, {sum('failed' in r for r in smoke)} failed. "
        f"{sum(r['comparisons'] for r in checked)} comparisons of {len(checked)} functions with float64, "
        f"{sum(r['failures'] for r in checked)} failed.",
    ]
    failed = [r for r in smoke + of("numbers") if "failed" in r]
    lines += ["", *(f"* {r['stage']}: {r['failed']} {r.get('error', '')}" for r in failed)]
    if plot:
        lines += ["", f"![times]({plot})"]
    lines += ["", "| row | candidate | ms | of ceiling | extra MiB |", "|---|---|---|---|---|"]
    for name, group in timed(records).items():
        for r in group:
            if "ms" in r:
                share = f"{r['of_ceiling']:.0%} of {r['ceiling']}" if "of_ceiling" in r else "-"
                cells = f"{r['ms']:.4g} | {share} | {r.get('extra_MiB', '-')}"
            else:
                cells = f"{r.get('failed', '')} | - | -"
            lines.append(f"| {name} | {candidate(r)} | {cells} |")
    return "\n".join(lines) + "\n"
