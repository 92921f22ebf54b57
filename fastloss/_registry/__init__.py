"""The registry of losses, which tests, `check`, `bench` and the README enumerate.

A family's file here holds the inputs, cases and eager baselines of its losses; the losses themselves know nothing of
it.
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
