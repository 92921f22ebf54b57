"""Machine code as instructions, and the figures of hot loops, kept in build/nvcc from one run to the next."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from . import loops, nvcc

BYTES = {"double": 8, "float": 4, "__half": 2, "__nv_bfloat16": 2}
BATCH = 2 << 20  # bytes of code for one process: so that all processors are busy
# Of an instruction's 16 bytes the lowest 9 bits say which it is.
LOCAL = {0x183: "LDL", 0x187: "STL"}
FLOAT_ATOMICS = {
    0x1A2: "ATOM",
    0x1A3: "ATOMG",
    0x1A6: "REDG",
    0x18B: "ATOM.CAS",
    0x18D: "ATOMS.CAS",
    0x1A9: "ATOMG.CAS",
}


def opcodes(code: bytes) -> set[int]:
    return set((np.frombuffer(code, "<u8")[::2] & 0x1FF).tolist())


def disassemble(codes: Sequence[bytes]) -> Iterator[list[loops.Instruction]]:
    """The instructions of each piece of code, which begins at address 0."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [nvcc.tool("nvdisasm"), "--binary", nvcc.ARCH.upper().replace("_", ""), "-json", file.name]
        out = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    lines = [line for function in out[1] for line in function["sass-instructions"]]
    assert len(lines) * 16 == sum(map(len, codes))
    begin = 0
    for code in codes:
        here = lines[begin : begin + len(code) // 16]
        # a branch names the address in the whole file
        yield [
            loops.Instruction(16 * k, i["opcode"], i.get("operands", ""), i.get("predicate", ""))
            for k, i in enumerate(moved(here, 16 * begin))
        ]
        begin += len(code) // 16


def moved(lines: list[dict[str, str]], by: int) -> Iterator[dict[str, str]]:
    for line in lines:
        if by and line["opcode"].split(".")[0] == "BRA":
            head, _, target = line["operands"].rpartition(",")
            line["operands"] = f"{head}{',' if head else ''}{int(target, 16) - by:#x}"
        yield line


def element_size(name: str) -> int:
    """Of the first dtype among a kernel's own template arguments."""
    plain = re.sub(r"^[^<]*<", "", name)
    while (inner := re.sub(r"[\w:]+<[^<>]*>", "", plain)) != plain:
        plain = inner
    return next((BYTES[word] for word in re.findall(r"\w+", plain) if word in BYTES), 4)


Work = tuple[bytes, bytes, loops.Elements]  # code, tables of indirect branches, and how to count


def key_of(work: Work, version: bytes) -> str:
    return hashlib.sha256(b"".join((version, work[0], work[1], str(work[2]).encode()))).hexdigest()


def measure(batch: list[Work]) -> list[loops.Hot]:
    found = []
    for (_, tables, count), code in zip(batch, disassemble([w[0] for w in batch]), strict=True):
        found.append(loops.hot(code, list(struct.unpack(f"<{len(tables) // 4}I", tables)), count))
    return found


def hot_loops(work: Sequence[Work]) -> list[loops.Hot]:
    """Figures of hot loops; only code that is new is disassembled."""
    version = Path(loops.__file__).read_bytes()
    keys = [key_of(w, version) for w in work]
    file = nvcc.OUT / "hot_loops.json"
    with nvcc.one_at_a_time():
        known = json.loads(file.read_text()) if file.exists() else {}
        missing = {key: w for key, w in zip(keys, work, strict=True) if key not in known}
        batches: list[list[str]] = [[]]
        for key in sorted(missing, key=lambda key: -len(missing[key][0])):
            if sum(len(missing[k][0]) for k in batches[-1]) > BATCH:
                batches.append([])
            batches[-1].append(key)
        if missing:
            with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                results = pool.map(measure, ([missing[k] for k in batch] for batch in batches))
                for batch, found in zip(batches, results, strict=True):
                    known |= {k: dataclasses.astuple(h) for k, h in zip(batch, found, strict=True)}
            kept = {key: known[key] for key in keys} if len(known) > 4 * len(keys) else known
            file.write_text(json.dumps(kept))
        return [loops.Hot(*known[key]) for key in keys]
