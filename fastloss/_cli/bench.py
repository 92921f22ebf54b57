"""Time a loss against eager PyTorch and torch.compile, with a ceiling measured in the same run.

Measurements run in processes of their own (`bench_worker.py`). On the CPU there are two regimes: `malloc`, the default
allocator, which returns large blocks to the system, so that every step pays for page faults; and `recycled`, where it
keeps them, which removes page-fault cost for every candidate. The ceiling is a memcpy of the loss's minimal traffic;
for a loss that multiplies matrices it is `torch.mm` of as many FLOPs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastloss._cli import gpu_report, report
from fastloss._cli.bench_worker import BenchSpec, summary
from fastloss._registry import Loss, entries, estimators

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Advance = Callable[[float, str], None]
"""Called with the fraction done and a description of the current step."""


class BenchWorker:
    """The process that measures; it ends with this object's `with` block."""

    def __enter__(self) -> BenchWorker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in stop
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastloss._cli.bench_worker"],
            env=inherited,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def stop(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.terminate()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()

    def __call__(self, spec: BenchSpec, advance: Advance) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        failed = None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asdict(spec)), file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                message = json.loads(line)
                if "result" in message:
                    return message["result"]
                if "error" in message:
                    failed = message["error"]
                    break
                advance(message["done"], message["what"])
        if failed is None:  # it never answered: its last output says why
            self.process.wait()
            self.errors.seek(0)
            failed = (self.errors.read().strip().splitlines() or ["the measuring process ended"])[-1]
        raise ValueError(f"measuring {spec.loss} in {spec.dtype} failed: {failed}")


def row_of(spec: BenchSpec, candidate: str, threads: int | None) -> dict[str, Any]:
    what = {k: v for k, v in asdict(spec).items() if k in ("loss", "case", "dtype", "device", "backward")}
    return {**what, "shape": list(spec.shape), "candidate": candidate, "threads": threads}


def failed(spec: BenchSpec, why: str) -> list[dict[str, Any]]:
    """Return the rows of a measurement that failed."""
    return [row_of(spec, "fastloss", spec.threads) | {"refused": why}]


def rows_of(spec: BenchSpec, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per candidate: times in every regime, and memory."""
    regimes, skipped = found["regimes"], found["skipped"]
    measured = next(iter(regimes.values()))
    timed = [name for name in measured["times"] if name != measured["ceiling"]]
    rows = []
    for name in [*timed, *skipped, measured["ceiling"]]:
        row = row_of(spec, name, found["threads"])
        if name in skipped:
            row["refused"] = skipped[name]
        else:
            row["times"] = {regime: summary(measured, name) for regime, measured in regimes.items()}
        peak = found["peaks"].get(name)
        if peak is not None:
            row["extra_MiB"] = peak / 2**20
            row["extra_per_input"] = peak / found["input_bytes"]
        rows.append(row)
    return rows


def moderate(loss: Loss) -> tuple[int, ...]:
    """Return the loss's own shape with fewer rows, so that all losses together take minutes."""
    shape, max_work = loss.bench_shape, 2**33 if loss.multiplies else 2**24
    while loss.work(shape) > max_work and shape[0] > 1:
        shape = (shape[0] // 2, *shape[1:])
    return shape


def plan(args: argparse.Namespace) -> list[BenchSpec]:
    """Return what the command line asks to measure."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU")
    if args.peers and not args.peers.is_file():
        raise FileNotFoundError(f"no file {args.peers}")

    budget = args.budget or (5.0 if args.all else 20.0)

    def spec(loss: Loss, dtype: str, one: argparse.Namespace = args) -> BenchSpec:
        case = one.case or next(iter(loss.cases))
        if case not in loss.cases:
            raise ValueError(f"{loss.name} has no case {case!r}; there are {', '.join(loss.cases)}")
        ranks = sorted({len(shape) for shape in loss.shapes})
        if one.shape and len(one.shape) not in ranks:
            raise ValueError(f"--shape of {loss.name} has {' or '.join(map(str, ranks))} sizes")
        return BenchSpec(
            loss=loss.name,
            case=case,
            shape=tuple(one.shape or (moderate(loss) if args.all else loss.bench_shape)),
            dtype=dtype,
            device=device,
            backward=not one.forward_only
            and loss.name not in estimators,  # estimators are called without gradient
            threads=args.threads,
            rounds=args.rounds,
            budget=budget,
            peers=str(args.peers) if args.peers else None,
            skip=tuple(one.skip),
            max_step_seconds=args.max_step_seconds or (5.0 if args.all else None),
        )

    if args.table:
        rows = [argparse.Namespace(**{**vars(args), **row}) for row in json.loads(args.table.read_text())]
        return [spec(entries(row.loss)[0], row.dtype, row) for row in rows]
    if args.all:
        dtypes = [args.dtype] if args.dtype else ["float32", "bfloat16"]
        return [spec(loss, dtype) for loss in entries() for dtype in dtypes]
    return [spec(entries(args.loss)[0], args.dtype or "float32")]


def show(progress: Progress, task: TaskID, label: str, done: float, what: str) -> None:
    progress.update(task, completed=done, description=f"{label}: {what}")


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write the folder of a report: results, tables, one plot."""
    from fastloss._cli import plot

    report.write_folder(folder, results)
    if any("times" in row for row in results["rows"]):
        plot.draw(results["rows"], folder / report.PLOT)


def write_again(folder: Path) -> None:
    """Write report and plot from the results in the folder, those of `bench --out` or of `make gpu`."""
    from fastloss._cli import plot

    if (folder / report.RESULTS).is_file():
        write(folder, json.loads((folder / report.RESULTS).read_text()))
    elif (folder / gpu_report.RESULTS).is_file():
        records = gpu_report.read(folder)
        rows = {name: [r for r in group if "ms" in r] for name, group in gpu_report.timed(records).items()}
        if any(rows.values()):
            plot.draw_gpu({name: group for name, group in rows.items() if group}, folder / report.PLOT)
        link = report.PLOT if any(rows.values()) else None
        (folder / "report.md").write_text(gpu_report.markdown(records, link))
    else:
        raise FileNotFoundError(
            f"{folder} holds no results: {report.RESULTS}, which `bench --out` writes, "
            f"or {gpu_report.RESULTS}, which `make gpu` writes"
        )


def main(args: argparse.Namespace) -> int:
    """Run `python -m fastloss bench`; return 1 if a candidate of fastloss was skipped or failed."""
    if args.again:
        write_again(args.again)
        return 0

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if args.plot or args.out:
        from fastloss._cli import plot  # before an hour of measuring, not after
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = report.header()
    specs = plan(args)
    load = results["load_before"] or 0.0
    if load > 0.5 * results["machine"]["cores"]:
        console.print(f"Other work keeps this machine busy (load {load}): the times below will be too long.")
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with BenchWorker() as worker:
        for i, spec in enumerate(specs):
            label = f"{i + 1} of {len(specs)}: {spec.loss} {'x'.join(map(str, spec.shape))} {spec.dtype}"
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task(label, total=1.0)
                try:
                    rows = rows_of(spec, worker(spec, partial(show, progress, task, label)))
                except ValueError as error:  # out of memory, for example: measure the others
                    if len(specs) == 1:
                        raise
                    rows = failed(spec, str(error))
                    worker.restart()
            results["rows"] += rows
            console.print(report.table(rows))
            for row in rows:
                if "refused" in row:
                    console.print(
                        f"{row['candidate']} is not timed: {row['refused']}", style="red", highlight=False
                    )
            if args.out:  # after every loss, so that an interrupted run leaves what it has
                report.write_folder(args.out, results)
    if args.out:
        write(args.out, results)
    if args.json:
        report.write_json(args.json, results)
    if args.plot:
        plot.draw(results["rows"], args.plot)
    return int(any("refused" in r and r["candidate"].startswith("fastloss") for r in results["rows"]))
