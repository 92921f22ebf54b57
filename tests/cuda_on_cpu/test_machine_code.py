"""What reads machine code sees what is there (known.cu); products are rounded where they must be (contraction.cu)."""

from __future__ import annotations

import struct

import pytest

from . import build, loops, nvcc, sass

MULTIPLY_ADD = ("FFMA", "DFMA")


@pytest.fixture(scope="module")
def kernels() -> dict[str, tuple[nvcc.Kernel, list[loops.Instruction]]]:
    compiler = nvcc.find_nvcc()
    if not compiler:
        pytest.skip("there is no nvcc: nothing compiles the kernels for a GPU here")
    found = [
        k for file in ("known", "contraction") for k in nvcc.kernels_in(build.HERE / f"{file}.cu", compiler)
    ]
    code = sass.disassemble([k.code for k in found])
    return {k.name.split(": ")[1]: (k, c) for k, c in zip(found, code, strict=True)}


def hot(kernel: nvcc.Kernel, code: list[loops.Instruction]) -> loops.Hot:
    tables = list(struct.unpack(f"<{len(kernel.tables) // 4}I", kernel.tables))
    return loops.hot(code, tables, loops.Elements(4))


def test_loads_of_a_loop_are_counted(kernels):
    found = hot(*kernels["four_loads"])
    assert (found.load, found.store, found.flight, found.read, found.calls) == (16, 16, 4, 0, 0)
    assert (
        2 < found.write < 4
    )  # of 16 elements: 4 loads, 4 stores, 8 of arithmetic, the address and the branch
    assert kernels["four_loads"][0].threads == 256


def test_a_load_that_needs_the_last_one_is_alone(kernels):
    found = hot(*kernels["one_load"])
    assert (found.load, found.store, found.flight, found.write) == (4, 0, 1, 0)
    assert 3 <= found.read <= 8


def test_what_is_rare_does_not_count(kernels):
    rare, always = hot(*kernels["rare"]), hot(*kernels["calls"])
    assert rare.calls == 0 and rare.write < 25
    assert always.calls == 1
    assert len(kernels["rare"][1]) > 150  # the division is there


def test_jump_by_a_table():
    """Blocks 0x10 (which loads the table's entry), 0x40 and 0x50 (its targets) and 0x60 (which goes back)."""
    code = [
        loops.Instruction(0x00, "MOV", "R1,R0"),
        loops.Instruction(0x10, "LDG.E.128", "R4,desc[UR4][R2.64]"),
        loops.Instruction(0x20, "LDC", "R8,c[0x2][R9+0x8]"),
        loops.Instruction(0x30, "BRX", "R8,-0x40"),
        loops.Instruction(0x40, "BRA", "0x60"),
        loops.Instruction(0x50, "FADD", "R4,R4,R4"),
        loops.Instruction(0x60, "BRA", "0x10", "@P0"),
        loops.Instruction(0x70, "EXIT"),
    ]
    _, after = loops.flow(code, [0x70, 0x70, 0x40, 0x50])
    assert after == {
        0x00: [0x10],
        0x10: [0x40, 0x50],
        0x40: [0x60],
        0x50: [0x60],
        0x60: [0x10, 0x70],
        0x70: [],
    }
    assert loops.find_loops(loops.in_order(after), after) == {0x10: {0x10, 0x40, 0x50, 0x60}}
    assert loops.hot(code, [0x70, 0x70, 0x40, 0x50], loops.Elements(4)).read == 1.2  # 5 of 4


@pytest.mark.parametrize("name", ["spill", "local_array"])
def test_local_memory_is_seen(kernels, name):
    kernel, _ = kernels[name]
    assert kernel.stack and sass.opcodes(kernel.code) >= set(sass.LOCAL)
    assert bool(kernel.spill_stores and kernel.spill_loads) == (name == "spill")


def test_float_atomics_are_seen(kernels):
    for name, (kernel, code) in kernels.items():
        seen = sass.opcodes(kernel.code) & set(sass.FLOAT_ATOMICS)
        assert bool(seen) == (name.startswith("atomic") and name != "atomic_integer"), name
        assert bool(name.startswith("atomic")) == any(
            i.name in ("RED", "REDG", "ATOM", "ATOMG", "ATOMS") for i in code
        )


def test_resident_blocks():
    def blocks(registers: int, threads: int, shared: int = 0) -> int:
        return nvcc.Kernel("", registers=registers, threads=threads, shared=shared).blocks

    assert blocks(80, 128) == 6 and blocks(81, 128) == 5  # registers come 8 at a time
    assert blocks(64, 1024) == 1 and blocks(65, 1024) == 0 and blocks(32, 1024) == 2
    assert blocks(16, 32) == 32  # as many as there may be
    assert blocks(32, 128, 48 << 10) == 4  # 1 KB of each is the driver's


@pytest.mark.parametrize("dtype", ["float", "double"])
def test_products_are_rounded(kernels, dtype):
    def contracted(name: str) -> bool:
        return any(i.name in MULTIPLY_ADD for i in kernels[name][1])

    assert contracted(f"plain<{dtype}>")
    expressions = [
        name for name in kernels if "<" in name and f"<{dtype}" in name and not name.startswith("plain")
    ]
    assert len(expressions) == {"float": 12, "double": 10}[dtype]  # a double's exponential has multiply-adds
    assert not [name for name in expressions if contracted(name)]
    assert all(any(i.name in ("FMUL", "DMUL") for i in kernels[name][1]) for name in expressions)
