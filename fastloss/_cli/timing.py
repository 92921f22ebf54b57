"""A candidate's step, and how its time and memory are measured."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloss._registry.accuracy import values_by_name


class TimedStep:
    """Forward and backward of one candidate; with `copy_inputs`, on inputs that it may overwrite."""

    time_factor = 1.0
    """A run's time is multiplied by this."""

    def __init__(
        self, function: Callable[..., Tensor], kwargs: Mapping[str, Any], wrt: list[str], copy_inputs: bool
    ):
        self.function = function
        self.pristine = {k: kwargs[k] for k in wrt} if copy_inputs else {}
        self.leaves = {
            k: (kwargs[k].clone() if copy_inputs else kwargs[k].detach()).requires_grad_() for k in wrt
        }
        self.kwargs = {**kwargs, **self.leaves}
        self.upstream: list[Tensor] | None = None

    def prepare(self) -> None:
        """Undo what the last run overwrote (not timed)."""
        with torch.no_grad():
            for k, v in self.pristine.items():
                self.leaves[k].copy_(v)

    def run(self) -> Tensor | tuple[Tensor, ...]:
        value = self.function(**self.kwargs)
        if self.leaves:
            values = [value] if isinstance(value, Tensor) else list(value)
            if self.upstream is None:
                self.upstream = [torch.ones_like(v) for v in values]
            torch.autograd.backward(values, self.upstream)
        return value

    def release(self) -> None:
        """Free the gradients (not timed)."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def results(self) -> dict[str, Tensor]:
        self.prepare()
        values = values_by_name(self.run())
        return {
            **{k: v.detach() for k, v in values.items()},
            **{k: v.grad for k, v in self.leaves.items()},
        }


class Copy:
    """The ceiling of memory-bound losses: a copy between two warm buffers, half the traffic read, half written."""

    time_factor = 1.0

    def __init__(self, traffic: int, device: str):
        n = max(1, traffic // 8)
        self.source = torch.ones(n, device=device)
        self.target = torch.zeros(n, device=device)

    def prepare(self) -> None: ...

    def run(self) -> Tensor:
        return self.target.copy_(self.source)

    def release(self) -> None: ...


class Products:
    """The ceiling of GEMM-bound losses: `flops` at the rate of `torch.mm` of square matrices."""

    def __init__(self, flops: int, dtype: torch.dtype, device: str):
        n = 8192 if device.startswith("cuda") else 1024
        self.factor, self.out = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
        self.flops = 2 * n**3
        self.time_factor = flops / self.flops

    def prepare(self) -> None: ...

    def run(self) -> Tensor:
        return torch.mm(self.factor, self.factor, out=self.out)

    def release(self) -> None: ...


class Timer:
    """Times one run in milliseconds; on CUDA with events, after the L2 cache was overwritten."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, step: TimedStep | Copy | Products) -> float:
        step.prepare()
        if self.cuda:
            self.flush.zero_()
            self.start.record()
            step.run()
            self.stop.record()
            torch.cuda.synchronize()
            ms = self.start.elapsed_time(self.stop)
        else:
            start = time.perf_counter()
            step.run()
            ms = (time.perf_counter() - start) * 1e3
        step.release()
        return ms * step.time_factor


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` as the replay of a CUDA graph: without host overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()  # the runs' blocks are in this stream's pool: the graph has its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def status_bytes(field: str) -> int:
    """Return a memory field of this process's /proc status, such as VmRSS or its high-water mark VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class RssSampler(threading.Thread):
    """Samples the resident size every millisecond and keeps the peak: where VmHWM cannot be reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.finished = threading.Event()

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            while not self.finished.wait(0.001):
                statm.seek(0)
                self.peak = max(self.peak, int(statm.read().split()[1]) * page)


def rss_peak(step: TimedStep) -> int | None:
    """Return the resident bytes that one run adds at its peak; None on systems without /proc."""
    step.prepare()
    sampler: RssSampler | None = None
    try:
        before = status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        except OSError:
            sampler = RssSampler()
            sampler.start()
        step.run()
        if sampler is None:
            return max(0, status_bytes("VmHWM") - before)
        sampler.finished.set()
        sampler.join()
        return max(0, sampler.peak - before)
    except FileNotFoundError:
        return None
    finally:
        step.release()


def cuda_peak(step: TimedStep) -> int:
    """Return the bytes that one run allocates through torch at its peak."""
    step.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    step.release()
    return peak
