"""What the user gave: the settings of config files and command line, before defaults and links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from fomal.cli.configs import find_config, is_text
from fomal.cli.errors import UsageError


def short_key(key: str) -> str:
    """An option's name without the segments that may be left out: `data.init_args.ways` is `data.ways`."""
    return ".".join(part for part in key.rstrip("+").split(".") if part not in ("init_args", "dict_kwargs"))


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


class Given:
    """Settings by short key, e.g. `{"model.inner_steps": 5, "data.class_path": ...}`; the last of a key counts.

    Args:
        args: command line after the verb, `--config` as paths.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.values: dict[str, Any] = {}
        self.has_config = False
        for _, name, value in options(args):
            if name == "config" and value is not None:
                self.has_config = True
                self._add_config(value)
            elif value is not None:
                self._add(short_key(name), _loaded(value), Path())

    def _add_config(self, config: str) -> None:
        path = Path(config)
        is_file = not is_text(config) and path.is_file()
        try:
            content = yaml.safe_load(path.read_text() if is_file else config)
        except yaml.YAMLError as error:
            raise UsageError(f"--config {config} is not valid YAML: {error}") from error
        if isinstance(content, dict):
            self._add("", content, path.parent if is_file else Path())

    def _add(self, key: str, value: Any, folder: Path) -> None:
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) and (folder / value).is_file():
            folder = (folder / value).parent
            value = _loaded((folder / Path(value).name).read_text())
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

    def _choose_class(self, key: str, name: Any) -> None:
        """Another class than before makes the settings of the earlier one void."""
        before = self.values.get(f"{key}.class_path", self.values.get(key))
        if before is not None and str(before).split(".")[-1] != str(name).split(".")[-1]:
            self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{key}.")}


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser says what is wrong with it
