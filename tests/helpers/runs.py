"""Folders of runs, as fomal writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fomal.plots.runs import Run, read_run

CURVE = "step,val/accuracy,val/accuracy_ci95\n100,0.5,0.02\n200,{last},0.01\n"


def config(seed: int = 0, rule: str = "Reptile", steps: int = 5, **arguments: Any) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "model": {"rule": {"class_path": f"fomal.outer.{rule}", "init_args": arguments}, "train": {"steps": steps}},
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"shots": 1, "root": f"here/{seed}"}},
        "trainer": {"max_steps": 200, "logger": {"init_args": {"name": rule}}},
    }


def make_run(folder: Path, settings: dict[str, Any], accuracy: float | None = 0.7, last: float = 0.6) -> Run:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.csv").write_text(CURVE.format(last=last))
    if accuracy is not None:
        make_test(folder, settings, accuracy, meta_iterations=200)
    return read_run(folder)


def make_test(folder: Path, settings: dict[str, Any], accuracy: float, meta_iterations: int | None = None) -> Run:
    """The results of a test, which knows nothing of the training's trainer."""
    folder.mkdir(parents=True, exist_ok=True)
    if meta_iterations:
        settings = settings | {"trainer": {"max_steps": -1, "logger": False}}
    metrics = {"test/accuracy": accuracy, "test/accuracy_ci95": 0.03}
    results = {"tasks": 100, "metrics": metrics, "meta_iterations": meta_iterations, "config": settings}
    (folder / "results.json").write_text(json.dumps(results))
    return read_run(folder)
