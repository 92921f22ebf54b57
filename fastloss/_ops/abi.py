"""The compiled library: loads it, and asks it for the names and numbers that C++ and Python must agree on."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch


def _load(path: Path) -> dict[str, Any]:
    """Load the operators; return what the library says of itself."""
    if not path.exists():
        raise ImportError(
            "fastloss is not built: run `pip install --no-build-isolation .` in its checkout (`make build` there)"
        )
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.fastloss_describe.restype = ctypes.c_char_p
    return json.loads(library.fastloss_describe())


def _check_environment(capabilities: list[str]) -> None:
    wish = os.environ.get("FASTLOSS_CPU_CAPABILITY")
    if wish and wish not in capabilities:
        raise RuntimeError(
            f"FASTLOSS_CPU_CAPABILITY: expected one of {', '.join(capabilities)}, got {wish!r}"
        )


_description = _load(Path(__file__).parents[1] / "_library.so")
_check_environment(_description["cpu_capabilities"])
