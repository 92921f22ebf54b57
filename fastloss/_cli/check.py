"""Compare every registered loss and estimator with its float64 reference, by the rule of `_registry.accuracy`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastloss._registry import InputSampler, Loss, entries
from fastloss._registry.accuracy import DTYPES, RULE, Finding, Yardstick, evaluate, name_of


@dataclass(frozen=True)
class Result:
    """The worst finding of one comparison, and what was compared."""

    loss: str
    case: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    worst: Finding
    relative: float = 0.0
    """Largest error over largest exact magnitude, the largest of all quantities."""

    @property
    def ok(self) -> bool:
        return self.worst.ok

    @property
    def ratio(self) -> float:
        """The error over the allowed error."""
        return self.worst.ratio

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "()"
        return f"{self.loss} {self.case} {shape} {name_of(self.dtype)} {self.device}: {self.worst}"


def devices() -> list[str]:
    """Return the types of the devices present on this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def compare(
    loss: Loss | str,
    case: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    function: Callable[..., Tensor] | None = None,
) -> Result:
    """Draw the inputs of one case and compare `function`, the loss's own by default, with the float64 reference."""
    if isinstance(loss, str):
        (loss,) = entries(loss)
    kwargs = loss.call(case, InputSampler(dtype, device, seed), shape)
    yardstick = Yardstick(loss, kwargs)  # first: the call may overwrite its arguments
    findings = yardstick.findings(evaluate(function or loss.function, kwargs, loss.wrt))
    worst = max(findings, key=lambda found: found.ratio)
    relative = max(found.relative for found in findings)
    return Result(loss.name, case, shape, dtype, torch.device(device).type, worst, relative)


Comparison = tuple[Loss, str, tuple[int, ...], torch.dtype, str]


def comparisons(names: Sequence[str], on: Sequence[str]) -> list[Comparison]:
    """List every case of these losses in every dtype and shape on every device."""
    return [
        (loss, case, shape, dtype, device)
        for loss in entries(*names)
        for device in on
        for dtype in DTYPES
        for case in loss.cases
        for shape in loss.shapes
    ]


def run_all(plan: Sequence[Comparison], seed: int = 0) -> Iterator[Result]:
    """Make the comparisons, one after the other."""
    for loss, case, shape, dtype, device in plan:
        try:
            yield compare(loss, case, shape, dtype, device, seed=seed)
        except Exception as error:  # any error is a failure of this loss; the others still run
            message = f"raised {type(error).__name__}: {error}"
            failed = Finding("call", math.inf, 0.0, math.inf, math.inf, message)
            yield Result(loss.name, case, shape, dtype, device, failed, math.inf)


def main(args: argparse.Namespace) -> int:
    """Run `python -m fastloss check`: print a table and the failures, return 1 if there are any."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    plan = comparisons(args.loss or (), args.device or devices())
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in track(run_all(plan, args.seed), "checking", len(plan), console=console, transient=True):
        groups.setdefault((result.loss, result.device, name_of(result.dtype)), []).append(result)
        if args.verbose:
            console.print(f"{'ok  ' if result.ok else 'FAIL'} {result}", highlight=False, soft_wrap=True)

    table = Table(box=None, header_style="bold")
    for column in ("loss", "device", "dtype"):
        table.add_column(column)
    for column in ("comparisons", "worst error", "allowed", "error / allowed", "failed"):
        table.add_column(column, justify="right")
    for key, results in groups.items():
        worst = max((r.worst for r in results), key=lambda found: found.ratio)
        failed = sum(not r.ok for r in results)
        errors = f"{worst.error:.2g}", f"{worst.allowed:.2g}", f"{worst.ratio:.3g}"
        table.add_row(*key, str(len(results)), *errors, str(failed), style="red" if failed else "")
    console.print(table)

    failures = [r for results in groups.values() for r in results if not r.ok]
    for result in failures:
        console.print(f"FAIL {result}", style="red", highlight=False, soft_wrap=True)
    console.print(
        f"{len(plan) - len(failures)} of {len(plan)} comparisons are as exact as rounding allows: {RULE}."
    )
    return 1 if failures else 0
