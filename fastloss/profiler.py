"""Profiling of fastloss calls inside a program: time, bytes, and the achieved fraction of the machine's ceiling.

`_ops/autograd.py` calls `profile.record` at every call while a profile is active; nothing else in the package knows
about it.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastloss._ops import autograd
from fastloss._ops.record import Call, Pass, Record, Recorder

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Call", "Group", "Pass", "profile"]


@dataclass
class Group:
    """Equal calls, with the medians of their times in ms.

    `of_ceiling` is the achieved fraction of the copy bandwidth, or of the rate of `torch.mm` for operators with GEMMs.
    """

    loss: str
    operator: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    calls: int
    forward_ms: float | None
    backward_ms: float | None
    bytes: int
    flops: int
    GB_per_s: float | None
    of_ceiling: float | None
    extra_bytes: int


# ---- ceilings, measured once in a process


@functools.cache
def _copy_bandwidth(device: str, threads: int) -> float:
    """Return the bandwidth in bytes per second of a copy that exceeds the caches."""
    from fastloss._cli.timing import Copy

    size = 2**29
    if device == "cpu":
        size = min(size, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    return size / _seconds(Copy(size, device).run, device)


@functools.cache
def _product_rate(device: str, dtype: str, threads: int) -> float:
    """Return the FLOP/s of a GEMM of square matrices."""
    from fastloss._cli.timing import Products

    products = Products(0, getattr(torch, dtype), device)
    return products.flops / _seconds(products.run, device)


def _seconds(run: Any, device: str, rounds: int = 7) -> float:
    wait = functools.partial(torch.cuda.synchronize, device) if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


class profile(Recorder):
    """Record every call of fastloss inside the block: time, bytes, memory, fraction of the ceiling.

    ```python
    with fastloss.profile() as p:
        train_step()
    rich.print(p.table())
    ```

    Times are of the operators, without what a loss does around them in PyTorch. On CUDA they come from events, which
    are read after the block: profiling adds no synchronisation. Calls inside a `torch.compile`d function or a CUDA
    graph are not timed here; `torch.profiler` shows them, and all others, as `fastloss::<operator>_fwd` and `_bwd`.
    There is no overhead outside such a block.

    The ceiling is the bandwidth of a copy of 256 MiB, measured once in a process, after the block.

    Args:
        memory: measure the peak memory of each pass. On CUDA this resets `torch.cuda.max_memory_allocated`; on the
            CPU it counts results and what comes from `fastloss.memory`. Default: True.
        nvtx: also mark every pass as an NVTX range, for Nsight Systems. Default: False.

    Raises:
        RuntimeError: where another profile is active, or for `nvtx` where torch has none.
    """

    def __init__(self, *, memory: bool = True, nvtx: bool = False):
        super().__init__(memory, nvtx)

    def record(self, op: autograd.Differentiable, tensors: Sequence[Tensor | None]) -> Record:
        return Record(self, op, tensors)

    def __enter__(self) -> profile:
        if autograd.profiler is not None:
            raise RuntimeError("fastloss.profile: another profile is active")
        if self.nvtx:
            torch.cuda.nvtx.mark("fastloss.profile")  # raises where torch has no NVTX
        if not self.began:
            self.began = time.perf_counter()
        autograd.profiler = self.record
        return self

    def __exit__(self, *_: object) -> None:
        autograd.profiler = None

    @property
    def calls(self) -> list[Call]:
        """All calls in order. Waits for the device if necessary."""
        for span, into in self.spans:
            span.read(into)
        self.spans.clear()
        return self.seen

    def groups(self) -> list[Group]:
        """Return the groups of equal calls, in order of their first call."""
        found: dict[tuple, list[Call]] = {}
        for c in self.calls:
            found.setdefault((c.loss, c.operator, c.shape, c.dtype, c.device), []).append(c)
        return [self._group(same) for same in found.values()]

    def _group(self, same: list[Call]) -> Group:
        one, backward = same[0], [p for c in same for p in c.backward]
        forward_ms = _median([c.forward.ms for c in same])
        backward_ms = _median([p.ms for p in backward])
        passes = [one.forward, *one.backward[:1]]
        total, flops = sum(p.bytes for p in passes), sum(p.flops for p in passes)
        seconds = (forward_ms + (backward_ms or 0.0)) / 1e3 if forward_ms else None
        of_ceiling = None
        if seconds and flops:
            of_ceiling = flops / seconds / _product_rate(one.device, one.dtype, torch.get_num_threads())
        elif seconds:
            of_ceiling = total / seconds / _copy_bandwidth(one.device, torch.get_num_threads())
        return Group(
            one.loss,
            one.operator,
            one.shape,
            one.dtype,
            one.device,
            len(same),
            forward_ms,
            backward_ms,
            total,
            flops,
            total / seconds / 1e9 if seconds else None,
            of_ceiling,
            max(p.extra_bytes for p in [*(c.forward for c in same), *backward]),
        )

    def table(self) -> Table:
        """Return a table for the terminal: `rich.print(p.table())`."""
        from rich.table import Table

        from fastloss._cli.report import number

        table = Table(title="fastloss calls", title_justify="left", box=None, padding=(0, 1, 0, 0))
        left = ("loss", "operator", "shape", "type", "device")
        right = ("calls", "forward\nms", "backward\nms", "moved\nMiB", "\nGB/s", "of\nceiling", "extra\nMiB")
        for name in left + right:
            table.add_column(name, justify="left" if name in left else "right", no_wrap=name in right)
        for g in self.groups():
            table.add_row(
                g.loss,
                "" if g.operator == g.loss else g.operator,
                "x".join(map(str, g.shape)),
                g.dtype,
                g.device,
                str(g.calls),
                number(g.forward_ms),
                number(g.backward_ms),
                number(g.bytes / 2**20),
                number(g.GB_per_s),
                "-" if g.of_ceiling is None else f"{g.of_ceiling:.0%}",
                number(g.extra_bytes / 2**20),
            )
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the achieved bandwidth of each loss over its bytes, with the ceiling of a copy."""
        from fastloss._cli import plot

        timed = [asdict(g) for g in self.groups() if g.GB_per_s]
        ceilings = {
            d: _copy_bandwidth(d, torch.get_num_threads()) / 1e9 for d in sorted({g["device"] for g in timed})
        }
        plot.roofline(timed, ceilings, Path(path))

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the passes for chrome://tracing or Perfetto."""
        events = []
        for call in self.calls:
            passes = [("forward", call.forward), *(("backward", p) for p in call.backward)]
            for what, p in passes:
                if p.ms is not None:
                    about = asdict(p) | {"shape": call.shape, "dtype": call.dtype, "operator": call.operator}
                    events.append(
                        {"name": f"{call.loss} {what}", "cat": "fastloss", "ph": "X", "pid": "fastloss"}
                        | {"tid": call.device, "ts": p.start_ms * 1e3, "dur": p.ms * 1e3, "args": about}
                    )
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
