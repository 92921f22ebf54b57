"""The process that measures: `bench` starts it once and writes one line of JSON to it for each measurement.

Every measurement runs in a fork of it, and each allocator regime and each candidate's memory in a fork of that: no
state leaks from one to the next, and nothing is imported or drawn twice. Until then one thread runs and no GPU is
touched, so that forks may use all threads and the GPU. Lines of JSON go to standard output: progress, then one with the
result. All other output goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import json
import math
import os
import runpy
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastloss._cli.check import compare
from fastloss._cli.report import CEILINGS
from fastloss._cli.timing import Copy, Products, TimedStep, Timer, cuda_peak, rss_peak
from fastloss._ops.autograd import HALF_TYPES
from fastloss._registry import InputSampler, Loss, entries
from fastloss._registry.accuracy import cast, differentiable, eager_of, errors_of
from fastloss._registry.inputs import in_place

CHECKED_ELEMENTS, CHECKED_WORK = 2**20, 2**26
MIN_ROUNDS, MAX_ROUNDS = 3, 300
CHECK_STEPS = 12
"""The check of a candidate, compilation included, may take this many times `max_step_seconds`."""
REGIMES = ("malloc", "recycled")
"""The default allocator, which returns large blocks to the system, and one that returns nothing."""


@dataclass(frozen=True)
class BenchSpec:
    """One measurement, as sent to the worker in JSON."""

    loss: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    backward: bool
    threads: int | None
    rounds: int | None
    budget: float
    """Seconds of timing, over all regimes."""
    peers: str | None
    skip: tuple[str, ...] = ()
    """Candidates that are left out."""
    max_step_seconds: float | None = None
    """A candidate whose step takes longer is skipped. None: no limit."""


def candidates(loss: Loss, spec: BenchSpec) -> dict[str, Callable[..., Tensor]]:
    """Return the candidates by name."""
    eager = eager_of(loss, loss.call(spec.case, InputSampler(), loss.shapes[0]))
    found: dict[str, Callable[..., Tensor]] = {"eager": eager}
    if not loss.unrolls:
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    found["fastloss"] = loss.function
    if spec.backward and "inplace_backward" in inspect.signature(loss.function).parameters:
        found["fastloss in place"] = in_place(loss.function)
    if spec.peers:
        found.update(runpy.run_path(spec.peers)["peers"](loss.name, spec.device))
    return {name: function for name, function in found.items() if name not in spec.skip}


def overwrites(candidate: str) -> bool:
    """Return whether the candidate needs inputs of its own: some peers write their gradient over the logits."""
    return candidate not in ("eager", "torch.compile", "fastloss")


def small(loss: Loss, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Cut the first size of the shape, and the last if need be, so that a float64 reference stays cheap."""
    if len(shape) > 2:
        shape = (*shape[:-1], min(shape[-1], max(1, 4 * CHECKED_ELEMENTS // math.prod(shape[1:-1]))))
    rows = max(1, min(shape[0], CHECKED_ELEMENTS // max(1, math.prod(shape[1:]))))
    while rows > 1 and loss.work((rows, *shape[1:])) > CHECKED_WORK:
        rows //= 2
    return (rows, *shape[1:])


def wrong(name: str, function: Callable[..., Tensor], loss: Loss, spec: BenchSpec, dtype: torch.dtype) -> str:
    """Return what is wrong with this candidate: fastloss must keep `check`'s rule, others half of the digits.

    The compiled eager function is held against eager itself on the full shape, to compile once only.
    """
    if name == "torch.compile":
        return ""
    result = compare(loss, spec.case, small(loss, spec.shape), dtype, spec.device, function=function)
    if result.ok or (not name.startswith("fastloss") and result.relative < torch.finfo(dtype).eps ** 0.5):
        return ""
    return f"wrong: {result}"


def disagreement(
    got: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    dtype: torch.dtype,
    allowed: Mapping[str, float] | None = None,
) -> str:
    """Describe where results on the full shape differ from eager's by more than half of the digits and `allowed`."""
    for quantity, want in eager.items():
        scale = want.abs().max().item() if want.numel() else 0.0
        enough = max(torch.finfo(dtype).eps ** 0.5 * scale, (allowed or {}).get(quantity, 0.0))
        pieces = zip(got[quantity].reshape(-1).split(2**22), want.reshape(-1).split(2**22), strict=True)
        for have, like in pieces:  # in pieces: a float64 copy of everything may not fit
            off = (have.double() - like.double()).abs()
            if not bool(((off <= enough) | (have == like) | like.isnan()).all()):
                return (
                    f"wrong on the full shape: {quantity} is off by {off.max():.2g}, largest is {scale:.2g}"
                )
    return ""


class Slow(BaseException):
    """Raised when the time is up; a compiler that catches every Exception does not catch this."""


@contextlib.contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """Raise Slow in the block when the time is up, between two operations."""

    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)  # 0: never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def keep_pages() -> None:
    """Keep glibc's allocator, where it is the one in use, from returning memory to the system."""
    with contextlib.suppress(AttributeError, OSError):
        mmap_max, trim_threshold = -4, -1
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, -1)


class Comparison:
    """The candidates of one spec and the arguments that they are called with."""

    def __init__(self, loss: Loss, spec: BenchSpec):
        self.loss, self.spec, self.dtype = loss, spec, getattr(torch, spec.dtype)
        self.kwargs = loss.call(spec.case, InputSampler(self.dtype, spec.device, fast=True), spec.shape)
        self.wrt = differentiable(self.kwargs, loss.trained or loss.wrt) if spec.backward else []
        self.ceiling = "products" if loss.multiplies else "copy"
        self.work = (
            loss.flops(spec.shape, spec.backward)
            if loss.multiplies
            else loss.traffic(spec.shape, self.dtype.itemsize, spec.backward)
        )
        self.candidates = candidates(loss, spec)

    def step(self, name: str) -> TimedStep:
        return TimedStep(self.candidates[name], self.kwargs, self.wrt, overwrites(name))

    def eager_in_float32(self) -> dict[str, Tensor]:
        """Return eager's results in float32: in half precision eager itself may take the other side of a jump."""
        function = eager_of(self.loss, self.kwargs)
        return TimedStep(function, cast(self.kwargs, torch.float32), self.wrt, copy_inputs=False).results()

    def fault(self, name: str, expected: dict[str, dict[str, Tensor]]) -> str:
        """Return why this candidate is not timed, or an empty string.

        `expected` caches results on the full shape: the first candidate's, and eager's in float32 once needed.
        """
        reason = wrong(name, self.candidates[name], self.loss, self.spec, self.dtype)
        if reason:
            return reason
        step = self.step(name)
        results = step.results()
        eager = expected.setdefault("eager", results)
        reason = disagreement(results, eager, self.dtype)
        if reason and self.dtype in HALF_TYPES:
            in_float32 = expected.get("float32") or self.eager_in_float32()
            expected["float32"] = in_float32
            reason = disagreement(results, in_float32, self.dtype, errors_of(eager, in_float32))
        step.release()
        if reason or not self.spec.max_step_seconds:
            return reason
        seconds = Timer(self.spec.device).time(step) / 1e3
        return f"a step takes {seconds:.1f} s" if seconds > self.spec.max_step_seconds else ""

    def skipped(self, emit: Callable[..., None]) -> dict[str, str]:
        """Return the candidates that are not to be timed, and why."""
        skipped: dict[str, str] = {}
        max_seconds = self.spec.max_step_seconds and CHECK_STEPS * self.spec.max_step_seconds
        expected: dict[str, dict[str, Tensor]] = {}
        for i, name in enumerate(self.candidates):
            emit(done=i, total=len(self.candidates), what=f"checking {name}")
            if name == "torch.compile" and "eager" in skipped:
                skipped[name] = "eager is skipped"
                continue
            try:
                with within(max_seconds):
                    reason = self.fault(name, expected)
            except Slow:
                reason = f"given up after {max_seconds:.0f} s"
            except Exception as error:  # a peer may raise anything: time the others
                reason = summarized(error)
            if reason:
                skipped[name] = reason
        return skipped

    def times(self, skip: Mapping[str, str], budget: float, emit: Callable[..., None]) -> dict[str, Any]:
        """Time all candidates but those in `skip`, and the ceiling, in interleaved rounds: milliseconds."""
        steps: dict[str, TimedStep | Copy | Products] = {
            name: self.step(name) for name in self.candidates if name not in skip
        }
        device = self.spec.device
        steps[self.ceiling] = (
            Products(self.work, self.dtype, device) if self.loss.multiplies else Copy(self.work, device)
        )
        timer = Timer(device)
        on_gpu = {k: s for k, s in steps.items() if isinstance(s, TimedStep) and device == "cuda"}
        peaks = {k: cuda_peak(s) for k, s in on_gpu.items()}
        gc.collect()
        gc.disable()
        for step in steps.values():
            timer.time(step)
        seconds = sum(timer.time(step) for step in steps.values()) / 1e3
        rounds = self.spec.rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / seconds)))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for r in range(rounds):
            emit(done=r, total=rounds, what=f"round {r + 1} of {rounds}")
            order = list(steps)
            for name in order[r % len(order) :] + order[: r % len(order)]:
                times[name].append(timer.time(steps[name]))
        return {"times": times, "ceiling": self.ceiling, "work": self.work, "peaks": peaks}

    def peak(self, name: str) -> int | None:
        """Return the peak memory of one candidate's step beyond its inputs, in bytes, on the CPU."""
        step = self.step(name)
        step.results()
        step.release()
        with contextlib.suppress(ImportError):
            from fastloss import memory

            memory.empty_cache()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        return rss_peak(step)


def summarized(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def summary(measured: Mapping[str, Any], candidate: str) -> dict[str, float]:
    """Return the medians of one candidate; ratios are medians of the ratios within each round."""
    times = measured["times"]
    ms = statistics.median(times[candidate])
    ceiling = measured["ceiling"]
    found = {
        "ms": ms,
        f"{CEILINGS[ceiling].unit}_per_s": measured["work"] / ms / 1e6,
        "rounds": len(times[candidate]),
    }
    for key, other in ((f"of_{ceiling}", ceiling), ("x_eager", "eager"), ("x_compile", "torch.compile")):
        if other in times:
            pairs = zip(times[other], times[candidate], strict=True)
            found[key] = statistics.median(other / ours for other, ours in pairs)
    return found


def in_fork(work: Callable[[], Any]) -> Any:
    """Run `work` in a fork of this process and return its result."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = {"result": work()}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": summarized(error)}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer = json.loads(text) if text else {"error": f"the measuring process ended with {status}"}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


def measure(loss: Loss, spec: BenchSpec, threads: int, emit: Callable[..., None]) -> dict[str, Any]:
    """Measure times by regime and memory by candidate; say which candidates were skipped and why."""

    def part(start: float, fraction: float, what: str) -> Callable[..., None]:
        return lambda done, total, **more: emit(
            done=start + fraction * done / max(total, 1), what=f"{what}: {more['what']}"
        )

    def job(work: Callable[[], Any]) -> Any:
        if spec.device != "cpu":  # CUDA cannot be used on both sides of a fork
            return work()

        def run() -> Any:
            torch.set_num_threads(threads)
            return work()

        return in_fork(run)

    comparison = Comparison(loss, spec)
    regimes = REGIMES if spec.device == "cpu" else ("cuda",)
    skipped = job(lambda: comparison.skipped(part(0.0, 0.2, "check")))
    measured = {}
    for i, regime in enumerate(regimes):

        def timed(regime: str = regime, i: int = i) -> dict[str, Any]:
            if regime == "recycled":
                keep_pages()
            fraction = 0.6 / len(regimes)
            progress = part(0.2 + i * fraction, fraction, regime)
            return comparison.times(skipped, spec.budget / len(regimes), progress)

        measured[regime] = job(timed)
    peaks = measured[regimes[0]]["peaks"]
    if spec.device == "cpu":
        for i, name in enumerate(comparison.candidates):
            emit(done=0.8 + 0.2 * i / len(comparison.candidates), what=f"memory of {name}")
            if name not in skipped:
                peaks[name] = job(partial(comparison.peak, name))
    return {
        "regimes": measured,
        "skipped": skipped,
        "peaks": peaks,
        "threads": threads,
        "input_bytes": next(v.nbytes for v in comparison.kwargs.values() if isinstance(v, Tensor)),
    }


@functools.cache
def prepare_compiler() -> None:
    """Warm torch.compile up before the forks: its first use takes seconds."""
    x = torch.rand(8, requires_grad=True)
    with contextlib.suppress(Exception):  # a candidate that cannot be compiled says so itself
        torch.compile(lambda v: v.exp().log_softmax(0).sum())(x).backward()
    torch._dynamo.reset()


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from torch._inductor import compile_fx, config  # noqa: F401  the import takes seconds: once, here

        config.compile_threads = 1  # its workers would be started anew in every fork
    for line in sys.stdin:
        given = json.loads(line)
        spec = BenchSpec(**{**given, "shape": tuple(given["shape"]), "skip": tuple(given["skip"])})
        if spec.device == "cpu" and "torch.compile" not in spec.skip:
            emit(done=0.0, what="warming up torch.compile")
            prepare_compiler()
        (loss,) = entries(spec.loss)
        try:
            emit(result=in_fork(partial(measure, loss, spec, spec.threads or threads, emit)))
        except RuntimeError as error:
            emit(error=str(error))


if __name__ == "__main__":
    main()
