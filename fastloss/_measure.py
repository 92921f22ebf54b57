"""One measurement in a process of its own, which `bench` starts as `python -m fastloss._measure SPEC`.

A process of its own, because the allocator's regime is chosen by the environment and because the
memory of one candidate must not be served from what another one left behind. Lines of JSON go to
standard output: progress, then one with the result. What anything else prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import json
import math
import os
import runpy
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastloss._registry import Draw, Loss, entries
from fastloss._steps import Clock, Copy, Step, cuda_peak, rss_peak
from fastloss.check import compare, differentiable, eager_of

CHECKED_ELEMENTS = 2**20
MIN_ROUNDS, MAX_ROUNDS = 5, 300


@dataclass(frozen=True)
class Spec:
    """What to measure; travels between the processes as JSON."""

    loss: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    backward: bool
    threads: int | None
    rounds: int | None
    budget: float
    """Seconds of timing in this process."""
    peers: str | None
    peak_of: str | None = None
    """Measure the memory of this candidate, and no times."""


def candidates(loss: Loss, spec: Spec) -> dict[str, Callable[..., Tensor]]:
    """Who competes, by name."""
    eager = eager_of(loss, loss.call(spec.case, Draw(), loss.shapes[0]))
    found: dict[str, Callable[..., Tensor]] = {"eager": eager}
    if not loss.unrolls:
        found["torch.compile"] = torch.compile(eager, dynamic=False)
    found["fastloss"] = loss.function
    if spec.backward and "inplace_backward" in inspect.signature(loss.function).parameters:
        found["fastloss in place"] = partial(loss.function, inplace_backward=True)
    if spec.peers:
        found.update(runpy.run_path(spec.peers)["peers"](loss.name, spec.device))
    return found


def overwrites(candidate: str) -> bool:
    """Whether it needs inputs of its own: some peers write their gradient over the logits."""
    return candidate not in ("eager", "torch.compile", "fastloss")


def small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its first size cut, so that a float64 reference stays cheap."""
    return (max(1, min(shape[0], CHECKED_ELEMENTS // max(1, math.prod(shape[1:])))), *shape[1:])


def wrong(name: str, function: Callable[..., Tensor], loss: Loss, spec: Spec, dtype: torch.dtype) -> str:
    """Why this candidate is not timed: fastloss must keep `check`'s rule, others half of the digits.

    The compiled eager function is held against eager itself on the full shape, to compile once only.
    """
    if name == "torch.compile":
        return ""
    result = compare(loss, spec.case, small(spec.shape), dtype, spec.device, function=function)
    if result.ok or (not name.startswith("fastloss") and result.relative < torch.finfo(dtype).eps ** 0.5):
        return ""
    return f"wrong: {result}"


def disagreement(got: Mapping[str, Tensor], eager: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Where the results on the full shape part from eager's by more than half of the digits."""
    for quantity, want in eager.items():
        scale = want.abs().max().item() if want.numel() else 0.0
        pieces = zip(got[quantity].reshape(-1).split(2**22), want.reshape(-1).split(2**22), strict=True)
        for have, like in pieces:  # in pieces, because float64 of everything may not fit
            off = (have.double() - like.double()).abs()
            if not bool(
                ((off <= torch.finfo(dtype).eps ** 0.5 * scale) | (have == like) | like.isnan()).all()
            ):
                return (
                    f"wrong on the full shape: {quantity} is off by {off.max():.2g}, largest is {scale:.2g}"
                )
    return ""


def time_all(loss: Loss, spec: Spec, emit: Callable[..., None]) -> dict[str, Any]:
    """Check every candidate, then time those that are right, one after the other in every round."""
    dtype = getattr(torch, spec.dtype)
    kwargs = loss.call(spec.case, Draw(dtype, spec.device), spec.shape)
    wrt = differentiable(kwargs, loss.wrt) if spec.backward else []
    traffic = loss.traffic(spec.shape, dtype.itemsize, spec.backward)
    steps: dict[str, Step | Copy] = {}
    refused: dict[str, str] = {}
    expected: dict[str, Tensor] = {}
    everyone = candidates(loss, spec)
    for i, (name, function) in enumerate(everyone.items()):
        emit(done=i, total=4 * len(everyone), what=f"checking {name}")
        if name == "torch.compile" and "eager" in refused:
            refused[name] = "eager is refused"
            continue
        try:
            reason = wrong(name, function, loss, spec, dtype)
            step = Step(function, kwargs, wrt, overwrites(name))
            if not reason:
                results = step.results()
                expected = expected or results
                reason = disagreement(results, expected, dtype)
                step.release()
        except Exception as error:  # a peer may raise anything; the others are still of interest
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if reason:
            refused[name] = reason
        else:
            steps[name] = step
    del expected
    results = step = None  # the last ones would keep a gradient alive
    steps["copy"] = Copy(traffic, spec.device)

    clock = Clock(spec.device)
    peaks = {k: cuda_peak(s) for k, s in steps.items() if k != "copy"} if spec.device == "cuda" else {}
    gc.collect()
    gc.disable()
    for step in steps.values():
        clock.time(step)
    seconds = sum(clock.time(step) for step in steps.values()) / 1e3
    rounds = spec.rounds or max(MIN_ROUNDS, min(MAX_ROUNDS, int(spec.budget / seconds)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for r in range(rounds):
        emit(done=rounds + 3 * r, total=4 * rounds, what=f"round {r + 1} of {rounds}")
        order = list(steps)
        for name in order[r % len(order) :] + order[: r % len(order)]:
            times[name].append(clock.time(steps[name]))
    return {
        "times": times,
        "refused": refused,
        "peaks": peaks,
        "traffic": traffic,
        "threads": torch.get_num_threads(),
        "input_bytes": next(v.nbytes for v in kwargs.values() if isinstance(v, Tensor)),
    }


def summary(measured: Mapping[str, Any], candidate: str) -> dict[str, float]:
    """Medians of one candidate; ratios are medians of the ratios within each round."""
    times = measured["times"]
    ms = statistics.median(times[candidate])
    found = {"ms": ms, "GB_per_s": measured["traffic"] / ms / 1e6, "rounds": len(times[candidate])}
    for key, other in (("of_copy", "copy"), ("x_eager", "eager"), ("x_compile", "torch.compile")):
        if other in times:
            pairs = zip(times[other], times[candidate], strict=True)
            found[key] = statistics.median(theirs / own for theirs, own in pairs)
    return found


def peak(loss: Loss, spec: Spec) -> dict[str, Any]:
    """Bytes beyond the inputs at the highest point of one candidate's step, on the CPU."""
    assert spec.peak_of is not None
    kwargs = loss.call(spec.case, Draw(getattr(torch, spec.dtype)), spec.shape)
    wrt = differentiable(kwargs, loss.wrt) if spec.backward else []
    step = Step(candidates(loss, spec)[spec.peak_of], kwargs, wrt, overwrites(spec.peak_of))
    step.results()
    step.release()
    with contextlib.suppress(ImportError):
        from fastloss import memory

        memory.empty_cache()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    return {"peak": rss_peak(step)}


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    if spec.threads:
        torch.set_num_threads(spec.threads)
    (loss,) = entries(spec.loss)
    spec = Spec(**{**vars(spec), "shape": tuple(spec.shape)})
    emit(result=peak(loss, spec) if spec.peak_of else time_all(loss, spec, emit))


if __name__ == "__main__":
    main()
