"""The settings that `--ckpt_path` brings along, and what may not differ from it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fomal.cli.errors import UsageError
from fomal.cli.given import same_value, short_key
from fomal.learner.build import read_checkpoint, sections
from fomal.run.checkpoints import LAST, PREVIOUS, find
from fomal.run.trust import Trust
from fomal.utils.output import say, tell

KEYWORDS = ("last", "best", "hpc", "registry")  # Lightning's names for a checkpoint it finds itself

# Settings that may differ from the checkpoint's: they change neither the weights nor which classes are tested.
FREE_TO_RESUME = {"data.root", "data.cache_dir", "data.num_workers", "data.download", "model.metrics"}
FREE_TO_EVALUATE = ("model.eval.", "model.execution.", "model.metrics")
# Data settings that may not, beside the data's own `partition_settings`: the head has so many ways. Other data may be
# tested on, which is what their class says.
FIXED_DATA = {"ways"}
SIZES = {"in_channels", "image_size", "in_features", "out_features"}  # of the network, which follow from the data


def is_keyword(ckpt_path: str) -> bool:
    """Tell whether Lightning itself finds the checkpoint meant by `ckpt_path`, e.g. `last`."""
    return ckpt_path.split(":")[0] in KEYWORDS and not Path(ckpt_path).is_file()


def in_folder(folder: str) -> Path:
    """The checkpoint meant by a folder; raise UsageError where there is none. Says which it is."""
    try:
        found, problems = find(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--ckpt_path {error}") from error
    for problem in problems:
        say(f"{problem}: using the one before.")
    say(f"the checkpoint is {found}.")
    return found


def checkpoint_config(ckpt_path: str, verb: str, trust: Trust) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of a checkpoint's configuration that `verb` takes over, empty for a run made in Python; and its content.

    Resuming takes all of it, but for folders to write into, unless the checkpoint lies there; the other verbs take of
    the trainer only the precision.

    Raises:
        UsageError: the checkpoint cannot be read, or names what is not trusted.
    """
    try:
        checkpoint = read_checkpoint(ckpt_path)
    except (OSError, ValueError) as error:
        before = Path(ckpt_path).with_name(PREVIOUS)
        hint = f"; the one before is {before}" if Path(ckpt_path).name == LAST and before.is_file() else ""
        raise UsageError(f"--ckpt_path {error}{hint}") from error
    config = checkpoint["fomal"]["config"]
    if not config:
        return {}, checkpoint
    try:
        own = sections(config, ckpt_path) | {key: config[key] for key in ("trainer", "replicas") if key in config}
        own = trust.check(own, ckpt_path)
        _check_replicas(own.get("replicas"), checkpoint["fomal"].get("replicas"), ckpt_path)
    except ValueError as error:
        raise UsageError(f"--ckpt_path {error}") from error
    trainer = own.pop("trainer", {})
    if verb == "fit":
        own["trainer"] = without_places(trainer, Path(ckpt_path).resolve())
    else:
        own["trainer"] = {"precision": trainer.get("precision")}
    return own, checkpoint


def _check_replicas(wanted: Any, there: Any, ckpt_path: str) -> None:
    """Raise ValueError where the configuration makes another number of replicas than the checkpoint has."""
    number, found = (len(part) if isinstance(part, list) else part for part in (wanted, there))
    if (number or None) != found:
        raise ValueError(f"{ckpt_path}: its configuration has replicas={number}, but it has {found or 'none'}.")


def without_places(trainer: Mapping[str, Any], ckpt_path: Path) -> dict[str, Any]:
    """A trainer's settings without the folders that they would write into, unless the checkpoint lies there.

    A file must not choose where on this machine is written; a run of one's own goes on in its folder.
    """
    kept, left = dict(trainer), []
    if kept.get("default_root_dir") is not None and not _is(kept["default_root_dir"], ckpt_path.parents[1]):
        left.append(f"default_root_dir={kept.pop('default_root_dir')}")
    for key in ("logger", "callbacks"):
        value = kept.get(key)
        parts = value if isinstance(value, list) else [value]
        settings = [part["init_args"] for part in parts if isinstance(part, dict) and part.get("init_args")]
        for own in settings:
            left += _leave_log(own, ckpt_path) if key == "logger" else _leave_files(own, ckpt_path)
    if left:
        tell(f"{ckpt_path} is not in the folders it names, and does not write there: {', '.join(left)}.")
    return kept


def _leave_log(settings: dict[str, Any], ckpt_path: Path) -> list[str]:
    """See `without_places`: the folder of a logger."""
    runs = Path(str(settings.get("save_dir")), str(settings.get("name") or ""))
    if str(settings.get("version")) not in (ckpt_path.parents[1].name, "None"):
        settings.pop("version")
    if any(_is(runs, folder) for folder in ckpt_path.parents[:4]):  # of replicas, the run lies one folder deeper
        return []
    settings |= {"save_dir": "runs", "name": ""}
    settings.pop("sub_dir", None)
    return [f"logger.save_dir={runs}"]


def _leave_files(settings: dict[str, Any], ckpt_path: Path) -> list[str]:
    """See `without_places`: the files of a callback."""
    left = []
    if settings.get("dirpath") is not None and not _is(settings["dirpath"], ckpt_path.parent):
        left.append(f"dirpath={settings.pop('dirpath')}")
    name = Path(str(settings.get("filename")))
    if name.is_absolute() or {"..", "~"} & set(name.parts):
        left.append(f"filename={settings.pop('filename')}")
    return left


def _is(folder: Any, other: Path) -> bool:
    return Path(str(folder)).resolve() == other


def refuse_differences(checkpoint: Mapping[str, Any], asked: Mapping[str, Any], verb: str) -> None:
    """Raise UsageError where the run asked for contradicts the checkpoint's, naming each setting and both values.

    Args:
        checkpoint: the configuration the checkpoint alone gives.
        asked: the configuration with what the user gave beside it.
        verb: the verb.
    """
    partition = set(imported(checkpoint["data"]["class_path"]).partition_settings)
    wrong = [
        f"{key} is {_text(before)} in the checkpoint, but {_text(now)} {_came(key)}"
        for key, before, now in differences(checkpoint, asked)
        if not _is_free(key, verb, FIXED_DATA | partition)
    ]
    if wrong:
        remedy = "leave it out" if len(wrong) == 1 else "leave them out"
        remedy += ", or start a new run without --ckpt_path." if verb == "fit" else "."
        raise UsageError(f"{'; '.join(wrong)}: {remedy}")


def differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Short keys at which two configurations differ, with both values; another class hides its arguments."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if not _same_class(a.get("class_path"), b.get("class_path")):
            yield f"{key}.class_path", a.get("class_path"), b.get("class_path")
            ways = [part.get("init_args", {}).get("ways") for part in (a, b)]
            if ways[0] != ways[1]:  # other data may be tested on, by a head of as many classes
                yield f"{key}.ways", *ways
            return
        for name in sorted({*a, *b} - {"class_path"}):
            yield from differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif not same_value(a, b):
        yield short_key(key), a, b


def _same_class(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and imported(a) is imported(b))


def imported(path: str) -> Any:
    """The class at a path that the parser has imported before."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _is_free(key: str, verb: str, fixed_data: set[str]) -> bool:
    if key in ("seed_everything", "replicas") or key.startswith("replicas."):
        return False
    section, _, name = key.partition(".")
    if section not in ("model", "data"):
        return True
    if verb == "fit":
        return key in FREE_TO_RESUME
    return key.startswith(FREE_TO_EVALUATE) or (section == "data" and name.split(".")[0] not in fixed_data)


def _came(key: str) -> str:
    return "follows from the data given" if key.split(".")[-1] in SIZES and "network." in key else "was given"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "null" if value is None else str(value)
