"""Imports point only up the list of layers."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fomal

PACKAGE = Path(fomal.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import those of the lines above; a folder stands for all its files, which may import each other.
LAYERS = [
    {""},  # the package itself, which imports nothing
    {"moved", "output"},
    {"checks", "files", "fingerprint", "random", "schema", "signals", "terminal", "tree", "trust", "versions", "watch"},
    {"checkpoints", "distributed", "loggers"},
    {"metrics", "pytree"},
    {"data", "models"},
    {"inner"},
    {"memory", "outer"},
    {"evaluation", "meta_iteration", "preflight", "restoring"},
    {"captured"},
    {"analysis"},
    {"learner"},
    {"replicas"},
    {"build"},
    {"adaptation"},
    {"plots"},
    {"callbacks"},
    {"cli"},
    {"__main__"},
]


def name_of(path: Path) -> str:
    """The name of a module within the package, e.g. "data.episode"; that of a folder for its `__init__.py`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in FILES}


def layer(module: str) -> int:
    """The place of a module in the list."""
    (place,) = (i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)
    return place


def imports(path: Path) -> set[str]:
    """The modules of fomal that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "fomal":
                found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found


def test_every_module_has_its_place() -> None:
    assert {module.split(".")[0] for module in MODULES} == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(set().union(*LAYERS))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up(module: str) -> None:
    for imported in imports(MODULES[module]):
        assert imported in MODULES
        inside = imported.split(".")[0] == module.split(".")[0]
        assert inside or layer(imported) < layer(module), f"fomal.{module} imports fomal.{imported}, not above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_from_outside_reach_people_through_one_place(path: Path) -> None:
    """Lightning's messages and rich's console would let control characters and markup of names through."""
    found = {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    unsafe = {("lightning.pytorch.utilities", f"rank_zero_{kind}") for kind in ("info", "warn")}
    unsafe |= {("rich.console", "Console"), ("rich", "print")}
    if name_of(path) not in ("output", "terminal"):
        assert not found & unsafe


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imports(path) for module, path in MODULES.items()}
    assert graph["learner"] >= {"outer.rule", "inner.rollout", "tree"}  # the scan finds something
    TopologicalSorter(graph).prepare()  # raises CycleError
