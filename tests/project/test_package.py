"""Names and documentation of every registered loss."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
from support import (
    every_loss,
)

import fastloss
import fastloss.functional
import fastloss.nn
from fastloss import reference


@every_loss
def test_public_names(loss):
    assert getattr(fastloss.functional, loss.name) is loss.function
    assert getattr(reference, loss.name) is loss.reference


@every_loss
def test_reference_has_the_same_signature(loss):
    ours, plain = (inspect.signature(f).parameters for f in (loss.function, loss.reference))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in plain.values()
    ]


@every_loss
def test_docstring(loss):
    text = inspect.getdoc(loss.function)
    assert text, f"{loss.name} has no docstring"
    for section in ("Args:", "Returns:", "Raises:", "shape"):
        assert section in text, f"docstring of {loss.name} lacks {section}"
    for name in inspect.signature(loss.function).parameters:
        assert re.search(rf"\b{name}\b", text), f"docstring of {loss.name} does not mention {name}"
    assert re.search(r"[=+∑Σ]|sum_|log", text), f"docstring of {loss.name} states no formula"
    assert re.search(r"torch\.|https?://|arXiv|et al", text), f"docstring of {loss.name} names no source"


@pytest.mark.parametrize("name", ["distributed", "recipes"])
def test_modules_on_demand(name):
    """They are there after `import fastloss`."""
    code = f"import fastloss; print(fastloss.{name}.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"fastloss.{name}"
    assert name in dir(fastloss)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        fastloss.no_such  # noqa: B018


def test_every_public_function_is_registered_and_documented():
    from fastloss._registry import estimators, losses

    registered = {loss.name for loss in losses()} | set(estimators)
    public = {n for n in vars(fastloss.functional) if not n.startswith("_")}
    assert registered <= public
    for name in public:
        assert inspect.getdoc(getattr(fastloss.functional, name)), f"{name} has no docstring"
    for module in (fastloss, fastloss.functional, fastloss.nn, fastloss.memory, reference):
        assert inspect.getdoc(module), f"{module.__name__} has no docstring"
    for name, function in inspect.getmembers(fastloss.memory, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == fastloss.memory.__name__:
            assert inspect.getdoc(function), f"fastloss.memory.{name} has no docstring"


@every_loss
def test_traffic_counts_bytes(loss):
    """Fewest bytes moved: grows with the element size, and with the backward."""
    forward, both = (loss.traffic(loss.bench_shape, 4, backward) for backward in (False, True))
    assert 0 < loss.traffic(loss.bench_shape, 2, False) < forward < both
