"""Write down what an evaluation found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from rich.table import Table
from torch import Tensor

from fomal.callbacks.folder import is_trial, run_folder
from fomal.evaluation.figures import Quantity, read_figures
from fomal.evaluation.means import student_interval
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas, replica_folder
from fomal.run.checkpoints import meta_iterations
from fomal.run.provenance import commits, versions
from fomal.tasks.episode import NO_TARGET, Episode
from fomal.utils.files import dispensable, write_csv, write_text
from fomal.utils.output import rank_zero_info
from fomal.utils.processes import gather
from fomal.utils.pytree import named
from fomal.utils.terminal import PlainConsole


class ResultsFile(Callback):
    """Prints a table after `test` or `validate`, and after `test` writes `results.json` into the run's folder.

    It holds the metrics with their 95 % half-widths, units and directions, the number of tasks, seed, configuration,
    package versions, git commits, checkpoint and wall time in seconds. An earlier file is kept under a numbered name.
    During `fit`, `metrics.json` says units and directions of the validation figures in `metrics.csv`. Of `Replicas`,
    each that has not stopped has files in a folder of its own, and the table is of means over them.
    """

    def __init__(self) -> None:
        self._started = 0.0

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table after `validate`; in a training, write how its figures are shown."""
        logs = any(isinstance(one, CSVLogger) for one in trainer.loggers)
        if trainer.state.fn == "fit" and logs and not trainer.sanity_checking and not is_trial(trainer):
            folder = run_folder(trainer)  # in every process: it broadcasts
            if trainer.is_global_zero:
                _write_figures(pl_module, folder)
        elif trainer.state.fn == "validate" and trainer.is_global_zero:
            self._print(pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table and write the file; each replica has one of its own."""
        folder = run_folder(trainer)  # in every process: it broadcasts
        if not trainer.is_global_zero:
            return
        self._print(pl_module)
        if isinstance(pl_module, MetaLearner):
            self._write(trainer, pl_module, folder / "results.json")
        elif isinstance(pl_module, Replicas):
            for place, learner in pl_module.running():
                self._write(trainer, learner, folder / replica_folder(place) / "results.json")

    def _print(self, learner: L.LightningModule) -> None:
        if isinstance(learner, MetaLearner):
            print_table(learner.results)
        elif isinstance(learner, Replicas):
            print_replicas({place: own.results for place, own in learner.running()})

    def _write(self, trainer: L.Trainer, learner: MetaLearner, path: Path) -> None:
        config = learner.config
        results = learner.results | {
            "seed": config.get("seed_everything"),
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "meta_iterations": _meta_iterations(trainer),
            "wall_time_s": round(time.monotonic() - self._started, 3),
            "versions": versions(),
            "commits": commits(),
            "config": config,
        }
        write_text(path, json.dumps(_strict(results), indent=2, allow_nan=False) + "\n", keep=True)
        rank_zero_info(f"Results are in {path}.")


def _write_figures(learner: L.LightningModule, folder: Path) -> None:
    """Write `metrics.json`, of `Replicas` into each folder too, unless it is there."""
    places = {folder: learner} if isinstance(learner, MetaLearner) else {}
    if isinstance(learner, Replicas):
        running = learner.running()
        places = {folder: running[0][1]} | {folder / replica_folder(place): own for place, own in running}
    for place, own in places.items():
        assert isinstance(own, MetaLearner)
        path, text = place / "metrics.json", json.dumps(own.results.get("figures", {}), indent=2) + "\n"
        with dispensable("the units of its metrics"):
            if not path.is_file() or path.read_text() != text:
                write_text(path, text)


def _strict(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have: a single task has no interval."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _meta_iterations(trainer: L.Trainer) -> int | None:
    """How long the tested network was trained: Lightning restores this count only to resume."""
    if not trainer.ckpt_path:
        return trainer.global_step or None  # of a `fit` by the same trainer
    if not Path(trainer.ckpt_path).is_file():
        return None
    return meta_iterations(Path(trainer.ckpt_path))


def print_table(results: dict[str, Any]) -> None:
    """Print metrics in their units, with their 95 % intervals over tasks."""
    table = Table(title=f"{results['tasks']} tasks")
    table.add_column("metric")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    metrics = results["metrics"]
    for name, shown in _quantities(results).items():
        table.add_row(name, shown.with_unit(metrics[name]), f"± {shown.text(metrics[f'{name}_ci95'])}")
    PlainConsole().print(table)


def print_replicas(results: Mapping[int, dict[str, Any]]) -> None:
    """Print the means of the metrics over replicas with their 95 % intervals over them, and each one's mean."""
    first, *_ = results.values()
    table = Table(title=f"{len(results)} replicas, {first['tasks']} tasks each")
    for column in ("metric", "mean", "95 % over replicas", *map(str, results)):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, shown in _quantities(first).items():
        values = [own["metrics"][name] for own in results.values()]
        mean, half = student_interval(values)
        table.add_row(name, shown.with_unit(mean), f"± {shown.text(half)}", *map(shown.text, values))
    PlainConsole().print(table)


def _quantities(results: Mapping[str, Any]) -> dict[str, Quantity]:
    names = [name for name in results["metrics"] if not name.endswith("_ci95")]
    return read_figures(results.get("figures"), names, "results")


class PredictionsFile(Callback):
    """After `predict`, writes `predictions.csv` into the run's folder: one row for each query of each episode.

    Of `Replicas`, each that has not stopped has a file in a folder of its own.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = {}  # by the folder within the run's

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what an interrupted prediction left."""
        own = [replica_folder(place) for place, _ in pl_module.running()] if isinstance(pl_module, Replicas) else [""]
        self._rows = {folder: [] for folder in own}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Episode | tuple[Episode, ...],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the rows of a batch."""
        each = {"": outputs}
        if isinstance(pl_module, Replicas):
            each = {replica_folder(place): outputs[place] for place, _ in pl_module.running()}
        for folder, own in each.items():
            self._rows[folder] += _rows(own)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, or files."""
        folder, parts = run_folder(trainer), gather(self._rows)
        self._rows = {}
        if not trainer.is_global_zero:
            return
        for own in parts[0]:
            rows = sorted((row for part in parts for row in part[own]), key=lambda row: row["episode"])
            self._write(folder / own / "predictions.csv", rows)

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        write_csv(path, list(rows[0]), rows, keep=True)
        rank_zero_info(f"Predictions are in {path}.")


def _rows(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch, of the queries that there are."""
    if "logits" in outputs:
        rows = _classification_rows(outputs)
    elif isinstance(outputs["predictions"], Tensor) and isinstance(outputs["query_y"], Tensor):
        rows = _regression_rows(outputs)
    else:
        rows = _rows_by_name(outputs)
    if "query_size" not in outputs:
        return rows
    size = dict(zip(outputs["number"].tolist(), outputs["query_size"].tolist(), strict=True))
    return [row for row in rows if row["query"] < size[row["episode"]]]


def _rows_by_name(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """As `_regression_rows` of each of several outputs, whose names are before the number of the output."""
    targets, rows = dict(named(outputs["query_y"], "")), []
    for name, prediction in named(outputs["predictions"], ""):
        target = targets.get(name)
        if target is None or target.numel() != prediction.numel():  # of something else
            target = torch.full_like(prediction, torch.nan)
        own = _regression_rows(outputs | {"query_y": target, "predictions": prediction})
        rows += [row | {"output": f"{name.removeprefix('.')}.{row['output']}"} for row in own]
    return rows


def _classification_rows(outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each query, or for each place of one that has many labels; of no label the column is empty."""
    many = outputs["query_y"].ndim > 2
    label = outputs["query_y"].flatten(2) if many else outputs["query_y"][..., None]  # (T, Q, places)
    probability, prediction = outputs["logits"].float().softmax(-1).max(-1)  # (T, Q, *places) each
    probability_t, prediction_t = outputs["logits_transductive"].float().softmax(-1).max(-1)
    columns = [t.reshape(label.shape).tolist() for t in (prediction, probability, prediction_t, probability_t)]
    labels = label.tolist()
    return [
        {
            "episode": number,
            "query": q,
            **({"place": p} if many else {}),
            "label": "" if labels[t][q][p] == NO_TARGET else labels[t][q][p],
            "prediction": columns[0][t][q][p],
            "probability": columns[1][t][q][p],
            "prediction_transductive": columns[2][t][q][p],
            "probability_transductive": columns[3][t][q][p],
        }
        for t, number in enumerate(outputs["number"].tolist())
        for q in range(label.shape[1])
        for p in range(label.shape[2])
    ]


def _regression_rows(outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each target of each query; of several predictions of it, such as quantiles, each has a column."""
    y, predictions = outputs["query_y"], outputs["predictions"]
    y = y if y.ndim > 2 else y[..., None]  # (T, Q, ..., D)
    several, rest = divmod(predictions.numel(), y.numel())
    if rest:  # they are of something else
        y, several = torch.full_like(predictions, torch.nan), 1
    target = y.flatten(2).tolist()
    each = predictions.reshape(*y.shape[:-1], several, y.shape[-1]).movedim(-2, -1).flatten(2, -2).tolist()
    names = ["prediction"] if several == 1 else [f"prediction_{n}" for n in range(several)]
    return [
        {"episode": number, "query": q, "output": o, "target": target[t][q][o]}
        | dict(zip(names, each[t][q][o], strict=True))
        for t, number in enumerate(outputs["number"].tolist())
        for q in range(len(target[t]))
        for o in range(len(target[t][q]))
    ]
