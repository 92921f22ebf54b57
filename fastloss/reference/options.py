"""What every reference asks of an option that is one of several names."""

from __future__ import annotations

from collections.abc import Iterable


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Return the value if it is one of the choices, else raise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value
