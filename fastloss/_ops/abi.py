"""Load the compiled library and read the names and constants that C++ and Python must agree on.

What an operator takes by position, Python passes by name: a loss's hyperparameters (`hparams(...).pack(gamma=2.0)`),
the values of an enum (`enum("Ranking")["bradley_terry"]`). The names are defined once, in C++; see
csrc/drivers/names.h.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def _load(path: Path) -> dict[str, Any]:
    """Load the operators; return the library's description of itself."""
    if not path.exists():
        raise ImportError(
            "fastloss is not built: run `pip install --no-build-isolation .` in its checkout (`make build` there)"
        )
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.fastloss_describe.restype = ctypes.c_char_p
    return json.loads(library.fastloss_describe())


def _check_environment(capabilities: list[str]) -> None:
    requested = os.environ.get("FASTLOSS_CPU_CAPABILITY")
    if requested and requested.lower() not in capabilities:
        raise RuntimeError(
            f"FASTLOSS_CPU_CAPABILITY: expected one of {', '.join(capabilities)}, got {requested!r}"
        )


_description = _load(Path(__file__).parents[1] / "_library.so")
_check_environment(_description["cpu_capabilities"])


def enum(name: str) -> dict[str, int]:
    """Return the values of a C++ enum by name, in their order."""
    return {value: i for i, value in enumerate(_description["enums"][name])}


def constant(name: str) -> int:
    """Return a constant of C++."""
    return _description["constants"][name]


def fact(operator: str, name: str) -> Any:
    """Return a property of an operator: `"inputs"`, `"wrt"`, `"saved"` or `"outputs"`."""
    return _description["operators"][operator][name]


class Hparams:
    """The hyperparameters of an operator, which takes them as a list of numbers.

    Attributes:
        names: in the order of the list.
        choices: the values of those that are one of several, by name.
        pack: takes all of them by keyword and returns the list. A name that is missing or unknown is a TypeError.
    """

    def __init__(self, owner: str, names: Sequence[str], choices: Mapping[str, Sequence[str]] | None = None):
        self.names = tuple(names)
        self.choices = {name: tuple(values) for name, values in (choices or {}).items()}
        self.pack: Callable[..., list[float]] = self._packer(owner)

    def _packer(self, owner: str) -> Callable[..., list[float]]:
        # a function with these keywords: looking them up in a dictionary takes five times as long
        places = {f"places_of_{k}": {v: float(i) for i, v in enumerate(vs)} for k, vs in self.choices.items()}
        arguments = f"*, {', '.join(self.names)}" if self.names else ""
        values = ", ".join(f"places_of_{k}[{k}]" if k in self.choices else k for k in self.names)
        make = eval(f"lambda {', '.join(places)}: lambda {arguments}: [{values}]")
        packer = make(**places)
        packer.__name__ = packer.__qualname__ = f"{owner}.hparams"
        return packer

    def unpack(self, hparams: Sequence[float]) -> dict[str, Any]:
        """Return the hyperparameters by name, and of those in `choices` the value's name."""
        found: dict[str, Any] = dict(zip(self.names, hparams, strict=True))
        for name, values in self.choices.items():
            found[name] = values[int(found[name])]
        return found

    def check_taken_by(self, function: Callable[..., Any], after: int | None = None) -> None:
        """Raise a TypeError unless `function` takes them by name: exactly these, after `after` others."""
        taken = list(inspect.signature(function).parameters)
        missing: Iterable[str] = set(self.names) - set(taken)
        if after is not None:
            missing = set(self.names) ^ set(taken[after:])
        if missing:
            raise TypeError(f"{function.__qualname__}: hyperparameters {self.names} do not fit {taken}")


def hparams(operator: str) -> Hparams:
    """Return the hyperparameters of an operator of the library."""
    return Hparams(operator, fact(operator, "hparams"), fact(operator, "choices"))
