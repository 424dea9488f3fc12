"""What `--ckpt_path` brings along, and what may not differ from it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fomal.build import read_checkpoint
from fomal.checkpoints import LAST, PREVIOUS
from fomal.cli.errors import UsageError
from fomal.cli.given import short_key

KEYWORDS = ("last", "best", "hpc", "registry")  # Lightning's names for a checkpoint it finds itself

# Settings that may differ from the checkpoint's: they change neither the weights nor which classes are tested.
FREE_TO_RESUME = {
    *("data.root", "data.cache_dir", "data.num_workers", "data.download"),
    "model.meta_iterations_per_step",
}
FREE_TO_EVALUATE = {"model.eval_inner_steps", "model.eval_inner_batch_size", "model.vectorize"}
# Data settings that may not, beside the data's own `partition_settings`: the head has so many ways. Other data may be
# tested on, which is what their class says.
FIXED_DATA = {"ways"}


def is_keyword(ckpt_path: str) -> bool:
    """Whether Lightning itself finds the checkpoint meant by `ckpt_path`, e.g. `last`."""
    return ckpt_path.split(":")[0] in KEYWORDS and not Path(ckpt_path).is_file()


def checkpoint_config(ckpt_path: str, verb: str) -> dict[str, Any]:
    """The part of a checkpoint's configuration that `verb` takes over; empty for a run made in Python.

    Resuming takes all of it; the other verbs take of the trainer only the precision.
    """
    try:
        checkpoint = read_checkpoint(ckpt_path)
    except (FileNotFoundError, ValueError) as error:
        before = Path(ckpt_path).with_name(PREVIOUS)
        hint = f"; the one before is {before}" if Path(ckpt_path).name == LAST and before.is_file() else ""
        raise UsageError(f"--ckpt_path {error}{hint}") from error
    config = dict(checkpoint["fomal"]["config"])
    if config and verb != "fit":
        precision = config.pop("trainer", {}).get("precision")
        config["trainer"] = {"precision": precision}
    return config


def refuse_differences(checkpoint: Mapping[str, Any], asked: Mapping[str, Any], verb: str) -> None:
    """Raise UsageError where the run asked for contradicts the checkpoint's, naming each setting and both values.

    Args:
        checkpoint: the configuration the checkpoint alone gives.
        asked: the configuration with what the user gave beside it.
        verb: the verb.
    """
    partition = set(_imported(checkpoint["data"]["class_path"]).partition_settings)
    wrong = [
        f"{key} is {_text(before)} in the checkpoint, but {_text(now)} was given"
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
    elif a != b:
        yield short_key(key), a, b


def _same_class(a: str | None, b: str | None) -> bool:
    return a == b or (a is not None and b is not None and _imported(a) is _imported(b))


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)  # the parser has imported it before


def _is_free(key: str, verb: str, fixed_data: set[str]) -> bool:
    if key in ("seed_everything", "replicas") or key.startswith("replicas."):
        return False
    section, _, name = key.partition(".")
    if section not in ("model", "data"):
        return True
    if verb == "fit":
        return key in FREE_TO_RESUME
    return key in FREE_TO_EVALUATE or (section == "data" and name.split(".")[0] not in fixed_data)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "null" if value is None else str(value)
