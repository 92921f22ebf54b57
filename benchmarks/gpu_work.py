"""The parts of `gpu.py` that use the device, each in its own process: results are lines of JSON on standard output.

ceilings   what the card does at best: a copy, a product of random matrices
smoke      every case of every loss once, forward and backward: does it run at all, and is it finite
numbers    every comparison of `fastloss check`
times      rows of a table, as replays of a CUDA graph over a flushed L2 cache
kernels    how long each kernel of a step takes
steps      the steps alone, once each: what Nsight Compute is to watch
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
COPIED = 4 << 30
"""Bytes that the copy of the ceiling reads, and as many that it writes."""


def emit(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def part_of(sequence: Sequence[Any], part: str) -> Sequence[Any]:
    """Return part "i/n": every n-th entry from the i-th on, so that the parts take about as long."""
    i, n = map(int, part.split("/"))
    return sequence[i::n]


class Device:
    """The GPU, or the CPU for a rehearsal: synchronising, flushing the cache, timing."""

    def __init__(self, name: str):
        self.name, self.cuda = name, name == "cuda"
        if self.cuda:
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.uint8, device=name)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> list[float]:
        """Time each run; on CUDA by events, which are all queued before the first synchronisation."""
        if not self.cuda:
            found = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                found.append((time.perf_counter() - start) * 1e3)
            return found
        pairs = []
        for _ in range(repeats):
            self.flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            pairs.append((start, stop))
        self.wait()
        return [start.elapsed_time(stop) for start, stop in pairs]


def copy_rate(device: Device, total: int, repeats: int = 10) -> float:
    """Measure the GB/s of a copy of random numbers that reads and writes `total` bytes together."""
    source = torch.randn(max(1, total // 8), device=device.name)
    target = torch.empty_like(source)
    times = device.milliseconds(lambda: target.copy_(source), repeats)
    return 2 * source.nbytes / statistics.median(times) / 1e6


def product_rate(device: Device, n: int, dtype: torch.dtype) -> float:
    """Measure the TFLOP/s of a GEMM of two random n x n matrices."""
    a, b = (torch.randn(n, n, device=device.name, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device.name, dtype=dtype)
    device.milliseconds(lambda: torch.mm(a, b, out=out), 3)
    return 2 * n**3 / statistics.median(device.milliseconds(lambda: torch.mm(a, b, out=out), 10)) / 1e9


def ceilings(args: argparse.Namespace) -> None:
    device = Device(args.device)
    size, n = (2 * COPIED, 8192) if device.cuda else (1 << 20, 64)
    emit(ceiling="copy", bytes=size, GB_per_s=copy_rate(device, size))
    for dtype in ("bfloat16", "float32"):
        emit(ceiling="product", n=n, dtype=dtype, TFLOP_per_s=product_rate(device, n, getattr(torch, dtype)))


def smoke(args: argparse.Namespace) -> None:
    from fastloss._registry import InputSampler, entries
    from fastloss._registry.accuracy import evaluate

    every_loss = runpy.run_path(str(HERE / "every_loss.py"))
    device, done, failed = Device(args.device), 0, 0
    losses = [e for e in entries() if e.name != args.without and args.only in ("", e.name)]
    for loss in part_of(losses, args.part):
        for case, shape in every_loss["calls"](loss):
            for dtype in every_loss["DTYPES"]:
                done += 1
                try:
                    evaluate(
                        loss.function, loss.call(case, InputSampler(dtype, args.device), shape), loss.wrt
                    )
                    device.wait()
                except Exception as error:
                    failed += 1
                    emit(failed=f"{loss.name} {case} {shape} {dtype}", error=first_line(error))
                    if "CUDA error" in str(error):  # nothing after it means anything
                        emit(calls=done, failures=failed, given_up=True)
                        return
    emit(calls=done, failures=failed)


def numbers(args: argparse.Namespace) -> None:
    from fastloss._cli.check import comparisons, run_all
    from fastloss._registry import entries

    for entry in part_of(entries(), args.part):
        start, results = time.monotonic(), []
        for result in run_all(comparisons([entry.name], [args.device])):
            results.append(result)
            if not result.ok:
                emit(failed=str(result), ratio=min(result.ratio, 1e30))
            if args.device == "cpu" and time.monotonic() - start > 1.0:  # a rehearsal
                break
        worst = max(results, key=lambda r: r.ratio)
        emit(
            loss=entry.name,
            comparisons=len(results),
            failures=sum(not r.ok for r in results),
            worst=min(worst.ratio, 1e30),
            seconds=round(time.monotonic() - start, 1),
        )


# ---- timing


class Row:
    """A row of the table on the device: the inputs of one loss, and the minimum work of a step."""

    def __init__(self, spec: dict[str, Any], device: str, largest: int | None):
        from fastloss._registry import InputSampler, entries
        from fastloss._registry.accuracy import differentiable

        (self.loss,) = entries(spec["loss"])
        self.spec = spec
        self.shape = tuple(min(n, largest) if largest else n for n in spec["shape"])
        self.dtype = getattr(torch, spec["dtype"])
        self.backward = not spec.get("forward_only", False)
        case = spec.get("case", next(iter(self.loss.cases)))
        self.kwargs = self.loss.call(case, InputSampler(self.dtype, device, fast=True), self.shape)
        self.wrt = differentiable(self.kwargs, self.loss.trained or self.loss.wrt) if self.backward else []

    def name(self) -> dict[str, Any]:
        return {**self.spec, "shape": list(self.shape)}

    def step(self, function: Callable[..., Tensor]) -> Callable[[], Any]:
        """Run forward and return the gradients of a training step as new tensors."""
        leaves = {k: self.kwargs[k].detach().requires_grad_() for k in self.wrt}
        kwargs = {**self.kwargs, **leaves}
        upstream: list[Tensor] = []

        def run() -> Any:
            value = function(**kwargs)
            if not leaves:
                return value
            values = [value] if isinstance(value, Tensor) else list(value)
            if not upstream:
                upstream.extend(torch.ones_like(v) for v in values)
            return torch.autograd.grad(values, list(leaves.values()), upstream)

        return run

    def work(self) -> tuple[str, float]:
        """Return the ceiling, "copy" or "product", and the minimum bytes or FLOPs of a step."""
        if self.loss.multiplies:
            return "product", self.loss.flops(self.shape, self.backward)
        return "copy", self.loss.traffic(self.shape, self.dtype.itemsize, self.backward)


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """Iterate over the requested rows of the table, one in memory at a time; small ones on the CPU."""
    table = json.loads(Path(args.table).read_text())
    for i in range(len(table)) if args.rows is None else args.rows:
        try:
            yield Row(table[i], args.device, 64 if args.device == "cpu" else None)
        except Exception as error:
            emit(row=table[i], failed=first_line(error))
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def candidates(row: Row, names: Sequence[str], device: str) -> dict[str, Callable[..., Tensor]]:
    from fastloss._registry.accuracy import eager_of

    eager = eager_of(row.loss, row.kwargs)
    found: dict[str, Callable[..., Tensor]] = {}
    for name in names:
        if name == "peers":
            found |= runpy.run_path(str(HERE / "peers.py"))["peers"](row.loss.name, device)
        elif name == "compile":
            found["torch.compile"] = torch.compile(eager, dynamic=False)
        else:
            found[name] = {"fastloss": row.loss.function, "eager": eager}[name]
    return found


def time_one(row: Row, function: Callable[..., Tensor], device: Device, seconds: float) -> dict[str, Any]:
    from fastloss._cli.timing import captured

    run = row.step(function)
    run()
    device.wait()
    found: dict[str, Any] = {"how": "graph"}
    if device.cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        device.wait()
        found["extra_MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        try:
            run = captured(run)
        except Exception as error:
            found |= {"how": "events", "not captured": first_line(error)}
    run()
    once = statistics.median(device.milliseconds(run, 3))
    times = device.milliseconds(run, max(5, min(100, int(seconds * 1e3 / max(once, 1e-3)))))
    return found | {
        "ms": statistics.median(times),
        "least": min(times),
        "most": max(times),
        "runs": len(times),
    }


def times(args: argparse.Namespace) -> None:
    device = Device(args.device)
    product = functools.cache(lambda: product_rate(device, 8192 if device.cuda else 64, torch.bfloat16))
    for row in rows_of(args):
        for name, function in candidates(row, args.candidates.split(","), args.device).items():
            record = {"tree": args.label, "row": row.name(), "candidate": name}
            try:
                record |= time_one(row, function, device, args.budget)
                kind, work = row.work()
                record |= {"ceiling": kind, "work": work}
                if kind == "copy":
                    rate = work / record["ms"] / 1e6
                    best = copy_rate(device, max(int(work), 1 << 28) if device.cuda else 1 << 20, 5)
                    record |= {"GB_per_s": rate, "of_ceiling": rate / best}
                else:
                    rate = work / record["ms"] / 1e9
                    record |= {"TFLOP_per_s": rate, "of_ceiling": rate / product()}
            except Exception as error:
                record["failed"] = first_line(error)
                if device.cuda and "CUDA error" in str(error) and "out of memory" not in str(error):
                    emit(**record)
                    return
            emit(**record)
            gc.collect()


def kernels(args: argparse.Namespace) -> None:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    device = Device(args.device)
    activity = ProfilerActivity.CUDA if device.cuda else ProfilerActivity.CPU
    for row in rows_of(args):
        try:
            run = row.step(row.loss.function)
            run()
            device.wait()
            with profile(activities=[activity]) as profiled:
                run()
                device.wait()
            found: dict[str, list[float]] = {}
            for event in profiled.events():
                if event.device_type == (DeviceType.CUDA if device.cuda else DeviceType.CPU):
                    found.setdefault(event.name[:160], []).append(event.time_range.elapsed_us())
            longest = sorted(found.items(), key=lambda item: -sum(item[1]))[:14]
            emit(
                tree=args.label,
                row=row.name(),
                kernels=[
                    {"name": name, "calls": len(us), "us": round(sum(us), 1), "longest": round(max(us), 1)}
                    for name, us in longest
                ],
                us=round(sum(map(sum, found.values())), 1),
            )
        except Exception as error:
            emit(tree=args.label, row=row.name(), failed=first_line(error))


def steps(args: argparse.Namespace) -> None:
    device = Device(args.device)
    for row in rows_of(args):
        row.step(row.loss.function)()
        device.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ceilings", "smoke", "numbers", "times", "kernels", "steps"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of the losses, for smoke and numbers")
    parser.add_argument("--only", default="", metavar="LOSS", help="for smoke")
    parser.add_argument("--without", default="", metavar="LOSS", help="for smoke")
    parser.add_argument("--table", default=str(HERE / "gpu.json"))
    parser.add_argument(
        "--rows", type=lambda s: [int(i) for i in s.split(",")], help="by number; default: all"
    )
    parser.add_argument("--candidates", default="fastloss", help="fastloss, eager, compile, peers")
    parser.add_argument("--label", default="", help="what the fastloss that is imported is called")
    parser.add_argument("--budget", type=float, default=0.3, metavar="SECONDS", help="timing per row")
    args = parser.parse_args()
    with torch.random.fork_rng(devices=[]):
        globals()[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
