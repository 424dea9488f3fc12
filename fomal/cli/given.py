"""The settings that the user gave: those of config files and command line, before defaults and links."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fomal.cli.configs import find_config, is_text
from fomal.cli.errors import UsageError

TRUST_HELP = (
    "a class path, or a package, that a file of somebody else's may use beside fomal's and torch's; may be given again"
)

LARGEST_SEED = 2**32 - 1
"""The largest `seed_everything` that numpy takes."""

_MOST = 100_000  # values of a configuration


def short_key(key: str) -> str:
    """An option's name without the segments that may be left out: `data.init_args.ways` is `data.ways`."""
    return ".".join(part for part in key.rstrip("+").split(".") if part not in ("init_args", "dict_kwargs"))


def same_value(a: Any, b: Any) -> bool:
    """Tell whether two settings are equal; NaN, which equals nothing, is here itself."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return bool(a == b or (a != a and b != b))


def options(args: Sequence[str]) -> Iterator[tuple[int, str, str | None]]:
    """The options among `args`: position, name without dashes, and value where there is one."""
    for i, arg in enumerate(args):
        if arg == "-c" or (arg.startswith("--") and len(arg) > 2):
            name, equals, value = arg.partition("=")
            name = "config" if name == "-c" else name[2:]
            following = args[i + 1] if i + 1 < len(args) else None
            if equals:
                yield i, name, value
            else:
                yield i, name, None if following is None or following.startswith("--") else following


def with_config_paths(args: Sequence[str]) -> list[str]:
    """The same arguments with every `--config NAME` made a path."""
    resolved = list(args)
    for i, name, value in options(args):
        if name == "config" and value is not None:
            path = find_config(value)
            if "=" in args[i]:
                resolved[i] = f"--config={path}"
            else:
                resolved[i + 1] = path
    return resolved


def take_trust(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--trust NAME`, which may be given several times, and these names."""
    rest, names = list(args), []
    for i, name, value in reversed(list(options(args))):
        if name == "trust":
            if not value:
                raise UsageError("--trust needs a name: write e.g. --trust mypackage.nets.Net.")
            names.append(value)
            del rest[i : i + (1 if "=" in args[i] else 2)]
    return rest, names[::-1]


def with_files_read(args: Sequence[str]) -> list[str]:
    """The same arguments with the text of a config file for a part, `--data FILE.yaml`, in its place."""
    read = list(args)
    for i, name, value in options(args):
        if name not in ("config", "ckpt_path") and value is not None and _is_part(Path(value)):
            text = Path(value).read_text()
            if "=" in args[i]:
                read[i] = f"--{name}={text}"
            else:
                read[i + 1] = text
    return read


def strings(value: Any) -> Iterator[str]:
    """All texts in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def is_import_path(text: str) -> bool:
    """Tell whether `text` may be the path of a class."""
    first, *rest = text.split(".")
    return bool(rest) and all(part.isidentifier() for part in (first, *rest))


def _is_part(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml", ".json") and path.is_file()


class Given:
    """Settings by short key, e.g. `{"model.train.steps": 5, "data.class_path": ...}`; the last of a key counts.

    Args:
        args: command line after the verb, `--config` as paths.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.values: dict[str, Any] = {}
        self.has_config = False
        self._places: dict[str, int] = {}
        self._place = 1  # odd between two configs
        for _, name, value in options(args):
            if name == "config" and value is not None:
                self.has_config = True
                self._place += 1
                self._add_config(value)
                self._place += 1
            elif value is not None:
                self._add(short_key(name), loaded(value, f"--{name}"), Path())

    def _add_config(self, config: str) -> None:
        path = Path(config)
        is_file = not is_text(config) and path.is_file()
        name = config if is_file else f"{' '.join(config.split())[:40]} ..."
        try:
            content = safe_load(path.read_text() if is_file else config, f"--config {name}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {config} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise UsageError(
                f"--config {config} has no settings: give a file of `key: value`, e.g. one that was saved."
            )
        self._add("", content, path.parent if is_file else Path())

    def _add(self, key: str, value: Any, folder: Path) -> None:
        if isinstance(value, str) and _is_part(folder / value):
            path = folder / value
            folder, value = path.parent, loaded(path.read_text(), str(path))
        if isinstance(value, dict):
            if "class_path" in value:
                self._choose_class(key, value["class_path"])
            for name, part in value.items():
                self._add(short_key(f"{key}.{name}" if key else str(name)), part, folder)
            return
        if key.endswith(".class_path"):
            self._choose_class(key.removesuffix(".class_path"), value)
        elif isinstance(value, str):
            self._choose_class(key, value)
        self.values[key] = value
        self._places[key] = self._place

    def place(self, key: str) -> int:
        """Where a setting was given last: greater after a further config; options between two configs are together."""
        return self._places.get(key, 0)

    def _choose_class(self, key: str, name: Any) -> None:
        """Another class than before makes the settings of the earlier one void."""
        before = self.values.get(f"{key}.class_path", self.values.get(key))
        if before is not None and str(before).split(".")[-1] != str(name).split(".")[-1]:
            self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{key}.")}


def safe_load(text: str, source: str) -> Any:
    """The content of a YAML text.

    Args:
        text: YAML.
        source: where it is from, for messages.

    Raises:
        UsageError: it is nested too deeply, or its aliases stand for themselves or for more values than any
            configuration has.
        yaml.YAMLError: it is not valid.
    """
    sizes: dict[int, int] = {}  # of each node; an alias is the node it stands for

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = _MOST + 1  # while it is within itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            sizes[id(node)] = 1 + sum(sum(map(size, part)) if isinstance(part, tuple) else size(part) for part in parts)
        return sizes[id(node)]

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and size(root) > _MOST:
            raise UsageError(f"{source} has YAML with aliases for over {_MOST} values: write fewer.")
        return yaml.safe_load(text)
    except RecursionError as error:
        raise UsageError(f"{source} is nested too deeply for a configuration: write fewer brackets.") from error


def loaded(value: Any, source: str) -> Any:
    """A value as YAML has it; a text that is none stays, since the parser says what is wrong with it."""
    if not isinstance(value, str):
        return value
    try:
        return safe_load(value, source)
    except yaml.YAMLError:
        return value
