"""The machine code of every kernel for sm_90: no spills, no local memory, no float atomics; and the budgets.

The table of all kernels goes to the test log (`pytest -s` or `-rP`) and to build/registers.txt.
"""

from __future__ import annotations

import pytest

from . import budgets, build, nvcc, sass

# Kernels that index a local array by a variable: a part of their name, and the bytes of stack they may use.
STACK_ALLOWED: dict[str, int] = {}


def some_nvcc() -> str:
    found = nvcc.find_nvcc()
    if not found:
        pytest.skip("there is no nvcc: nothing compiles the kernels for a GPU here")
    return found


@pytest.fixture(scope="module")
def kernels() -> list[nvcc.Kernel]:
    compiler = some_nvcc()
    assert nvcc.SOURCES
    return [k for source in nvcc.SOURCES for k in nvcc.kernels_in(source, compiler)]


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k.spill_stores or k.spill_loads]
    assert not spilling, "\n".join(map(str, spilling))


def test_local_memory_only_where_expected(kernels):
    def allowed(kernel: nvcc.Kernel) -> int:
        return max((size for part, size in STACK_ALLOWED.items() if part in kernel.name), default=0)

    stacked = [
        k
        for k in kernels
        if k.stack > allowed(k) or (not allowed(k) and sass.opcodes(k.code) & set(sass.LOCAL))
    ]
    assert not stacked, "\n".join(map(str, stacked))


def test_no_float_atomics(kernels):
    found = {k.name: sass.opcodes(k.code) & set(sass.FLOAT_ATOMICS) for k in kernels}
    assert not any(found.values()), "\n".join(
        f"{name}: {', '.join(sass.FLOAT_ATOMICS[o] for o in codes)}" for name, codes in found.items() if codes
    )


def test_enough_warps_are_resident(kernels):
    few = [f"{k.warps} warps: {k}" for k in kernels if k.warps < budgets.warps_of(k.name)]
    assert not few, "\n".join(few)


def test_budgets(kernels):
    """Registers, resident blocks, loads and stores, and instructions an element of the kernels that matter."""
    release, limits = budgets.read()
    now = budgets.measured([k for k in kernels if budgets.family_of(k.name)])
    table = budgets.full_table(kernels, now)
    (build.ROOT / "build" / "registers.txt").write_text(table)
    print("\n" + table)
    mine = nvcc.release(some_nvcc())
    if mine != release:
        pytest.skip(f"the budgets are those of nvcc {release}; {mine} makes other code")
    wrong = [
        f"{name}: {what}" for name in limits if name in now for what in limits[name].exceeded_by(now[name])
    ]
    wrong += [f"{name}: has no budget" for name in now.keys() - limits.keys()]
    wrong += [f"{name}: is no more" for name in limits.keys() - now.keys()]
    assert not wrong, "\n".join(
        [
            *sorted(wrong),
            "If it is meant: python -m tests.cuda_on_cpu.budgets --write, and look at the difference.",
        ]
    )


def test_budgets_can_be_exceeded():
    """A number that is worse by more than the slack is found, one that is better is not."""
    limit = budgets.Budget(64, 4, 32, 16, 16, 4, 10.0, 20.0, 0)
    changed = {"registers": (70, 40), "blocks": (3, 5), "load": (8, 32), "store": (2, 32), "flight": (3, 8)}
    changed |= {"read": (10.6, 5.0), "write": (21.1, 5.0), "calls": (1, 0)}
    for column, (worse, better) in changed.items():
        for value, wrong in ((worse, 1), (better, 0)):
            now = budgets.Budget(**{**vars(limit), column: value})
            assert len(list(limit.exceeded_by(now))) == wrong, (column, value)
    assert list(limit.exceeded_by(budgets.Budget(**{**vars(limit), "read": 0.0})))  # the loop was not found
