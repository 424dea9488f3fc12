"""Public docstrings: there is one for everything, and it opens with a verb or a noun phrase."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fomal

PACKAGE = Path(fomal.__file__).parent
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
OPENINGS = re.compile(r"(what|whether|how|which|why)\b", re.IGNORECASE)

REPEATS = {"overload", "setter"}


def decorators(node: Documented) -> set[str]:
    """The last names of a function's or class's decorators."""
    named = (getattr(d, "func", d) for d in node.decorator_list)
    return {getattr(d, "attr", getattr(d, "id", "")) for d in named}


def public(body: list[ast.stmt], within: str) -> Iterator[tuple[str, Documented]]:
    """Classes, functions and methods without an underscore, with where they are; not overloads and setters."""
    for node in body:
        if isinstance(node, Documented) and not node.name.startswith("_") and not REPEATS & decorators(node):
            yield f"{within}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{within}.{node.name}")


def test_every_public_docstring_opens_with_a_verb_or_a_noun() -> None:
    found = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        tree = ast.parse(path.read_text())
        for name, node in [(module, tree), *public(tree.body, module)]:
            text = ast.get_docstring(node)
            assert text, f"{name} has no docstring"
            assert not OPENINGS.match(text), f"{name} opens with {text.split()[0]}: {text.splitlines()[0]}"
            found += 1
    assert found > 900
