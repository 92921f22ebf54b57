"""Rules of includes and imports, and of the length of files. As a script: the import graph in figures."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from fastloss import reference
from fastloss._registry import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastloss"
MAY_IMPORT = {
    "reference": {"reference"},
    "_ops": {"_ops", "memory"},
    "losses": {"losses", "_ops", "reference"},
    "distributed": {"distributed", "losses", "_ops", "reference"},
    "nn": {"nn", "functional", "distributed", "_ops"},
    "_registry": {"_registry", "losses", "_ops", "reference"},
}
LONGEST = 400
LONGER = {
    "csrc/losses/aggregation.h": "five aggregations that share their search and their statistics",
    "fastloss/_ops/autograd.py": "the only autograd, read from top to bottom",
    "fastloss/_ops/similarity.py": "one operator: inputs, passes over blocks, its two differentiable functions",
    "fastloss/losses/dpo.py": "losses, most of it docstrings",
    "fastloss/losses/elementwise.py": "losses, most of it docstrings",
    "fastloss/losses/metric_learning.py": "losses, most of it docstrings",
    "fastloss/losses/number_token.py": "losses, most of it docstrings",
    "fastloss/losses/token_statistics.py": "functions, most of it docstrings",
}
INCLUDE = re.compile(r'#include [<"]([^>"]+)[>"]')


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by module name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return for every module of the package the modules that it imports, except for type checking.

    A package's `__init__` counts only if something other than a module is imported from it.
    """
    names = modules(package)
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            wanted = []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inside = [
                    f"{node.module}.{alias.name}" for alias in node.names if alias.name != "_C"
                ]  # compiled
                wanted = [full if full in names else node.module for full in inside]
            elif isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            graph[name] |= {w for w in wanted if w in names and w != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other, directly or indirectly."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reached = {name: reach(name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        if name in reached[name]:
            circle = {other for other in reached[name] if name in reached[other]}
            if circle not in found:
                found.append(circle)
    return found


def longest_chain(graph: dict[str, set[str]]) -> int:
    """Return the number of modules on the longest path of imports; a circle counts as one."""
    group = {name: frozenset(circle) for circle in circles(graph) for name in circle}
    known: dict[str, int] = {}

    def below(name: str) -> int:
        if name not in known:
            known[name] = 0
            members = group.get(name, frozenset({name}))
            others = {o for m in members for o in graph[m]} - members
            known[name] = 1 + max((below(o) for o in others), default=0)
        return known[name]

    return max(below(name) for name in graph)


def sources(*folders: str) -> list[Path]:
    return [
        p
        for f in folders
        for p in (ROOT / "csrc" / f).rglob("*.*")
        if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]


def test_no_import_circle():
    assert circles(import_graph(PACKAGE)) == []


def test_torch_headers_are_for_operators_alone():
    for path in sources("math", "drivers", "losses", "cpu", "cuda"):
        for name in INCLUDE.findall(path.read_text()):
            assert not name.startswith(("torch/", "ATen/", "c10/")), f"{path}: {name}"


def test_losses_include_maths_and_drivers():
    allowed = {ROOT / "csrc" / folder for folder in ("math", "drivers", "losses")}
    for path in sources("losses"):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert (path.parent / name).resolve().parent in allowed, f"{path}: {name}"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_what_lies_below(folder):
    for name, wanted in import_graph(PACKAGE).items():
        if name.startswith(f"fastloss.{folder}"):
            assert {w.split(".")[1] for w in wanted} <= MAY_IMPORT[folder], f"{name}: {wanted}"


def test_product_takes_whole_functions_from_the_reference():
    """No table, no helper: a mistake in one would be on both sides of every comparison."""
    families = [importlib.import_module(f"fastloss.reference.{family}") for family in FAMILIES]
    for folder in ("losses", "distributed", "_ops"):
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith("fastloss.reference"), path
                if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("reference."):
                    value = reference
                    for name in ast.unparse(node).split(".")[1:]:
                        value = getattr(value, name)
                    assert inspect.isfunction(value) or value in families, f"{path}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["losses", "reference", "_registry"])
def test_every_family_has_its_file(folder):
    assert set(FAMILIES) <= {path.stem for path in (PACKAGE / folder).glob("*.py")}


def test_files_are_short():
    files = [*sources("."), *(p for f in ("fastloss", "tests") for p in (ROOT / f).rglob("*.py"))]
    long = {str(p.relative_to(ROOT)) for p in files if p.read_text().count("\n") > LONGEST}
    assert long - set(LONGER) == set(), f"over {LONGEST} lines: split it, or enter it in LONGER with a reason"
    assert set(LONGER) - long == set(), "not as long any more"


if __name__ == "__main__":
    import sys

    package = Path(sys.argv[1] if len(sys.argv) > 1 else PACKAGE)
    graph = import_graph(package)
    print(
        f"{len(graph)} files, {sum(map(len, graph.values()))} imports, longest chain {longest_chain(graph)}"
    )
    for circle in circles(graph):
        print(f"circle of {len(circle)}: {', '.join(sorted(circle))}")
