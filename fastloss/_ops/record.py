"""Recording of one call for `fastloss.profile`: clock or events, bytes, memory."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastloss._ops import autograd
from fastloss.memory import _C

PUBLIC = ("fastloss.losses.", "fastloss.distributed.")
"""Modules whose functions calls are named after."""


@dataclass
class Pass:
    """One forward or backward pass. `start_ms` counts from the beginning of the profile; None: it was not timed."""

    start_ms: float | None = None
    ms: float | None = None
    bytes: int = 0
    """Minimal traffic: every tensor read once, every result written once, as if no row were ignored."""
    flops: int = 0
    """FLOPs of the GEMMs."""
    extra_bytes: int = 0
    """Peak memory beyond that in use before, results included."""


@dataclass
class Call:
    """One call of an operator, by the name of the public function that made it."""

    loss: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    forward: Pass = field(default_factory=Pass)
    backward: list[Pass] = field(default_factory=list)


def _bytes(tensors: Any) -> int:
    """Return the bytes of tensors in memory; broadcast dimensions count once."""
    return sum(
        math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) * t.itemsize
        for t in tensors
        if isinstance(t, Tensor) and t.numel()
    )


def _public_name(operator: str) -> str:
    """Return the name of the outermost public function on the way to the operator."""
    frame, name = sys._getframe(2), operator
    while frame is not None:
        code = frame.f_code.co_name
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PUBLIC) and code in frame.f_globals.get("__all__", ()):
            name = code
        frame = frame.f_back
    return name


class Recorder:
    """The state of a profile: its options, the calls and their spans."""

    def __init__(self, memory: bool, nvtx: bool):
        self.memory, self.nvtx = memory, nvtx
        self.seen: list[Call] = []
        self.spans: list[tuple[Span, Pass]] = []
        self.origins: dict[torch.device, tuple[Any, float]] = {}
        self.began = 0.0

    def record(self, op: autograd.Differentiable, tensors: Sequence[Tensor | None]) -> Record:
        """Return the record of a new call."""
        raise NotImplementedError


class Span:
    """Start and end of one pass, on the host's clock or as events on the device's stream."""

    def __init__(self, profile: Recorder, device: torch.device):
        self.profile, self.device = profile, device
        self.cuda = device.type == "cuda"
        self.timed = not (self.cuda and torch.cuda.is_current_stream_capturing())
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not self.timed:
            return
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.profile.origins.setdefault(self.device, (event, time.perf_counter()))
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self, into: Pass) -> None:
        """Write the times to `into`; wait for the device if it is not that far."""
        if len(self.marks) != 2:
            return
        start, stop = self.marks
        if self.cuda:
            stop.synchronize()
            origin, at = self.profile.origins[self.device]
            into.start_ms = (at - self.profile.began) * 1e3 + origin.elapsed_time(start)
            into.ms = start.elapsed_time(stop)
        else:
            into.start_ms, into.ms = (start - self.profile.began) * 1e3, (stop - start) * 1e3


class Peak:
    """Peak memory in bytes since its construction."""

    def __init__(self, device: torch.device, measured: bool):
        self.device = device if measured else None
        if self.device is not None and device.type == "cuda":
            self.before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        elif self.device is not None and _C is not None:
            _C.pool_watch()

    def read(self, results: int) -> int:
        if self.device is None:
            return 0
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(results, _C.pool_watched() if _C is not None else 0)


class Record:
    """The record of one call, as `autograd.py` uses it: a context around each pass, which notes the results."""

    def __init__(self, profile: Recorder, op: autograd.Differentiable, tensors: Sequence[Tensor | None]):
        first = next(t for t in tensors if t is not None)
        self.profile, self.op, self.device = profile, op, first.device
        self.read = _bytes(tensors)
        self.shapes = [None if t is None else t.shape for t in tensors]
        self.needed = [t is not None and t.requires_grad for t in tensors]
        self.plan: Any = None
        self.call = Call(
            _public_name(op.name), op.name, tuple(first.shape), str(first.dtype)[6:], str(first.device)
        )
        self.results: Any = None

    def note(self, results: Any) -> Any:
        """Note and return the results of a pass."""
        self.results = results
        return results

    @contextlib.contextmanager
    def _watched(self, what: str) -> Iterator[Pass]:
        nvtx = self.profile.nvtx
        span, done = Span(self.profile, self.device), Pass()
        if nvtx:
            torch.cuda.nvtx.range_push(f"fastloss {self.call.loss} {what}")
        try:
            peak = Peak(self.device, self.profile.memory)
            span.mark()
            yield done
            span.mark()
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()
        results, self.results = self.results, None
        written = _bytes([results] if isinstance(results, Tensor) else results)
        done.extra_bytes = peak.read(written)
        done.bytes += written
        self.profile.spans.append((span, done))

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        with self._watched("forward") as done:
            yield
            done.bytes = self.read
        precomputed, self.plan = getattr(self.plan, "precomputed_grads", None), None
        done.flops = self.op.flops(self.shapes, self.needed if precomputed else ())
        self.call.forward = done
        self.profile.seen.append(self.call)

    @contextlib.contextmanager
    def backward(self, ctx: Any, upstream: Sequence[Tensor | None]) -> Iterator[None]:
        if autograd.profiler != self.profile.record:  # that profile is over
            yield
            return
        precomputed = bool(getattr(ctx.plan, "precomputed_grads", None))
        with self._watched("backward") as done:
            yield
            if precomputed:
                self.results = ()
        done.bytes += _bytes(upstream)
        if not precomputed:
            done.bytes += _bytes(ctx.saved_tensors)
            done.flops = self.op.flops(self.shapes, ctx.needs_input_grad)
        self.call.backward.append(done)
