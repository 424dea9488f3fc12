"""Experiment files: which runs an experiment consists of."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fomal.cli.configs import config_names, configs_dir
from fomal.cli.errors import UsageError, did_you_mean
from fomal.cli.given import safe_load
from fomal.utils.files import check_path

_KEYS = {"title", "base", "settings", "methods", "sweeps"}
_POINT_KEYS = {"at", "settings", "methods"}


@dataclass(frozen=True)
class PlannedRun:
    """A run of an experiment.

    Attributes:
        name: its folder within the experiment's, without the seed.
        settings: what it sets over the base config.
    """

    name: str
    settings: dict[str, Any]

    def folder(self, out: Path, seed: int) -> Path:
        """Where the run with a seed is."""
        return out / self.name / f"seed_{seed}"

    def overrides(self, out: Path, seed: int) -> dict[str, Any]:
        """The settings with seed and folder."""
        logger = {"save_dir": str(out), "name": self.name, "version": f"seed_{seed}"}
        return merged(self.settings, {"seed_everything": seed, "trainer": {"logger": {"init_args": logger}}})


@dataclass(frozen=True)
class Point:
    """A result of an experiment: a method, and in a sweep the panel and the value of its setting.

    Attributes:
        name: the folder its run would have if no other point had the same settings.
        method: label of the method.
        run: the run it shares with the points of the same settings.
        panel: name of the setting that is swept; empty without a sweep.
        at: the setting's value.
    """

    name: str
    method: str
    run: PlannedRun
    panel: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """The runs and figures that an experiment file describes.

    Attributes:
        name: of the file.
        title: of its figure.
        base: the config that every run starts from, a name or a file.
        points: its results; points of the same settings share a run.
    """

    name: str
    title: str
    base: str
    points: list[Point]

    @property
    def runs(self) -> list[PlannedRun]:
        """The runs, each once."""
        return self.runs_named("")

    def runs_named(self, text: str) -> list[PlannedRun]:
        """The runs of the points whose folder's name, or method, contains a text."""
        points = [point for point in self.points if text in point.name or text in point.method]
        return list({point.run.name: point.run for point in points}.values())


def experiment_names() -> list[str]:
    """Names of the shipped experiments."""
    return sorted(path.stem for path in (configs_dir() / "experiments").glob("*.yaml"))


def read_experiment(name: str) -> Experiment:
    """Read an experiment by the name of a shipped one, or from a file.

    Raises:
        UsageError: there is no such file, or something in it cannot be meant.
    """
    check_path("NAME_OR_FILE", name)
    path = Path(name)
    if not path.is_file():
        short = name.removeprefix("configs/").removeprefix("experiments/").removesuffix(".yaml")
        if short not in experiment_names():
            hint = did_you_mean(short, experiment_names()) or f"; the shipped ones are {', '.join(experiment_names())}"
            raise UsageError(f"{name}: there is no such file and no experiment of that name{hint}")
        path = configs_dir() / "experiments" / f"{short}.yaml"
    try:
        content = safe_load(path.read_text(), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    _check_keys(path, "the file", content, _KEYS, {"title", "base", "methods"})
    base = str(content["base"])
    if not Path(base).is_file() and base not in config_names():
        hint = did_you_mean(base, config_names()) or f"; the shipped ones are in {configs_dir()}"
        raise UsageError(f"{path}: base {base} is neither a file nor a shipped config{hint}")
    return Experiment(path.stem, str(content["title"]), base, _points(path, content))


def _points(path: Path, content: Mapping[str, Any]) -> list[Point]:
    common = _mapping(path, "settings", content.get("settings"))
    methods = {str(m): _mapping(path, f"method {m!r}", part) for m, part in _methods(path, content).items()}
    sweeps = _mapping(path, "sweeps", content.get("sweeps"))
    points: list[Point] = []
    planned: dict[str, PlannedRun] = {}

    def add(name: str, method: str, *parts: Mapping[str, Any], **place: Any) -> None:
        settings = functools.reduce(merged, parts, common)
        if settings.get("replicas") is not None:
            raise UsageError(f"{path}: {name!r} sets replicas, but an experiment runs its seeds by itself: --seeds.")
        run = planned.setdefault(json.dumps(settings, sort_keys=True), PlannedRun(name, settings))
        points.append(Point(name, method, run, **place))

    if not sweeps:
        for method, own in methods.items():
            add(slug(method), method, own)
    for panel, values in sweeps.items():
        for point in _checked_points(path, panel, values, methods):
            over, at = point.get("settings") or {}, point["at"]
            for method, own in methods.items():
                name = f"{slug(panel)}/{slug(str(at))}/{slug(method)}"
                add(name, method, own, over, (point.get("methods") or {}).get(method) or {}, panel=panel, at=float(at))
    names = [run.name for run in planned.values()]
    for name in names:
        if names.count(name) > 1 or not all(name.split("/")):
            raise UsageError(f"{path}: {name!r} is no folder of one run alone: choose names that differ in letters.")
    return points


def _methods(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    methods = _mapping(path, "methods", content["methods"])
    if not methods:
        raise UsageError(f"{path}: methods is empty: give at least one, as `label: settings`.")
    return methods


def _checked_points(path: Path, panel: str, values: Any, methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of a sweep; raise UsageError for what cannot be meant."""
    if not isinstance(values, list) or not values:
        raise UsageError(f"{path}: the sweep {panel!r} must be a list of points, as `- {{at: 5, settings: ...}}`.")
    for point in values:
        _check_keys(path, f"a point of {panel!r}", point, _POINT_KEYS, {"at"})
        if isinstance(point["at"], bool) or not isinstance(point["at"], int | float):
            raise UsageError(f"{path}: {panel!r} has a point at {point['at']!r}: give a number, its place on the axis.")
        where = f"{panel!r} at {point['at']}"
        _mapping(path, f"settings of {where}", point.get("settings"))
        for method, settings in _mapping(path, f"methods of {where}", point.get("methods")).items():
            if method not in methods:
                hint = did_you_mean(str(method), methods) or f"; the methods are {', '.join(methods)}"
                raise UsageError(f"{path}: {where} names {method!r}, which is no method{hint}")
            _mapping(path, f"{method!r} of {where}", settings)
    return values


def _mapping(path: Path, what: str, content: Any) -> dict[str, Any]:
    """The mapping, empty for nothing; raise UsageError for anything else."""
    if content is not None and not isinstance(content, dict):
        raise UsageError(f"{path}: {what} is {content!r}: it must be a mapping of settings.")
    return content or {}


def _check_keys(path: Path, what: str, content: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(content, dict):
        raise UsageError(f"{path}: {what} must be a mapping with {', '.join(sorted(known))}.")
    for key in content:
        if key not in known:
            raise UsageError(f"{path}: {what} has the unknown key {key!r}{did_you_mean(str(key), known)}")
    if missing := sorted(needed - content.keys()):
        raise UsageError(f"{path}: {what} lacks {', '.join(missing)}.")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in their place, mapping by mapping."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        before = result.get(key)
        both = isinstance(before, dict) and isinstance(value, Mapping)
        result[key] = merged(before, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return result


def slug(text: str) -> str:
    """A folder's name for a label: "(g1 + g2) / 2" is "g1_plus_g2_over_2"."""
    words = text.lower().replace("+", "plus").replace("/", "over")
    return re.sub(r"[^a-z0-9.]+", "_", words).strip("_")
