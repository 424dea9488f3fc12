"""The logs and results that runs left in their folders, read back for figures and tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fomal.evaluation.figures import Quantity, read_figures
from fomal.plots.curve import Curve, read_about, read_curves
from fomal.run.moved import current

# Settings that make no other method: where files are, how it is computed, what is measured, and the seed.
_IGNORED = (
    *("seed_everything", "data.seed", "data.root", "data.cache_dir", "data.download", "data.num_workers"),
    *("model.metrics", "model.eval.report_steps"),
)
_IGNORED_SECTIONS = ("trainer.logger", "trainer.callbacks", "trainer.enable_", "trainer.default_root_dir")
_TESTED = ("model.", "data.")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it is.
        settings: its configuration by short key, e.g. {"model.rule": "Reptile", "model.train.steps": 5}; where it was
            tested with other settings than trained, those of the test.
        curves: validation figure, e.g. "accuracy" -> its curve.
        final: test figure, e.g. "accuracy" -> mean and 95 % half-width.
        tasks: number of test tasks.
        meta_iterations: how long the tested network was trained; None for one that was not, or that was not tested.
        figures: how each figure is shown.
    """

    folder: Path
    settings: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    final: dict[str, tuple[float, float]] = field(default_factory=dict)
    tasks: int = 0
    meta_iterations: int | None = None
    figures: dict[str, Quantity] = field(default_factory=dict)

    @property
    def is_untrained(self) -> bool:
        """Tell whether it is the test of a network as it is before training."""
        return self.meta_iterations is None and bool(self.final) and not self.curves

    def metrics(self) -> list[str]:
        """Its figures, of validation or test."""
        return list(dict.fromkeys([*self.final, *self.curves]))

    def quantity(self, metric: str) -> Quantity:
        """The way a figure is shown."""
        return self.figures.get(metric) or read_figures(None, [metric], str(self.folder))[metric]


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone, and what they are called."""

    label: str
    runs: list[Run]

    def metrics(self) -> list[str]:
        """The figures that all runs have, of validation or test."""
        return [name for name in self.runs[0].metrics() if all(name in run.metrics() for run in self.runs)]

    def quantity(self, metric: str) -> Quantity:
        """The way a figure is shown."""
        return next((run for run in self.runs if metric in run.metrics()), self.runs[0]).quantity(metric)

    def final(self, metric: str) -> tuple[float, float] | None:
        """Mean over the seeds of a test figure, and its half-width; None unless all runs have it."""
        if not all(metric in run.final for run in self.runs):
            return None
        return mean_of([run.final[metric] for run in self.runs])

    def curve(self, metric: str) -> Curve:
        """Mean over the seeds of a validation figure, at the meta-iterations that all runs have."""
        curves = [{step: (mean, ci) for step, mean, ci in run.curves.get(metric, [])} for run in self.runs]
        steps = sorted(set(curves[0]).intersection(*curves[1:]))
        return [(step, *mean_of([curve[step] for curve in curves])) for step in steps]


def mean_of(estimates: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of independent estimates and its half-width, which is about their tasks, not about training anew."""
    n = len(estimates)
    return sum(mean for mean, _ in estimates) / n, math.sqrt(sum(ci**2 for _, ci in estimates)) / n


def find_runs(folder: Path) -> list[Path]:
    """The run in a folder, or all those in the folders below it; empty where there is none.

    A run of replicas is them, and not their means, which its own folder has.
    """
    names = ("metrics.csv", "results.json")
    of_replicas = {path.parent for path in folder.rglob("replica_0")}
    if folder not in of_replicas and any((folder / name).is_file() for name in names):
        return [folder]
    return sorted({path.parent for name in names for path in folder.rglob(name)} - of_replicas)


def read_run(folder: Path) -> Run:
    """Read configuration, validation curves and test results, as far as there are any.

    Raises:
        ValueError: a file of the run is damaged.
    """
    results = _content(folder / "results.json")
    settings = flat_settings(current(_content(folder / "config.yaml")))
    tested = flat_settings(current(results.get("config") or {}))
    # A test knows nothing of the trainer that trained, but may be of more shots than the training's validation.
    keep = _TESTED if settings or results.get("meta_iterations") else ("",)
    settings |= {key: value for key, value in tested.items() if key.startswith(keep) or key == "seed_everything"}
    found = results.get("metrics") or {}
    final = {
        name.removeprefix("test/"): (_number(value), _number(found.get(f"{name}_ci95")))
        for name, value in found.items()
        if not name.endswith("_ci95")
    }
    curves = {name.removeprefix("val/"): curve for name, curve in read_curves(_metrics_files(folder)).items()}
    figures = read_figures(read_about(folder), curves, str(folder / "metrics.json"))
    return Run(
        folder=folder,
        settings=settings,
        curves=curves,
        final=final,
        tasks=int(results.get("tasks", 0)),
        meta_iterations=results.get("meta_iterations"),
        figures=figures | read_figures(results.get("figures"), final, str(folder / "results.json")),
    )


def _metrics_files(folder: Path) -> list[Path]:
    """The metrics of the run's starts, in order: `keep_earlier` numbers those of earlier ones."""
    numbered = {
        int(found[1]): path
        for path in folder.glob("metrics_*.csv")
        if (found := re.fullmatch(r"metrics_(\d+)", path.stem))
    }
    return [numbered[n] for n in sorted(numbered)] + [p for p in (folder / "metrics.csv",) if p.is_file()]


def _content(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file holds; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Test or train that run again, or leave it out.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not of a run of fomal: it holds no mapping. Leave its folder out.")
    return content


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by short key, e.g. `data.ways` for `data.init_args.ways`; a class by its name."""
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            flat[key] = value
            return
        if "class_path" in value:
            flat[key] = str(value["class_path"]).rpartition(".")[2]
        for name, part in value.items():
            if name in ("init_args", "dict_kwargs"):
                for argument, inner in (part or {}).items():
                    add(f"{key}.{argument}", inner)
            elif name != "class_path":
                add(f"{key}.{name}" if key else str(name), part)

    add("", config)
    return {key: value for key, value in flat.items() if "." in key or key == "seed_everything"}


def methods(runs: Sequence[Run]) -> list[Method]:
    """Group the runs that differ in nothing but their seed, labelled by the settings in which the groups differ.

    The same seed twice is no second sample: such a run is a method of its own.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if not _is_ignored(key)}
        # A run without configuration is its folder's.
        same = json.dumps(settings, sort_keys=True, default=str) if settings else str(run.folder)
        same += f" untrained={run.is_untrained}"
        while _seed(run) in map(_seed, groups.get(same, [])):
            same += " again"
        groups.setdefault(same, []).append(run)
    return [Method(label, group) for label, group in zip(labels(list(groups.values())), groups.values(), strict=True)]


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Each group of runs by the fewest settings that tell them apart, with the folder where that is not enough."""
    all_settings = [group[0].settings for group in groups]
    differing = differing_settings(groups)
    keys = dict.fromkeys(key for settings in all_settings for key in settings)
    classes = [k for k in differing if k == "model.rule" or any(other.startswith(f"{k}.") for other in keys)]
    classes.sort(key=lambda key: key != "model.rule")
    chosen: list[str] = []
    for key in [*classes, *(key for key in differing if key not in classes)]:
        if _distinct(all_settings, [*chosen, key]) > _distinct(all_settings, chosen):
            chosen.append(key)
    leaves = [key.rpartition(".")[2] for key in differing]
    found = []
    for group, settings in zip(groups, all_settings, strict=True):
        names = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(differing, leaves, strict=True)}
        there = [key for key in chosen if settings.get(key) is not None]
        parts = [str(settings[k]) if k in classes else f"{names[k]}={_text(settings[k])}" for k in there]
        if group[0].is_untrained:
            parts.append("untrained")
        found.append(", ".join(parts) or str(settings.get("model.rule", group[0].folder.name)))
    return [
        label if found.count(label) == 1 else f"{label} ({group[0].folder})"
        for label, group in zip(found, groups, strict=True)
    ]


def differing_settings(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Short keys of the settings in which groups of runs differ, those that make no other method left out."""
    all_settings = [group[0].settings for group in groups]
    keys = dict.fromkeys(key for settings in all_settings for key in settings if not _is_ignored(key))
    return [key for key in keys if _distinct(all_settings, [key]) > 1]


def _distinct(all_settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({json.dumps([settings.get(key) for key in keys], default=str) for settings in all_settings})


def _seed(run: Run) -> str:
    return str(run.settings.get("seed_everything"))


def _is_ignored(key: str) -> bool:
    return key in _IGNORED or key.startswith(_IGNORED_SECTIONS)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
