"""Which folder of the package may import which, and what the product may take from the reference."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import fastloss
from fastloss import reference
from fastloss._registry import FAMILIES

PACKAGE = Path(fastloss.__file__).parent
MAY_IMPORT = {
    "reference": {"reference"},
    "_ops": {"_ops", "memory"},
    "losses": {"losses", "_ops", "reference"},
    "distributed": {"distributed", "losses", "_ops", "reference"},
    "_registry": {"_registry", "losses", "_ops", "reference"},
}


def imported(path: Path) -> set[str]:
    """Names of the package's folders and files that a file imports, but for types alone."""
    found = set()
    tree = ast.parse(path.read_text())
    of_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in of_types for node in ast.walk(block)}
    for node in (n for n in ast.walk(tree) if id(n) not in skipped):
        if isinstance(node, ast.ImportFrom) and node.module == "fastloss":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastloss."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastloss.")}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_what_lies_below(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        assert imported(path) <= MAY_IMPORT[folder], path


def test_product_takes_whole_functions_from_the_reference():
    """No table, no helper: a mistake in one would be on both sides of every comparison."""
    for folder in ("losses", "distributed", "_ops"):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith("fastloss.reference"), path
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("reference."):
                    value = reference
                    for name in ast.unparse(node).split(".")[1:]:
                        value = getattr(value, name)
                    assert inspect.isfunction(value) or value in map(
                        importlib.import_module, (f"fastloss.reference.{f}" for f in FAMILIES)
                    ), f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["losses", "reference", "_registry"])
def test_every_family_has_its_file(folder):
    assert set(FAMILIES) <= {path.stem for path in (PACKAGE / folder).glob("*.py")}
