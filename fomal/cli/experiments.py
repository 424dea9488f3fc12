"""Experiment files: which runs an experiment consists of."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fomal.cli.configs import config_names, configs_dir
from fomal.cli.errors import UsageError, did_you_mean

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
    """A result of an experiment: a method, and in a sweep the panel and the value of its setting."""

    method: str
    run: PlannedRun
    panel: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """What an experiment file describes.

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
        return list({point.run.name: point.run for point in self.points}.values())


def experiment_names() -> list[str]:
    """Names of the shipped experiments."""
    return sorted(path.stem for path in (configs_dir() / "experiments").glob("*.yaml"))


def read_experiment(name: str) -> Experiment:
    """Read an experiment by the name of a shipped one, or from a file.

    Raises:
        UsageError: there is no such file, or something in it cannot be meant.
    """
    path = Path(name)
    if not path.is_file():
        short = name.removeprefix("configs/").removeprefix("experiments/").removesuffix(".yaml")
        if short not in experiment_names():
            hint = did_you_mean(short, experiment_names()) or f"; the shipped ones are {', '.join(experiment_names())}"
            raise UsageError(f"{name}: there is no such file and no experiment of that name{hint}")
        path = configs_dir() / "experiments" / f"{short}.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    _check_keys(path, "the file", content, _KEYS, {"title", "base", "methods"})
    if not Path(content["base"]).is_file() and content["base"] not in config_names():
        hint = did_you_mean(content["base"], config_names())
        raise UsageError(f"{path}: base {content['base']} is neither a file nor a shipped config{hint}")
    return Experiment(path.stem, content["title"], content["base"], _points(path, content))


def _points(path: Path, content: Mapping[str, Any]) -> list[Point]:
    common, methods = content.get("settings") or {}, content["methods"]
    points: list[Point] = []
    planned: dict[str, PlannedRun] = {}

    def add(name: str, settings: dict[str, Any], method: str, panel: str = "", at: float = 0.0) -> None:
        run = planned.setdefault(json.dumps(settings, sort_keys=True), PlannedRun(name, settings))
        points.append(Point(method, run, panel, at))

    if not content.get("sweeps"):
        for method, settings in methods.items():
            add(slug(method), merged(common, settings or {}), method)
    for panel, values in (content.get("sweeps") or {}).items():
        for point in values:
            _check_keys(path, f"a point of {panel!r}", point, _POINT_KEYS, {"at"})
            own = point.get("methods") or {}
            if strangers := sorted(set(own) - set(methods)):
                raise UsageError(f"{path}: {panel!r} at {point['at']} names {strangers[0]!r}, which is no method.")
            for method, settings in methods.items():
                parts = (settings or {}, point.get("settings") or {}, own.get(method) or {})
                combined = common
                for part in parts:
                    combined = merged(combined, part)
                add(
                    f"{slug(panel)}/{slug(str(point['at']))}/{slug(method)}",
                    combined,
                    method,
                    panel,
                    float(point["at"]),
                )
    names = [run.name for run in planned.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{path}: two methods would share the folder {twice[0]}: give them names that differ more.")
    return points


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
