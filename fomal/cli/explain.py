"""One line for what jsonargparse says in many, with the nearest names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fomal.cli.errors import UsageError, did_you_mean
from fomal.cli.given import short_key

_BASES = ("torch.nn.Module", "torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler", "typing.Union")


def explain(message: str, parser: ArgumentParser) -> str:
    """The message of a parsing error as one line.

    Args:
        message: jsonargparse's text.
        parser: the verb's parser; knows the options there are.
    """
    text = " ".join(message.split())
    for attempt in (_empty, _unknown_option, _unknown_parameter, _unknown_class, _wrong_value):
        if line := attempt(text, parser):
            return line
    text = re.sub(
        r"(arguments are required: .*)", lambda m: re.sub(r"\b(fit|validate|test|predict|analyze)\.", "", m[1]), text
    )
    return re.sub(r'Parser key "([^"]+)":', r"\1:", text)


@contextmanager
def what_was_raised() -> Iterator[None]:
    """Let through what a constructor raised, not jsonargparse's account of all that it tried."""
    try:
        yield
    except ValueError as error:
        root: BaseException = error
        while str(root).startswith("Does not validate against any of the Union") and root.__cause__:
            root = root.__cause__
        raise root from None


def refuse_bases(config: Any, key: str = "") -> None:
    """Raise UsageError for a part of a configuration that names only the kind of what is wanted, as `{}` comes out.

    Args:
        config: parsed settings, or a part of them.
        key: of the part.
    """
    parts = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(parts, Mapping):
        return
    for name, value in parts.items():
        if name == "class_path" and value in _BASES:
            raise UsageError(
                f"{key}={{}} names no class: write {{class_path: PATH, init_args: {{...}}}}, or leave it out."
            )
        refuse_bases(value, short_key(f"{key}.{name}" if key else str(name)))


def _empty(text: str, parser: ArgumentParser) -> str | None:
    """A value that is empty, or a class that is not named by a text."""
    key = _key(text)
    if not key:
        return None
    if re.search(r"(Got value:|Given value:|Expected a dot import path string:)( -.*)?$", text):
        return f"{key}='' is empty: give a value, or leave it out."
    found = re.search(r"argument of type '(\w+)' is not iterable|Subclass types expect one of", text)
    return f"{key} must name a class: write it as {{class_path: PATH, init_args: {{...}}}}." if found else None


def _unknown_option(text: str, parser: ArgumentParser) -> str | None:
    found = re.search(r"unrecognized arguments: (\S+)", text)
    dashes = "--" if found else ""
    found = found or re.search(r"does not accept option '([^']+)'", text)
    if not found:
        return None
    name = found[1].partition("=")[0]
    if dashes and not name.startswith("--"):
        return f"{name!r} is not an option; settings are given as --KEY VALUE."
    known = {
        option.lstrip("-")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not option.endswith(".help")
    }
    return f"there is no option {name}{did_you_mean(short_key(name.lstrip('-')), known, dashes)}"


def _unknown_parameter(text: str, parser: ArgumentParser) -> str | None:
    found = re.search(r"Option '([^']+)' is not accepted", text)
    if not found:
        return None
    before, after = text[: found.start()], text[found.end() :]
    classes = re.findall(r"class_path '([^']+)':", before) or re.findall(r"class_path='([^']+)'", after)
    if not classes:
        return None
    key, name, path = _key(before), short_key(found[1]), classes[-1]
    return f"there is no option {key}.{name} of {path}{did_you_mean(name, _parameters(path))}"


def _unknown_class(text: str, parser: ArgumentParser) -> str | None:
    found = re.search(
        r"Multiple subclasses with name (\S+)\. Give the full class path to avoid ambiguity: ([^-]+)\.", text
    )
    if found:
        return f"{_key(text[: found.start()])}={found[1]} is ambiguous: use {' or '.join(found[2].split(', '))}."
    found = re.search(r"Expected a dot import path string: (?!- )(\S+)", text)
    found = found or re.search(
        r"class_path '([^']+)': (?:(?:\S+ )?module '?\S+'? has no attribute|No module named|Import of)", text
    )
    if not found:
        return None
    key, name = _key(text[: found.start()]), found[1]
    return f"{key}={name}: there is no such class{did_you_mean(name, _classes(key, parser))}"


def _wrong_value(text: str, parser: ArgumentParser) -> str | None:
    found = re.search(r"Expected an? (.+?)\. Got value: (.*?)(?= - Expected| Given value type|$)", text)
    if found:
        return f"{_key(text[: found.start()])}={found[2]}: expected {_type(found[1])}."
    found = re.search(r"Subtypes: \[(.*?)\] Errors: .* Given value: (.*)$", text)
    if not found:
        return None
    line, torchs = f"{_key(text[: found.start()])}={found[2]}: ", re.search(r"torch\.nn\.(\w+Loss)\b", found[2])
    if torchs and re.search(r"\bLoss\b", _type(found[1])):
        return f"{line}a loss of torch's is written {_as_ours(torchs[1])}."
    return f"{line}expected one of {_type(found[1])}."


def _as_ours(torchs: str) -> str:
    if torchs == "CrossEntropyLoss":
        return "fomal.inner.CrossEntropy"
    return f"{{class_path: fomal.inner.Elementwise, init_args: {{loss: torch.nn.{torchs}}}}}"


def _key(text: str) -> str:
    """The setting a message is about: keys named one after the other lie within each other."""
    return short_key(".".join(re.findall(r'Parser key "([^"]+)"', text)))


def _type(text: str) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(
        r"(?:typing\.)?Callable\[\[[^]]*\], (?:typing\.Union\[)?(?:\w+\.)*(\w+)[^]]*\]+", r"a class of \1", text
    )
    return re.sub(r"(?:typing\.)?Literal\[([^]]*)\]", r"one of \1", text)


def _parameters(path: str) -> list[str]:
    """The parameters of a class, those behind **kwargs included."""
    try:
        module, _, name = path.rpartition(".")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(getattr(importlib.import_module(module), name), "it", fail_untyped=False)
    except (ImportError, AttributeError, ValueError):
        return []
    return [action.dest.removeprefix("it.") for action in parser._actions if action.dest.startswith("it.")]


def _classes(key: str, parser: ArgumentParser) -> list[str]:
    """Paths of the classes an option takes, as far as they are imported."""
    try:
        from jsonargparse._typehints import get_all_subclass_paths
    except ImportError:  # not part of the public interface
        return []
    types = [getattr(action, "_typehint", None) for action in parser._actions if action.dest == key]
    return [path for kind in types if kind is not None for path in get_all_subclass_paths(kind)]
