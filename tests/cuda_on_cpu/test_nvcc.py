"""nvcc's own account of every kernel, for sm_90: no spills, no local memory, and the registers on record.

The table goes to the test log (`pytest -s` or `-rP`) and to build/registers.txt.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import build

ARCH = "sm_90"
OUT = build.ROOT / "build" / "nvcc"
SOURCES = sorted((build.CSRC / "cuda").rglob("*.cu"))

# Kernels that index a local array by a variable: a part of their name, and the bytes of stack they may use.
STACK_ALLOWED: dict[str, int] = {}

FUNCTION = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Kernel:
    name: str
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int = 0
    shared: int = 0


def compile_log(source: Path, nvcc: str) -> str:
    """What `ptxas -v` says of one file: from the package's build if that is up to date, else compiled here.

    Here too it is compiled again only if it or a header has changed.
    """
    from ninja import BIN_DIR
    from ninja.ninja_syntax import Writer

    read = [p for folder in ("math", "drivers", "losses", "cuda") for p in (build.CSRC / folder).rglob("*.*")]
    newest = max(p.stat().st_mtime for p in read)
    for built in (build.ROOT / "build").glob(f"*/cuda_{source.stem}.o"):
        log = built.with_name(f"{built.name}.log")
        if built.stat().st_mtime > newest and log.exists() and f"for '{ARCH}'" in log.read_text():
            return log.read_text()

    OUT.mkdir(parents=True, exist_ok=True)
    text, out = io.StringIO(), f"{source.stem}.cubin"
    n = Writer(text, width=110)
    n.rule(
        "nvcc",
        f"{nvcc} -MMD -MF $out.d -O3 -std=c++20 -Xptxas -v -arch={ARCH} -cubin -c $in -o $out "
        "> $out.log 2>&1 || (cat $out.log; false)",
        depfile="$out.d",
        deps="gcc",
    )
    n.build(out, "nvcc", str(source))
    file = OUT / f"{source.stem}.ninja"
    file.write_text(text.getvalue())
    made = subprocess.run(
        [str(Path(BIN_DIR, "ninja")), "-f", file.name], cwd=OUT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout
    return (OUT / f"{out}.log").read_text()


def kernels_of(log: str) -> Iterator[Kernel]:
    kernel = None
    for line in log.splitlines():
        if match := FUNCTION.search(line):
            if kernel:
                yield kernel
            kernel = Kernel(match[1]) if match[2] == ARCH else None
        elif not kernel:
            continue
        elif match := LOCAL.search(line):
            # once for the kernel and once for each function that it calls
            stack, stores, loads = map(int, match.groups())
            kernel.stack = max(kernel.stack, stack)
            kernel.spill_stores += stores
            kernel.spill_loads += loads
        elif match := USED.search(line):
            kernel.registers, kernel.shared = int(match[1]), int(match[2] or 0)
    if kernel:
        yield kernel


def readable(names: list[str]) -> list[str]:
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True
    ).stdout.splitlines()
    drop = re.compile(r"^void |\(anonymous namespace\)::|fastloss::|cuda::|generic::|\(.*\)$")
    return [drop.sub("", name) for name in out]


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        pytest.skip("there is no nvcc: nothing compiles the kernels for a GPU here")
    assert SOURCES
    found = [kernel for source in SOURCES for kernel in kernels_of(compile_log(source, nvcc))]
    for kernel, name in zip(found, readable([k.name for k in found]), strict=True):
        kernel.name = name
    return found


def test_registers_on_record(kernels):
    assert kernels and all(0 < k.registers <= 255 for k in kernels)
    lines = [f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}  kernel ({ARCH})"]
    for k in sorted(kernels, key=lambda k: (-k.registers, k.name)):
        lines.append(f"{k.registers:9} {k.shared:7} {k.stack:6} {k.spill_stores + k.spill_loads:7}  {k.name}")
    table = "\n".join(lines)
    (build.ROOT / "build" / "registers.txt").write_text(table + "\n")
    print("\n" + table)


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k.spill_stores or k.spill_loads]
    assert not spilling, "\n".join(map(str, spilling))


def test_local_memory_only_where_expected(kernels):
    def allowed(kernel: Kernel) -> int:
        return max((size for part, size in STACK_ALLOWED.items() if part in kernel.name), default=0)

    stacked = [k for k in kernels if k.stack > allowed(k)]
    assert not stacked, "\n".join(map(str, stacked))
