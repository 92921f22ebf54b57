"""Every loss described once: tests, `check`, `bench`, modules and the README enumerate this.

A family's file here holds what tests and benchmarks draw for its losses, their cases, and what they are compared
with; the losses themselves know nothing of it.
"""

import importlib

from fastloss._registry.spec import (
    FAMILIES,
    Case,
    InputSampler,
    Loss,
    entries,
    estimators,
    losses,
    register,
    register_estimator,
)

for _family in FAMILIES:
    importlib.import_module(f"fastloss._registry.{_family}")

__all__ = [
    "FAMILIES",
    "Case",
    "InputSampler",
    "Loss",
    "entries",
    "estimators",
    "losses",
    "register",
    "register_estimator",
]
