"""What finished and running runs left in their folders, read back for figures and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fomal.plots.curve import Curve, read_curves

# Settings that make no other method: where files are, how it is computed, and the seed.
_IGNORED = ("seed_everything", "data.seed", "data.root", "data.cache_dir", "data.download", "data.num_workers")
_IGNORED_SECTIONS = ("trainer.logger", "trainer.callbacks", "trainer.enable_", "trainer.default_root_dir")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it is.
        settings: its configuration by short key, e.g. {"model.rule": "Reptile", "model.inner_steps": 5}.
        curves: validation figure, e.g. "accuracy" -> its curve.
        final: test figure, e.g. "accuracy" -> mean and 95 % half-width.
        tasks: number of test tasks.
        meta_iterations: how long the tested network was trained; None for one that was not.
    """

    folder: Path
    settings: dict[str, Any]
    curves: dict[str, Curve] = field(default_factory=dict)
    final: dict[str, tuple[float, float]] = field(default_factory=dict)
    tasks: int = 0
    meta_iterations: int | None = None


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone, and what they are called."""

    label: str
    runs: list[Run]

    def metrics(self) -> list[str]:
        """The figures that all runs have, of validation or test."""
        return [name for name in _names(self.runs[0]) if all(name in _names(run) for run in self.runs)]

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


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "metrics.csv").is_file() or (folder / "results.json").is_file()


def find_runs(folder: Path) -> list[Path]:
    """The run in a folder, or all those in the folders below it; empty where there is none."""
    if is_run(folder):
        return [folder]
    return sorted({p.parent for name in ("metrics.csv", "results.json") for p in folder.rglob(name)})


def read_run(folder: Path) -> Run:
    """Read configuration, validation curves and test results, as far as there are any."""
    results: dict[str, Any] = {}
    if (folder / "results.json").is_file():
        results = json.loads((folder / "results.json").read_text())
    config = results.get("config") or {}
    if (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = [path for path in folder.glob("metrics*.csv") if path.stem != "metrics"]  # those of earlier starts
    metrics.sort(key=lambda path: int(path.stem.rpartition("_")[2]))
    metrics += [path for path in (folder / "metrics.csv",) if path.is_file()]
    found = results.get("metrics", {})
    final = {
        name.removeprefix("test/"): (value, _number(found.get(f"{name}_ci95")))
        for name, value in found.items()
        if not name.endswith("_ci95")
    }
    return Run(
        folder=folder,
        settings=flat_settings(config),
        curves={name.removeprefix("val/"): curve for name, curve in read_curves(metrics).items()},
        final=final,
        tasks=int(results.get("tasks", 0)),
        meta_iterations=results.get("meta_iterations"),
    )


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by short key; a class by its name."""
    flat: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            if "class_path" in value:
                flat[key] = str(value["class_path"]).rpartition(".")[2]
            for name, part in value.items():
                if name in ("init_args", "dict_kwargs"):
                    for argument, inner in (part or {}).items():
                        add(f"{key}.{argument}", inner)
                elif name != "class_path":
                    add(f"{key}.{name}" if key else str(name), part)
        else:
            flat[key] = value

    add("", config)
    return {key: value for key, value in flat.items() if "." in key or key == "seed_everything"}


def methods(runs: Sequence[Run]) -> list[Method]:
    """Group the runs that differ in nothing but their seed, labelled by the settings in which the groups differ."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if not _is_ignored(key)}
        # A run without configuration, or twice the same one, is its folder's.
        same = json.dumps(settings, sort_keys=True, default=str) if settings else str(run.folder)
        untrained = run.meta_iterations is None and bool(run.final) and not run.curves
        groups.setdefault(f"{same} {untrained}", []).append(run)
    return [Method(label, group) for label, group in zip(labels(list(groups.values())), groups.values(), strict=True)]


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What distinguishes each group of runs from the others, in words; the folder's name where nothing does."""
    all_settings = [group[0].settings for group in groups]
    keys = dict.fromkeys(key for settings in all_settings for key in settings if not _is_ignored(key))
    differing = [key for key in keys if len({json.dumps(s.get(key), default=str) for s in all_settings}) > 1]
    leaves = [key.rpartition(".")[2] for key in differing]
    names = {k: leaf if leaves.count(leaf) == 1 else k for k, leaf in zip(differing, leaves, strict=True)}
    found = []
    for group, settings in zip(groups, all_settings, strict=True):
        classes = [k for k in differing if any(other.startswith(f"{k}.") for other in keys) or k == "model.rule"]
        parts = [str(settings[k]) for k in classes if settings.get(k) is not None]
        parts += [
            f"{names[k]}={_text(settings[k])}" for k in differing if k not in classes and settings.get(k) is not None
        ]
        if group[0].meta_iterations is None and group[0].final and not group[0].curves:
            parts.append("untrained")
        found.append(", ".join(parts) or group[0].folder.name)
    return [label if found.count(label) == 1 else str(g[0].folder) for label, g in zip(found, groups, strict=True)]


def _is_ignored(key: str) -> bool:
    return key in _IGNORED or key.startswith(_IGNORED_SECTIONS)


def _names(run: Run) -> dict[str, None]:
    return dict.fromkeys([*run.final, *run.curves])


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
