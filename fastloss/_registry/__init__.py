"""Every loss described once: tests, `check`, `bench`, modules and the README enumerate this."""

from fastloss._registry.spec import (
    Case,
    Draw,
    Loss,
    entries,
    estimators,
    losses,
    register,
    register_estimator,
)

__all__ = ["Case", "Draw", "Loss", "entries", "estimators", "losses", "register", "register_estimator"]
