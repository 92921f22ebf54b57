"""Budgets of the kernels that matter, as the machine code for sm_90 has it. budgets.txt holds the numbers.

    python -m tests.cuda_on_cpu.budgets            # print budgets.txt as it would be now
    python -m tests.cuda_on_cpu.budgets --write    # write it: the difference is what a change to a kernel costs
    python -m tests.cuda_on_cpu.budgets --all      # the same columns for every kernel, to build/registers.txt

Columns of budgets.txt, and what may be exceeded by SLACK:

    registers   of a thread, at most
    blocks      resident on a multiprocessor as far as registers and static shared memory allow, at least; `warps`
                follows from it
    load store  bytes of a lane's widest load and store in the hot loops, at least
    flight      global loads issued before a loaded value is first used, at least
    read        instructions an element in the hot loop that loads and does not store, at most
    write       the same of the loop that stores; of a kernel that holds a row in registers all its instructions
    calls       of functions in the hot loops (slow divisions and the like), at most

A multiprocessor issues 4 instructions of 32 threads a cycle and, at 132 of them, 1.8 GHz and 4.3 TB/s, moves 18 bytes
in it: a bfloat16 that is read and written is bound by memory below 28 instructions, a float32 below 56, if enough warps
are resident. So are 14 and 28 where elements are only read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import loops, nvcc, sass

FILE = Path(__file__).with_name("budgets.txt")
SLACK = 1.05
# Warps of every kernel, at least: a quarter of a multiprocessor's slots, for float64 an eighth; and exceptions.
WARPS, WARPS_FLOAT64 = 16, 8
FEWER_WARPS = {"aggregation: aggregate_kernel<": 8}  # a single block


@dataclass
class Family:
    pattern: str  # of names; {T} stands for float32 and bfloat16: float16 has the code of bfloat16, nearly
    streams: int = 1  # these three as in loops.Elements
    of_iteration: int = 0
    heaviest: bool = False
    goal: str = ""

    def matches(self, name: str) -> bool:
        pattern = rf"\b{self.pattern}".replace("{T}", "(float|__nv_bfloat16)")
        return re.search(pattern, name) is not None


FAMILIES = [
    Family(
        r"(rows_kernel<CrossEntropy<float, 0>, {T}, |row_clusters_kernel<CrossEntropy<float, 0>, {T}>)",
        goal="64 registers, so 32 warps, also for rows held in registers: a program that did nothing else took 274 us "
        "for 32768 x 8192 with them, these kernels 307",
    ),
    Family(
        r"(rows_kernel<(CrossEntropy<float, 1>|Focal<float, 0>), {T}, |row_clusters_kernel<Focal<float, 0>, {T}>)",
        goal="as cross-entropy",
    ),
    Family(
        r"rows_kernel<Uncapped<TokenStats<float, 0>>, {T}, ",
        goal="more than the 16 warps of 512 threads, which issue too little for long rows",
    ),
    Family(
        r"rows_kernel<CrossEntropyNumbers<float, 0>, {T}, ",
        goal="as cross-entropy, but for the numbers' own term",
    ),
    Family(
        r"elements_kernel<(FirstAlone<)?SigmoidFocal<float, [0-4]>>?, {T}>",
        2,
        goal="40 instructions an element in bfloat16 are bound by memory",
    ),
    Family(r"elements_kernel<(FirstAlone<)?BinaryCrossEntropyWithLogits<float, 0>>?, {T}>", 2),
    Family(r"elements_kernel<SquaredError<float, 0>, {T}>", 2),
    Family(r"elements_kernel<DirectPreference<float, 0>, {T}>", 4),
    Family(r"elements_kernel<PolicyGradient<float, 0>, {T}>", 5),
    Family(
        r"divergence_kernel<{T}, [0-2], \d+>",
        2,
        heaviest=True,
        goal="two rows read and two written, 16 bytes at a time: 56 instructions a class in bfloat16; 32 warps",
    ),
    Family(
        r"similarity::(statistics|gradient|sigmoid)_kernel<float, ",
        goal="4 bytes read, 2 written: 42 instructions",
    ),
    Family(r"ctc: \w+_kernel<{T}>"),
    Family(
        r"returns: \w+_kernel<.*, {T}, \d+, \w+>",
        of_iteration=4,  # steps of a thread
        goal="three arrays read and two written: 70 instructions a step in bfloat16",
    ),
    Family(r"feature_sums: features_kernel<{T}, 1>", 2),
    Family(r"feature_sums: features_kernel<{T}, 2>", 3),
    Family(r"(scale|sum)_kernel<{T}>"),
]
HEADER = "registers blocks warps load store flight   read  write calls"


@dataclass
class Budget:
    registers: int
    blocks: int
    warps: int
    load: int
    store: int
    flight: int
    read: float
    write: float
    calls: int

    def __str__(self) -> str:
        return (
            f"{self.registers:9} {self.blocks:6} {self.warps:5} {self.load:4} {self.store:5} {self.flight:6} "
            f"{self.read:6.1f} {self.write:6.1f} {self.calls:5}"
        )

    def exceeded_by(self, now: Budget) -> Iterable[str]:
        """What has become worse, in words."""
        for column in ("registers", "read", "write", "calls"):
            limit, number = getattr(self, column), getattr(now, column)
            if number > limit * SLACK:
                yield f"{column} {number}, budget {limit}"
        for column in ("blocks", "load", "store", "flight"):
            limit, number = getattr(self, column), getattr(now, column)
            if number < limit:
                yield f"{column} {number}, budget {limit}"
        for column in ("read", "write"):
            if bool(getattr(self, column)) != bool(getattr(now, column)):
                yield f"{column} {getattr(now, column)}, budget {getattr(self, column)}: there is another loop now"


def family_of(name: str) -> Family | None:
    return next((f for f in FAMILIES if f.matches(name)), None)


def warps_of(name: str) -> int:
    """The least that may be resident of any kernel."""
    for part, warps in FEWER_WARPS.items():
        if part in name:
            return warps
    return WARPS_FLOAT64 if sass.element_size(name) == 8 else WARPS


def measured(kernels: list[nvcc.Kernel]) -> dict[str, Budget]:
    def work(k: nvcc.Kernel) -> sass.Work:
        f = family_of(k.name) or Family("")
        return (
            k.code,
            k.tables,
            loops.Elements(sass.element_size(k.name), f.streams, f.of_iteration, f.heaviest),
        )

    found = sass.hot_loops([work(k) for k in kernels])
    return {k.name: budget(k, h) for k, h in zip(kernels, found, strict=True)}


def budget(k: nvcc.Kernel, h: loops.Hot) -> Budget:
    return Budget(k.registers, k.blocks, k.warps, h.load, h.store, h.flight, h.read, h.write, h.calls)


def read() -> tuple[str, dict[str, Budget]]:
    """The compiler's release, and the budgets by kernel."""
    lines = FILE.read_text().splitlines()
    rows = [line.split(maxsplit=9) for line in lines if line and line.lstrip()[0].isdigit()]
    return lines[0].split()[-1], {
        r[9]: Budget(*map(int, r[:6]), float(r[6]), float(r[7]), int(r[8])) for r in rows
    }


def table(release: str, now: dict[str, Budget]) -> str:
    """The content of budgets.txt."""
    lines = [f"# Written by `python -m tests.cuda_on_cpu.budgets --write`, see there. nvcc {release}"]
    for family in FAMILIES:
        rows = sorted((name, b) for name, b in now.items() if family_of(name) is family)
        lines += ["", *([f"# goal: {family.goal}"] if family.goal else []), f"{HEADER}  kernel"]
        lines += [f"{b}  {name}" for name, b in rows]
    return "\n".join(lines) + "\n"


def full_table(kernels: list[nvcc.Kernel], now: dict[str, Budget]) -> str:
    """Every kernel; `-` where machine code was not looked at."""
    head = f"{'registers':>9} {'threads':>7} {'shared':>6} {'stack':>5} {'spills':>6}"
    lines = [f"{head} {HEADER.split(maxsplit=1)[1]}  kernel ({nvcc.ARCH})"]
    for k in sorted(kernels, key=lambda k: (-k.registers, k.name)):
        mine = f"{k.registers:9} {k.threads:7} {k.shared:6} {k.stack:5} {k.spill_stores + k.spill_loads:6}"
        known = (
            str(now[k.name])[9:]
            if k.name in now
            else f" {k.blocks:6} {k.warps:5}    -     -      -      -      -     -"
        )
        lines.append(f"{mine}{known}  {k.name}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compiler = nvcc.find_nvcc()
    assert compiler, "there is no nvcc"
    every = [k for source in nvcc.SOURCES for k in nvcc.kernels_in(source, compiler)]
    if "--all" in sys.argv:
        (nvcc.build.ROOT / "build" / "registers.txt").write_text(full_table(every, measured(every)))
    else:
        text = table(nvcc.release(compiler), measured([k for k in every if family_of(k.name)]))
        if "--write" in sys.argv:
            FILE.write_text(text)
        else:
            sys.stdout.write(text)
