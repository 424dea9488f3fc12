"""What an evaluation writes down, against the evaluation itself."""

from __future__ import annotations

import csv
import json
import platform
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

import fomal
from fomal.callbacks import PredictionsFile, ResultsFile
from fomal.callbacks.results import _regression_rows
from fomal.cli import main
from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import Conv4
from fomal.outer import Reptile
from tests.helpers.sine import tiny_model

TASKS, WAYS, QUERIES = 7, 3, 2


class RandomImages(ImageDataModule):
    """Eight classes of five random images."""

    def load(self) -> dict[str, ClassImages]:
        images = torch.randint(0, 256, (40, 1, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return dict.fromkeys(("train", "val", "test"), ClassImages.of(images, torch.full((8,), 5)))

    def preprocess(self, x: Tensor) -> Tensor:
        return x.float() / 255


def rows(path: Path) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(path.open())]


def by_episode(rows: list[dict[str, float]]) -> dict[int, list[dict[str, float]]]:
    grouped: dict[int, list[dict[str, float]]] = defaultdict(list)
    for row in rows:
        grouped[int(row["episode"])].append(row)
    return grouped


@pytest.fixture
def images() -> RandomImages:
    return RandomImages(ways=WAYS, shots=2, query_shots=QUERIES, test_tasks=TASKS, val_tasks=4, eval_tasks_per_batch=3)


@pytest.fixture
def classifier() -> MetaLearner:
    torch.manual_seed(0)
    network = Conv4(WAYS, image_size=9, filters=4)
    return MetaLearner(network, Reptile(), SGD(0.1), train=InnerSchedule(2), eval=InnerSchedule(3, 5))


def evaluator(folder: Path) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [ResultsFile(), PredictionsFile()]
    return L.Trainer(
        accelerator="cpu", inference_mode=False, callbacks=callbacks, default_root_dir=folder / "new", **quiet
    )


def test_classification(
    tmp_path: Path, images: RandomImages, classifier: MetaLearner, capsys: pytest.CaptureFixture[str]
) -> None:
    started, trainer = time.monotonic(), evaluator(tmp_path)
    trainer.test(classifier, images, verbose=False)
    elapsed = time.monotonic() - started
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    names = {"test/accuracy", "test/accuracy_transductive", "test/distance"}
    assert results["metrics"].keys() == logged.keys() == names | {f"{name}_ci95" for name in names}
    assert results["metrics"] == pytest.approx(logged)  # the logged ones are float32
    assert (results["tasks"], results["checkpoint"], results["meta_iterations"]) == (TASKS, None, None)
    assert 0 < results["wall_time_s"] <= elapsed
    assert f"{TASKS} tasks" in out
    for name in names - {"test/distance"}:
        mean, half = (100 * results["metrics"][key] for key in (name, f"{name}_ci95"))
        assert re.search(rf" {name} .* {mean:.2f} % .* ± {half:.2f} ", out)
    assert re.search(rf" test/distance .* {results['metrics']['test/distance']:.4f} ", out)

    trainer.predict(classifier, images)
    episodes = by_episode(rows(tmp_path / "new" / "predictions.csv"))
    assert list(episodes) == list(range(TASKS))
    for kind in ("", "_transductive"):
        right = [[row["label"] == row[f"prediction{kind}"] for row in queries] for queries in episodes.values()]
        accuracies = torch.tensor(right).double().mean(1)
        assert accuracies.mean().item() == pytest.approx(results["metrics"][f"test/accuracy{kind}"], abs=1e-12)
        half = 1.96 * accuracies.std() / TASKS**0.5
        assert half.item() == pytest.approx(results["metrics"][f"test/accuracy{kind}_ci95"], abs=1e-12)
    expected = classifier.evaluate(images.on_after_batch_transfer(images.episodes("test", torch.arange(TASKS)), 0))
    for number, queries in episodes.items():
        assert [row["query"] for row in queries] == list(range(WAYS * QUERIES))
        assert [row["label"] for row in queries] == sorted(list(range(WAYS)) * QUERIES)
        for kind, logits in (("", expected.logits), ("_transductive", expected.logits_transductive)):
            probability = torch.tensor([row[f"probability{kind}"] for row in queries])
            torch.testing.assert_close(probability, logits[number].softmax(-1).amax(-1), atol=1e-5, rtol=1e-5)


def test_an_earlier_file_is_kept_and_validation_writes_none(
    tmp_path: Path, images: RandomImages, classifier: MetaLearner, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator(tmp_path).validate(classifier, images, verbose=False)
    assert re.search(r" val/accuracy .* % ", capsys.readouterr().out)
    assert not (tmp_path / "new").exists()
    for tasks in (2, 3, 4):
        images.test_tasks = tasks
        trainer = evaluator(tmp_path)
        trainer.test(classifier, images, verbose=False)
        trainer.predict(classifier, images)
    names = [f"results{number}" for number in ("_1", "_2", "")]
    assert [json.loads((tmp_path / "new" / f"{name}.json").read_text())["tasks"] for name in names] == [2, 3, 4]
    names = [f"predictions{number}" for number in ("_1", "_2", "")]
    assert [len(by_episode(rows(tmp_path / "new" / f"{name}.csv"))) for name in names] == [2, 3, 4]


def test_regression_through_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config: dict[str, Any] = {
        "seed_everything": 3,
        "model": tiny_model(),
        "data": {
            "class_path": "fomal.data.SinusoidDataModule",
            "init_args": {"meta_batch_size": 2, "test_tasks": TASKS, "query_shots": 5, "eval_tasks_per_batch": 4},
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path / "run")},
    }
    (tmp_path / "sine.yaml").write_text(yaml.safe_dump(config))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    trained = main(["fit", "--config", str(tmp_path / "sine.yaml")])
    capsys.readouterr()
    cli = main(["test", "--ckpt_path", checkpoint])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    names = {"test/loss", "test/loss_before", "test/distance"}
    assert results["metrics"].keys() == names | {f"{name}_ci95" for name in names}
    assert results["checkpoint"] == checkpoint
    assert (results["meta_iterations"], results["tasks"], results["seed"]) == (3, TASKS, 3)
    assert results["config"] == cli.model.config
    assert results["config"]["data"] == trained.model.config["data"]
    assert results["config"]["model"]["inner_optimizer"]["init_args"]["lr"] == 0.02
    assert results["versions"].items() >= {
        ("python", platform.python_version()),
        ("fomal", fomal.__version__),
        ("torch", torch.__version__.split("+")[0]),
        ("lightning", L.__version__),
    }
    assert results["loss_by_step"][::2] == [results["metrics"]["test/loss_before"], results["metrics"]["test/loss"]]
    assert f" {results['metrics']['test/loss']:.4f} " in capsys.readouterr().out

    main(["predict", "--ckpt_path", checkpoint])
    episodes = by_episode(rows(tmp_path / "run" / "predictions.csv"))
    assert list(episodes) == list(range(TASKS))
    truth = cli.datamodule.episodes("test", torch.arange(TASKS)).query_y
    losses = []
    for number, queries in episodes.items():
        assert [(row["query"], row["output"]) for row in queries] == [(q, 0) for q in range(5)]
        assert [row["target"] for row in queries] == pytest.approx(truth[number].flatten().tolist())
        losses.append(sum((row["target"] - row["prediction"]) ** 2 for row in queries) / 5)
    assert sum(losses) / TASKS == pytest.approx(results["metrics"]["test/loss"], rel=1e-5)


def test_targets_may_be_without_an_axis_of_outputs() -> None:
    outputs = {
        "number": torch.tensor([7]),
        "query_y": torch.tensor([[1.0, 2.0]]),
        "predictions": torch.tensor([[3.0, 4.0]]),
    }
    assert [tuple(row.values()) for row in _regression_rows(outputs)] == [(7, 0, 0, 1.0, 3.0), (7, 1, 0, 2.0, 4.0)]
