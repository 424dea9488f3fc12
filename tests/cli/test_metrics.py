"""A metric of one's own, from one file and one line of YAML through training, test and comparison."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fomal.cli import main
from fomal.plots.runs import read_run
from tests.helpers.sine import tiny_model

OWN = '''
from fomal import ExampleMetric


class Worst(ExampleMetric):
    """How often the error is below `limit`, of a unit of its own."""

    name, higher_is_better = "close", True

    def __init__(self, limit: float = 1.0, unit: str = "%") -> None:
        self.limit, self.unit = limit, unit

    def __call__(self, prediction, y):
        return ((prediction - y).abs() < self.limit).squeeze(-1)
'''
METRICS = [
    {"class_path": "own_metric.Worst", "init_args": {"limit": 2.0}},
    {"class_path": "fomal.evaluation.MeanAbsoluteError", "init_args": {"unit": "m"}},
    "fomal.evaluation.QueryLoss",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the metric's file."""
    (tmp_path / "own_metric.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_metric", None)


def settings(name: str, **model: Any) -> dict[str, Any]:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": name}}
    data = {"meta_batch_size": 2, "val_tasks": 4, "test_tasks": 6, "eval_tasks_per_batch": 4}
    return {
        "model": tiny_model() | model,
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": data},
        "trainer": {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "logger": logger},
    }


def train(name: str, **model: Any) -> None:
    main(["fit", "--config", yaml.safe_dump(settings(name, **model))])


def test_from_training_to_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"metrics": METRICS, "eval": {"steps": 2, "batch_size": 5, "report_steps": [0, 1]}}
    train("a", **model)
    said = capsys.readouterr().out
    train("b", **model, inner_state="reset")
    for name in ("a", "b"):
        cli = main(["test", "--ckpt_path", f"runs/{name}/checkpoints/last.ckpt", "--trust", "own_metric.Worst"])
    table = capsys.readouterr().out
    results = json.loads(Path("runs/b/results.json").read_text())
    names = ["close", "absolute_error", "loss"]
    figures = [f"test/{name}{when}" for name in names for when in ("_before", "")] + ["test/distance"]
    assert list(results["metrics"]) == figures + [f"{name}_ci95" for name in figures]
    about = {"metric": "close", "unit": "%", "higher_is_better": True, "before": True}
    assert results["figures"]["test/close_before"] == about
    assert results["figures"]["test/absolute_error"]["unit"] == "m"
    assert results["reported_steps"] == [0, 1, 2]
    check_values(cli, results)
    value = results["metrics"]["test/close"]
    assert f"{100 * value:.2f} % " in table
    assert f"{results['metrics']['test/absolute_error']:.4f} m " in table
    logged = list(csv.DictReader(Path("runs/a/metrics.csv").read_text().splitlines()))
    last = [float(row["val/close"]) for row in logged if row["val/close"]][-1]
    assert f"val/close {100 * last:.2f} %  val/absolute_error " in said
    assert "val/close_before" not in said
    assert json.loads(Path("runs/a/metrics.json").read_text())["val/loss"]["higher_is_better"] is False
    assert read_run(Path("runs/a")).quantity("close").title == "close, %"

    methods = main(["compare", "runs", "--out", "all.png"])
    told = capsys.readouterr().out
    assert read_run(Path("runs/b")).quantity("close").unit == "%"
    finals = {method.label: method.final("close")[0] for method in methods}
    best = max(finals.values())
    assert f"Best by close, of which higher is better: {', '.join(k for k, v in finals.items() if v == best)}." in told
    main(["compare", "runs", "--out", "error.png", "--metric", "absolute_error"])
    errors = {method.label: method.final("absolute_error")[0] for method in methods}
    least = min(errors, key=errors.__getitem__)
    assert f"Best by absolute_error, of which lower is better: {least}" in capsys.readouterr().out
    assert {method.runs[0].settings["model.inner_state"] for method in methods} == {"carried", "reset"}


def check_values(cli: Any, results: dict[str, Any]) -> None:
    """By a plain loop, from the predictions and the initialisation."""
    learner, data = cli.model, cli.datamodule
    learner.trainer = None
    episode = data.episodes("test", torch.arange(6))
    error = (learner.evaluate(episode).predictions - episode.query_y).double().abs().flatten(1)
    for name, values in {"close": error < 2, "absolute_error": error, "loss": error.square()}.items():
        each = values.double().mean(1)
        assert results["metrics"][f"test/{name}"] == pytest.approx(each.mean().item(), rel=1e-6)
        assert results["metrics"][f"test/{name}_ci95"] == pytest.approx(1.96 * each.std().item() / 6**0.5, rel=1e-5)
        assert results[f"{name}_by_step"][::2] == [results["metrics"][f"test/{name}{w}"] for w in ("_before", "")]
        assert len(results[f"{name}_by_step_ci95"]) == 3
    before = (learner(episode.query_x.flatten(0, 1)).view(episode.query_y.shape) - episode.query_y).abs() < 2
    assert results["metrics"]["test/close_before"] == pytest.approx(before.double().mean().item(), abs=1e-9)


def test_what_does_not_fit_is_refused_before_work_starts(folder: Path, fails: Callable[..., str]) -> None:
    def refused(**model: Any) -> str:
        return fails("fit", "--config", yaml.safe_dump(settings("x", **model)), code=1)

    labels = refused(metrics=["fomal.evaluation.MacroF1", "fomal.evaluation.Accuracy"])
    assert labels.startswith("metric macro_f1 needs labels, or targets that are 0 or 1")
    twice = refused(metrics=[METRICS[0], METRICS[0]])
    assert twice.startswith("two figures of model.metrics would be called 'close': give Worst another name")
    assert "must be a list of metrics, one at least" in refused(metrics=[])
    beyond = refused(eval={"steps": 3, "report_steps": [4]})
    assert "model.eval.report_steps=[4] has step 4, but model.eval.steps=3" in beyond
    worst = settings("x", metrics=METRICS)
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/close", "mode": "min"}}
    worst["trainer"]["callbacks"] = [stop]
    message = fails("fit", "--config", yaml.safe_dump(worst), code=1)
    assert message == (
        "EarlyStopping has monitor='val/close' with mode='min', but higher is better: give it mode: max."
    )
    assert not Path("runs").exists()


def test_runs_whose_units_differ_are_not_compared(folder: Path, fails: Callable[..., str]) -> None:
    for name, unit in {"a": "m", "b": "cm"}.items():
        about = {"test/err": {"metric": "err", "unit": unit, "higher_is_better": False, "before": False}}
        results = {"tasks": 3, "metrics": {"test/err": 1.0, "test/err_ci95": 0.1}, "figures": about}
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results))
    message = fails("compare", "a", "b", "--out", "f.png")
    assert message == (
        "err is another metric in a (unit 'm') than in b (unit 'cm'): compare them apart, or give one another name."
    )
    (folder / "b" / "results.json").write_text(json.dumps(results | {"figures": {"test/err": {"unit": 3}}}))
    assert "b/results.json is damaged: figures has {'unit': 3} for err" in fails(
        "compare", "b", "--out", "f.png", code=1
    )
