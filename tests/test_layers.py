"""Imports point only up the list of layers."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fomal

PACKAGE = Path(fomal.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder or file may import those of the lines above, and a folder's files each other, without a circle. Names that
# stand on one line do not know each other.
LAYERS = [
    {""},  # the package itself, which imports what users ask it for
    {"utils"},
    {"loggers", "models", "tasks"},
    {"data", "engine"},
    {"inner"},
    {"outer"},
    {"evaluation"},
    {"run"},
    {"learner"},
    {"analysis", "plots"},
    {"adaptation"},
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
    """The modules of fomal that a file imports, anywhere in it; not those that the package's own file lends a name."""
    if path == PACKAGE / "__init__.py":
        return set()
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
    if name_of(path) not in ("utils.output", "utils.terminal"):
        assert not found & unsafe


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imports(path) for module, path in MODULES.items()}
    assert graph["learner.meta_learner"] >= {"outer.rule", "inner.loop", "utils.tree"}  # the scan finds something
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_root_has_few_files() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "CHANGELOG.md",
        "__init__.py",
        "__main__.py",
        "loggers.py",
        "py.typed",
    }


def test_public_names_are_found_before_they_are_imported() -> None:
    """By people and completion (`dir`), at use, and by type checkers, which read the imports of the package's file."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(typed) == sorted(fomal.__all__)
    assert set(fomal.__all__) <= set(dir(fomal))
    for name, module in typed.items():
        assert getattr(fomal, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="^module 'fomal' has no attribute 'Reptiles'$"):
        _ = fomal.Reptiles
