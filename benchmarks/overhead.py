"""Host overhead of a call: every loss on its smallest inputs, forward and backward, in microseconds.

The kernels take next to nothing there, so that a loop of calls is as fast as the host can start them. On CUDA the
same step is also replayed as a CUDA graph, which takes the host out: what is left is the time of the kernels and
the gaps between them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastloss._cli import report
from fastloss._cli.timing import TimedStep, captured
from fastloss._registry import InputSampler, Loss, entries, losses
from fastloss._registry.accuracy import differentiable, eager_of

REPEATS = 5


def microseconds(run: Callable[[], object], calls: int, device: str) -> float:
    """Time one of many consecutive calls, as the median of a few repetitions."""
    taken = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(taken[1:])


def one(step: TimedStep) -> Callable[[], None]:
    """Return a function that runs forward and backward with new gradients."""

    def run() -> None:
        step.release()
        step.run()

    return run


def measure(loss: Loss, calls: int, device: str) -> dict[str, float | str | list[int]]:
    case = next(iter(loss.cases))
    shape = min((s for s in loss.shapes if min(s) > 1), key=math.prod, default=loss.shapes[0])
    kwargs = loss.call(case, InputSampler(torch.float32, device), shape)
    wrt = differentiable(kwargs, loss.wrt)
    row: dict[str, float | str | list[int]] = {"loss": loss.name, "case": case, "shape": list(shape)}
    steps = {"eager": eager_of(loss, kwargs), "fastloss": loss.function}
    for name, function in steps.items():
        row[name] = microseconds(one(TimedStep(function, kwargs, wrt, copy_inputs=True)), calls, device)
    if device == "cuda":
        try:
            replay = captured(one(TimedStep(loss.function, kwargs, wrt, copy_inputs=True)))
            row["fastloss as a graph"] = microseconds(replay, calls, device)
        except Exception as error:  # the other losses are still of interest
            row["not captured"] = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--loss", action="append", metavar="NAME", help="only this loss; may be repeated")
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="in a row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    results = report.header() | {"unit": "microseconds for forward + backward"}
    for loss in entries(*args.loss) if args.loss else losses():
        row = measure(loss, args.calls, args.device)
        results["rows"].append(row)
        found = [
            f"{k} {v:.1f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items() if k != "loss"
        ]
        print(f"{loss.name}: {', '.join(found)}", flush=True)
        if args.out:
            report.write_json(args.out, results)
    return int(any("not captured" in row for row in results["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
