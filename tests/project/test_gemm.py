"""The CPU's matrix multiplication on its own, compiled for each instruction set that this machine runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fastloss import _C

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION_SETS = {"sse2": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
INSTRUCTION_SETS["amx"] = "x86-64-v4 -mamx-tile -mamx-bf16 -mavx512bf16"
SETS = list(INSTRUCTION_SETS)


@pytest.mark.parametrize("isa", SETS[: SETS.index(_C.linear_capability()) + 1])
def test_products_are_right(isa, tmp_path):
    """Panels from any strides and type, every size of edge, added to what is there or not."""
    program = tmp_path / "gemm"
    compiler = os.environ.get("CXX", "g++").split()
    flags = f"-O2 -std=c++20 -w -I{ROOT / 'csrc'} -march={INSTRUCTION_SETS[isa]} -DFL_ISA={isa}".split()
    subprocess.run([*compiler, *flags, Path(__file__).with_name("gemm.cpp"), "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
