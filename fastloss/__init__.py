"""Fused loss functions for PyTorch: drop-in, accurate, deterministic, one read of the input."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fastloss import functional, memory, nn, reference
from fastloss._ops import autograd, derivatives
from fastloss.profiler import profile

if TYPE_CHECKING:
    from fastloss import distributed as distributed
    from fastloss import recipes as recipes

__all__ = ["functional", "memory", "nn", "profile", "reference"]
__version__ = "0.1.0"
_ON_DEMAND = ("distributed", "recipes")

if not TYPE_CHECKING:  # to a type checker any name would be there

    def __getattr__(name: str) -> ModuleType:
        """Import a module of the package at its first use."""
        if name in _ON_DEMAND:
            return importlib.import_module(f"fastloss.{name}")
        raise AttributeError(f"module 'fastloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


derivatives.refuse_others(autograd.LIBRARY)
