"""The contents of checkpoints and of adapted models: entries, kinds and format numbers, checked before use."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomal import __version__
from fomal.run.moved import current
from fomal.utils.output import shown

CHECKPOINT_FORMAT = 2
"""Of the entry "fomal" of checkpoints, and of each replica's part; those without a number have format 1.

Format 2 has a learner's settings in groups; those of format 1 are read, see `fomal.run.moved`."""

MODEL_FORMAT = 1
"""Of an adapted model's folder."""

_DEEPEST, _MOST = 40, 200_000  # levels and values of a configuration, which may refer to one list many times
_LONGEST = 60  # characters of a value that a message shows

Check = Callable[[Any, str], None]
"""Raises `Mismatch` unless a value, at an entry of this name, is as it should be."""


class Mismatch(ValueError):
    """An entry that is not as it should be; the text names it, its value, and what it should be."""


def check_checkpoint(content: Any, path: str | Path) -> None:
    """Check the entries of a checkpoint that fomal and Lightning read, and their kinds.

    Settings that had other names in earlier versions get those of today, in place (see `fomal.run.moved`).

    Those that belong to a network or an optimiser are compared with it when it is there, see `fomal.learner.restoring`.

    Args:
        content: of the file.
        path: of the file, for the message.

    Raises:
        ValueError: naming file, entry and remedy; also for a format that is newer than `CHECKPOINT_FORMAT`.
    """
    if not isinstance(content, dict) or "fomal" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of fomal: give one written by `fomal fit`, or by a trainer around fomal's "
            f"MetaLearner."
        )
    own = content["fomal"]
    try:
        for part in [own, *_replicas(own)]:
            _refuse_newer(part, CHECKPOINT_FORMAT, path)
            _rename(part)
        _CHECKPOINT(content, "")
        _check_steps(content)
    except Mismatch as error:
        raise ValueError(f"{path} is no whole checkpoint: {error}. Use another one, e.g. an earlier one.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no whole checkpoint: it is nested without end. Use another one.") from error


def check_model(about: Any, path: str | Path) -> None:
    """Check the content of an adapted model's `model.json`.

    Args:
        about: the content.
        path: of the file, for the message.

    Raises:
        ValueError: naming file, entry and remedy; also for a format that is newer than `MODEL_FORMAT`.
    """
    _refuse_newer(about, MODEL_FORMAT, path)
    try:
        _plain(about, "content")
        _MODEL(about, "")
        ((most, times),) = Counter(about["classes"]).most_common(1)
        if times > 1:
            raise Mismatch(f"its classes have {_said(most)} {times} times")
    except Mismatch as error:
        raise ValueError(f"{path} is no description of a model: {error}. Make it again by `fomal adapt`.") from error


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, whose: str, exact: bool = False
) -> None:
    """Compare names, shapes and kinds (floating point, complex, integer or bool) of tensors.

    Args:
        found: what a file has; of a tensor shape and dtype are looked at.
        expected: what there should be.
        what: the name of `found`, for the message.
        whose: to what `expected` belongs, likewise.
        exact: compare dtypes, too.

    Raises:
        Mismatch: naming the first entry that differs, and both shapes.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise Mismatch(f"{what} has no {_said(missing[0])}{_and_more(missing)}, which {whose} has")
    if extra:
        raise Mismatch(f"{what} has {_said(extra[0])}{_and_more(extra)}, which {whose} has not")
    for name, tensor in expected.items():
        other = found[name]
        same = other.dtype == tensor.dtype if exact else _family(other.dtype) == _family(tensor.dtype)
        if other.shape != tensor.shape or not same:
            raise Mismatch(f"{what} has {shown(name)} as {_said(other)}, but that of {whose} is {_said(tensor)}")


def _family(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _refuse_newer(part: Any, known: int, path: str | Path) -> None:
    number = part.get("format", 1) if isinstance(part, dict) else 1
    if type(number) is int and number > known:
        raise ValueError(
            f"{path} has format {_said(number)}, and this version of fomal, {__version__}, reads formats up to "
            f"{known}: install a newer fomal, or use a file that this one has written."
        )


def _rename(part: Any) -> None:
    """Give the configuration and the settings of an older checkpoint the names of today, in place."""
    config, settings = (part.get(name) if isinstance(part, dict) else None for name in ("config", "settings"))
    if isinstance(config, dict):
        part["config"] = current(config)
    if isinstance(settings, dict):
        part["settings"] = current({"model": settings})["model"]


def _replicas(own: Any) -> list[Any]:
    parts = own.get("replicas") if isinstance(own, dict) else None
    return parts if isinstance(parts, list) else []


def _check_steps(content: Mapping[str, Any]) -> None:
    """The meta-iterations that are read by us and by Lightning are the same."""
    progress = content.get("loops", {}).get("fit_loop", {}).get(_OPTIMIZER_STEPS)
    if progress is not None and progress["total"]["completed"] != content["global_step"]:
        done = progress["total"]["completed"]
        raise Mismatch(f"its global_step is {content['global_step']}, but its loops have done {done} optimiser steps")


# -- kinds of values


def _said(value: Any) -> str:
    """A value in a message, short."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**_LONGEST):
        text = shown(value if isinstance(value, str) else repr(value))
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    kinds = {dict: "a mapping", list: "a list", int: "a huge integer"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _refuse(value: Any, entry: str, wanted: str) -> None:
    shown_entry = shown(entry if len(entry) <= 2 * _LONGEST else f"{entry[: 2 * _LONGEST]}...")
    raise Mismatch(f"its {shown_entry or 'content'} is {_said(value)}, not {wanted}")


def _inside(entry: str, key: object) -> str:
    return f"{entry}.{key}" if entry else str(key)


def _integer(least: int, most: int = 2**63 - 1) -> Check:
    def check(value: Any, entry: str) -> None:
        if type(value) is not int or not least <= value <= most:
            _refuse(value, entry, f"an integer of at least {least}")

    return check


def _flag(value: Any, entry: str) -> None:
    if not isinstance(value, bool):
        _refuse(value, entry, "true or false")


def _text(value: Any, entry: str) -> None:
    if not isinstance(value, str) or not value:
        _refuse(value, entry, "a text")


def _finite(value: Any, entry: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(value, entry, "a finite number")


def _tensor(value: Any, entry: str) -> None:
    if not isinstance(value, Tensor):
        _refuse(value, entry, "a tensor")
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        raise Mismatch(f"its {shown(entry)} is sparse, quantised or without values, not a plain tensor")


def _optional(check: Check) -> Check:
    return lambda value, entry: None if value is None else check(value, entry)


def _list(check: Check, least: int = 0) -> Check:
    def check_list(value: Any, entry: str) -> None:
        if not isinstance(value, list | tuple):
            _refuse(value, entry, "a list")
        if len(value) < least:
            raise Mismatch(f"its {entry} has {len(value)} entries, not {least} at least")
        for place, item in enumerate(value):
            check(item, _inside(entry, place))

    return check_list


def _each(key: type, check: Check) -> Check:
    """A mapping of whatever keys, all of one kind."""

    def check_each(value: Any, entry: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, entry, "a mapping")
        for name, item in value.items():
            if type(name) is not key:
                _refuse(name, f"{entry or 'content'}'s key", "a text" if key is str else "an integer")
            check(item, _inside(entry, name))

    return check_each


def _anything(value: Any, entry: str) -> None:
    """What others read, and say the faults of."""


def _mapping(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping with some keys of known kinds, and any others."""
    optional = optional or {}

    def check_mapping(value: Any, entry: str) -> None:
        _each(str, _anything)(value, entry)
        for name in required:
            if name not in value:
                raise Mismatch(f"{f'its {entry}' if entry else 'it'} has no entry {name}")
        for name, check in {**required, **optional}.items():
            if name in value:
                check(value[name], _inside(entry, name))

    return check_mapping


def _plain(value: Any, entry: str) -> None:
    """A value as JSON has them, small enough to be walked through."""
    for count, (item, where, depth) in enumerate(_walk(value, entry, 0)):
        if count > _MOST or depth > _DEEPEST:
            raise Mismatch(f"its {entry} is nested without end")
        if item is not None and not isinstance(item, bool | int | float | str):
            _refuse(item, where, "a plain value (text, number, true, false, null, list or mapping)")


def _walk(value: Any, entry: str, depth: int) -> Iterator[tuple[Any, str, int]]:
    """All values inside a value, with their names and depths; of lists and mappings that they are there."""
    if depth > _DEEPEST or not isinstance(value, dict | list | tuple):
        yield (None if depth > _DEEPEST else value), entry, depth
        return
    yield None, entry, depth
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict) and not isinstance(key, str):
            _refuse(key, f"{entry}'s key", "a text")
        yield from _walk(item, _inside(entry, key), depth + 1)


def _version(value: Any, entry: str) -> None:
    if not isinstance(value, str) or not re.fullmatch(
        r"[2-9]\.\d{1,6}(\.\d{1,6})?((a|b|rc|\.dev|\.post)\d{1,9})?(\+\w+)?", value
    ):
        _refuse(value, entry, "a version of Lightning from 2.0 on")


# -- checkpoints

_OPTIMIZER_STEPS = "epoch_loop.manual_optimization.optim_step_progress"

_count = _integer(0)
_counts = _each(str, _count)
_class = _mapping({"class_path": _text}, {"init_args": _each(str, _anything)})


def _either(value: Any, entry: str) -> None:
    """An integer, or whether to draw one."""
    if type(value) not in (int, bool):
        _refuse(value, entry, "an integer, true or false")


_MODEL_CONFIG = _mapping(
    {"network": _class, "rule": _class, "inner_optimizer": _class},
    dict.fromkeys(("train", "eval", "outer", "execution"), _each(str, _anything)),
)
_CONFIG = _mapping(
    {"seed_everything": _either, "model": _MODEL_CONFIG, "data": _class}, {"trainer": _each(str, _anything)}
)


def _config(value: Any, entry: str) -> None:
    """The configuration of a run; that of one made in Python is empty."""
    _each(str, _anything)(value, entry)
    _plain(value, entry)
    if value:
        _CONFIG(value, entry)


_STEPS = {"steps": _integer(0), "batch_size": _integer(1), "replacement": _flag, "reduction": _text}
_SETTINGS = _mapping(
    {},
    {
        **dict.fromkeys(("loss", "query_loss"), _optional(_text)),
        "inner_state": _text,
        "adapt": _optional(_list(_text)),
        "train": _mapping({}, _STEPS),
        "eval": _mapping({}, _STEPS | {"report_steps": _optional(_list(_integer(0)))}),
        "outer": _mapping(
            {},
            {
                **dict.fromkeys(("clip_algorithm", "parameters", "on_nonfinite"), _text),
                "final": _finite,
                "clip_val": _optional(_finite),
            },
        ),
    },
)
"""Of a learner, in plain values."""

_LEARNER = _mapping(
    {
        "config": _config,
        "carried": _optional(_each(str, _each(str, _tensor))),
        "max_steps": _integer(-1),
    },
    {
        "format": _integer(1),
        "skipped_tasks": _count,
        "settings": _SETTINGS,
        "versions": _each(str, _anything),
        "commits": _each(str, _anything),
    },
)
"""What a learner adds to a checkpoint."""

_REPLICAS = _mapping(
    {"config": _config, "replicas": _list(_LEARNER, 2), "stopped": _each(int, _count)}, {"format": _integer(1)}
)


def _own(value: Any, entry: str) -> None:
    (_REPLICAS if isinstance(value, dict) and "replicas" in value else _LEARNER)(value, entry)


def _weights(value: Any, entry: str) -> None:
    """Tensors by their names; modules with state of other kinds keep it under a name of torch's."""
    _each(str, _anything)(value, entry)
    for name, item in value.items():
        if not name.endswith("_extra_state"):
            _tensor(item, _inside(entry, name))


_TRACKER = _mapping({"total": _counts, "current": _counts}, {"is_last_batch": _flag})


def _progress(value: Any, entry: str) -> None:
    """What Lightning counts: of a loop, or of several by their names."""
    _each(str, _anything)(value, entry)
    if not value or value.keys() & {"total", "current"}:
        _TRACKER(value, entry)
    else:
        _each(str, _progress)(value, entry)


def _loop(value: Any, entry: str) -> None:
    """The state of a loop and of those in it."""
    _each(str, _anything)(value, entry)
    for name, item in value.items():
        (_progress if name.endswith("progress") else _each(str, _anything))(item, _inside(entry, name))


def _fit_loop(value: Any, entry: str) -> None:
    _loop(value, entry)
    _mapping(
        {
            "epoch_progress": _TRACKER,
            "epoch_loop.batch_progress": _TRACKER,
            _OPTIMIZER_STEPS: _mapping({"total": _mapping({"completed": _count})}),
            "epoch_loop.state_dict": _mapping({"_batches_that_stepped": _count}),
        }
    )(value, entry)


_LOOPS = _mapping({"fit_loop": _fit_loop, "validate_loop": _loop, "test_loop": _loop, "predict_loop": _loop})

_OPTIMIZER = _mapping(
    {
        "state": _each(int, _each(str, _anything)),
        "param_groups": _list(_mapping({"params": _list(_count)}), 1),
    }
)

_CHECKPOINT = _mapping(
    {
        "fomal": _own,
        "state_dict": _weights,
        "global_step": _count,
        "epoch": _count,
        "pytorch-lightning_version": _version,
    },
    {
        "loops": _LOOPS,
        "optimizer_states": _list(_OPTIMIZER),
        "lr_schedulers": _list(_each(str, _anything)),
        "callbacks": _mapping({}, {"SaveLast": _mapping({"validation_due": _flag})}),
    },
)
"""A checkpoint of Lightning's; one of weights alone lacks what only a resumed run reads."""

# -- the folder of an adapted model

_IMAGE_FORMAT = _mapping(
    {"height": _integer(1, 2**20), "width": _integer(1, 2**20), "color": _text},
    {
        "fit": _text,
        "resample": _text,
        "background": _count,
        "max_pixels": _integer(1),
        "mean": _list(_finite, 1),
        "std": _list(_finite, 1),
    },
)

_MODEL = _mapping(
    {
        "format": _integer(1),
        "classes": _list(_text, 2),
        "ways": _integer(1),
        "image_format": _IMAGE_FORMAT,
        "network": _class,
    },
    {name: _each(str, _anything) for name in ("checkpoint", "adaptation", "versions")},
)
