"""What nvcc made of every kernel for sm_90: its own account (`ptxas -v`), the machine code, the resident blocks.

The package's build is taken if it is up to date, else a file is compiled here. Needs nothing but nvcc, ninja and
NVIDIA's cuobjdump, which unpacks the machine code of an object file, compressed or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import io
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import build

ARCH = "sm_90"
OUT = build.ROOT / "build" / "nvcc"
SOURCES = sorted((build.CSRC / "cuda").rglob("*.cu"))
FLAGS = f"-O3 -std=c++20 -Xptxas -v -arch={ARCH} -cubin"

# A multiprocessor of sm_90; registers are divided among its four parts, each with its own scheduler.
PARTS, REGISTERS_OF_PART, WARPS, BLOCKS, SHARED = 4, 16384, 64, 32, 228 << 10
SHARED_OF_EVERY_BLOCK = 1 << 10  # for the driver

FUNCTION = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
MAX_THREADS = 5  # an attribute of a kernel in its section .nv.info, from __launch_bounds__


@dataclass
class Kernel:
    symbol: str
    name: str = ""  # file and readable name
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int = 0
    shared: int = 0  # static
    threads: int = 0  # of a block, at most
    code: bytes = field(default=b"", repr=False)
    tables: bytes = field(default=b"", repr=False)  # of indirect branches

    @property
    def blocks(self) -> int:
        """Resident on a multiprocessor, as far as registers and static shared memory allow."""
        warps = -(-self.threads // 32)
        of_part = REGISTERS_OF_PART // (-(-self.registers // 8) * 8 * 32)
        by_shared = SHARED // (self.shared + SHARED_OF_EVERY_BLOCK)
        return min(PARTS * of_part // warps, WARPS // warps, BLOCKS, by_shared)

    @property
    def warps(self) -> int:
        return self.blocks * -(-self.threads // 32)


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def release(nvcc: str) -> str:
    return re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the package of extra `test`, else of a toolkit."""
    try:
        for path in importlib.metadata.files(f"nvidia-cuda-{name}") or ():
            if path.name == name:
                return str(path.locate())
    except importlib.metadata.PackageNotFoundError:
        pass
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    assert found, f"there is nvcc but no {name}: pip install nvidia-cuda-{name}"
    return found


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """For what two workers of pytest would do twice, in the same files."""
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiled(source: Path, nvcc: str) -> tuple[str, Path]:
    """What `ptxas -v` says of one file, and its object file or cubin; here it is compiled if it has changed."""
    from ninja import BIN_DIR
    from ninja.ninja_syntax import Writer

    read = [p for folder in ("math", "drivers", "losses", "cuda") for p in (build.CSRC / folder).rglob("*.*")]
    newest = max(p.stat().st_mtime for p in read)
    for built in (build.ROOT / "build").glob(f"*/cuda_{source.stem}.o"):
        log = built.with_name(f"{built.name}.log")
        if built.stat().st_mtime > newest and log.exists() and f"for '{ARCH}'" in log.read_text():
            return log.read_text(), built

    text, out = io.StringIO(), f"{source.stem}.cubin"
    n = Writer(text, width=110)
    n.rule(
        "nvcc",
        f"{nvcc} -MMD -MF $out.d {FLAGS} -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)",
        depfile="$out.d",
        deps="gcc",
    )
    n.build(out, "nvcc", str(source))
    file = OUT / f"{source.stem}.ninja"
    with one_at_a_time():
        file.write_text(text.getvalue())
        made = subprocess.run(
            [str(Path(BIN_DIR, "ninja")), "-f", file.name], cwd=OUT, capture_output=True, text=True
        )
    assert made.returncode == 0, made.stdout
    return (OUT / f"{out}.log").read_text(), OUT / out


def image_of(path: Path) -> bytes:
    """The cubin for ARCH: the file itself, or what an object file contains."""
    if path.suffix == ".cubin":
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", f".{ARCH}.", str(path)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        images = [p.read_bytes() for p in Path(folder).iterdir()]
    assert len(images) <= 1, f"{path}: {len(images)} images for {ARCH}"
    return images[0] if images else b""


def sections(image: bytes) -> dict[str, bytes]:
    """The sections of an ELF file by name."""
    if not image:
        return {}
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]

    def content(header: tuple[int, ...]) -> bytes:
        nothing = header[1] == 8  # SHT_NOBITS
        return b"" if nothing else image[header[4] : header[4] + header[5]]

    strings = content(headers[names])
    return {strings[h[0] : strings.index(b"\0", h[0])].decode(): content(h) for h in headers}


def max_threads(info: bytes) -> int:
    at = 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if kind == 4:  # followed by as many bytes; the other kinds have their value here
            if attribute == MAX_THREADS:
                x, y, z = struct.unpack_from("<III", info, at)
                return x * y * z
            at += size
    return 0


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
    return [drop.sub("", name).replace("> >", ">>").replace("> >", ">>") for name in out]


def kernels_in(source: Path, nvcc: str) -> list[Kernel]:
    log, path = compiled(source, nvcc)
    kernels, parts = list(kernels_of(log)), sections(image_of(path))
    for kernel, name in zip(kernels, readable([k.symbol for k in kernels]), strict=True):
        kernel.name = f"{source.stem}: {name}"
        kernel.code = parts[f".text.{kernel.symbol}"]
        kernel.tables = parts.get(f".nv.constant2.{kernel.symbol}", b"")
        kernel.threads = max_threads(parts[f".nv.info.{kernel.symbol}"])
    return kernels
