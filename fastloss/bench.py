"""Time a loss beside eager PyTorch and torch.compile, with a ceiling measured in the same run.

Every measurement runs in a process of its own (`_measure.py`). On the CPU there are two regimes: `malloc`,
the default allocator, which returns large blocks to the system, so that every step pays for fresh
pages; and `recycled`, where it keeps them, so that nobody does. The ceiling is a copy that moves as many
bytes as the loss must at least move.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastloss import _report
from fastloss._measure import Spec, summary
from fastloss._registry import Loss, entries, estimators

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REGIMES: dict[str, dict[str, str]] = {
    "malloc": {},
    "recycled": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**12)},
}

Advance = Callable[[float, str], None]
"""Called with a fraction of the whole and what is going on."""


def within(advance: Advance, start: float, share: float, label: str) -> Advance:
    """The progress of a part that begins at `start` and is a `share` of the whole."""
    return lambda done, what: advance(start + share * done, f"{label}: {what}")


def run_child(spec: Spec, environment: dict[str, str], advance: Advance) -> dict[str, Any]:
    """Measure in a new process and return its result."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-m", "fastloss._measure", json.dumps(asdict(spec))]
    result: dict[str, Any] | None = None
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env={**inherited, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                message = json.loads(line)
                result = message.get("result", result)
                if "done" in message:
                    advance(message["done"] / message["total"], message["what"])
        finally:
            if child.poll() is None and result is None:
                child.terminate()
            code = child.wait()
        if code or result is None:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit code {code}"])[-1]
            raise ValueError(f"measuring {spec.peak_of or spec.loss} in {spec.dtype} failed: {last}")
    return result


def measure(spec: Spec, advance: Advance) -> list[dict[str, Any]]:
    """One row per candidate: times in every regime, and memory."""
    regimes = REGIMES if spec.device == "cpu" else {"cuda": {}}
    measured: dict[str, dict[str, Any]] = {}
    share = 1 / (len(regimes) + 1)
    for i, (regime, environment) in enumerate(regimes.items()):
        part = replace(spec, budget=spec.budget / len(regimes))
        measured[regime] = run_child(part, environment, within(advance, i * share, share, regime))
    first = next(iter(measured.values()))
    names = [*(n for n in first["times"] if n != "copy"), *first["refused"], "copy"]
    rows = []
    for i, name in enumerate(names):
        what = {k: v for k, v in asdict(spec).items() if k in ("loss", "case", "dtype", "device", "backward")}
        row: dict[str, Any] = {
            **what,
            "shape": list(spec.shape),
            "candidate": name,
            "threads": first["threads"],
        }
        refused = [m["refused"][name] for m in measured.values() if name in m["refused"]]
        if refused:
            rows.append({**row, "refused": refused[0]})
            continue
        row["times"] = {regime: summary(m, name) for regime, m in measured.items()}
        if name != "copy":
            advance(1 - share * (1 - i / len(names)), f"memory of {name}")
            peak = first["peaks"].get(name)
            if spec.device == "cpu":
                peak = run_child(replace(spec, peak_of=name), {}, lambda *_: None)["peak"]
            if peak is not None:
                row["extra_MiB"] = peak / 2**20
                row["extra_per_input"] = peak / first["input_bytes"]
        rows.append(row)
    return rows


def plan(args: argparse.Namespace) -> list[Spec]:
    """What to measure, from the command line."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU")
    if args.peers and not args.peers.is_file():
        raise FileNotFoundError(f"no file {args.peers}")

    def spec(loss: Loss, dtype: str, one: argparse.Namespace = args) -> Spec:
        case = one.case or next(iter(loss.cases))
        if case not in loss.cases:
            raise ValueError(f"{loss.name} has no case {case!r}; there are {', '.join(loss.cases)}")
        ranks = sorted({len(shape) for shape in loss.shapes})
        if one.shape and len(one.shape) not in ranks:
            raise ValueError(f"--shape of {loss.name} has {' or '.join(map(str, ranks))} sizes")
        return Spec(
            loss=loss.name,
            case=case,
            shape=tuple(one.shape or loss.bench_shape),
            dtype=dtype,
            device=device,
            backward=not one.forward_only and loss.name not in estimators,  # they are called without
            threads=args.threads,
            rounds=args.rounds,
            budget=args.budget,
            peers=str(args.peers) if args.peers else None,
        )

    if args.table:
        rows = [argparse.Namespace(**{**vars(args), **row}) for row in json.loads(args.table.read_text())]
        return [spec(*entries(row.loss), row.dtype, row) for row in rows]
    if args.all:
        return [spec(loss, dtype) for loss in entries() for dtype in ("float32", "bfloat16")]
    return [spec(*entries(args.loss), args.dtype)]


def show(progress: Progress, task: TaskID, done: float, what: str) -> None:
    progress.update(task, completed=done, description=what)


def main(args: argparse.Namespace) -> int:
    """`python -m fastloss bench`: returns 1 if a result of fastloss was refused as wrong."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if args.plot or args.out:
        from fastloss import _plot  # before an hour of measuring, not after
    console = Console(width=None if sys.stdout.isatty() else 120)
    report = _report.header()
    specs = plan(args)
    load = report["load_before"] or 0.0
    if load > 0.5 * report["machine"]["cores"]:
        console.print(f"Other work keeps this machine busy (load {load}): the times below will be too long.")
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    for i, spec in enumerate(specs):
        label = f"{spec.loss} {'x'.join(map(str, spec.shape))} {spec.dtype}"
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=1.0)
            rows = measure(spec, within(partial(show, progress, task), 0.0, 1.0, label))
        report["rows"] += rows
        console.print(_report.table(rows))
        for row in rows:
            if "refused" in row:
                console.print(
                    f"{row['candidate']} is not timed: {row['refused']}", style="red", highlight=False
                )
        if args.out:  # after every loss, so that an interrupted run leaves what it has
            _report.write_folder(args.out, report, specs[: i + 1])
            _plot.draw(rows, args.out / f"{_report.slug(spec)}.png")
    if args.json:
        _report.write_json(args.json, report)
    if args.plot:
        _plot.draw(report["rows"], args.plot)
    return int(any("refused" in r and r["candidate"].startswith("fastloss") for r in report["rows"]))
