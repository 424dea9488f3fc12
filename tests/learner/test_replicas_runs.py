"""What replicas log, keep and draw, and how one of them stops."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR

from fomal.callbacks import AdaptationFigure, EpisodeGrid, ReplicaFiles, ResultsFile, SaveLast
from fomal.evaluation.means import student_interval
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas, replica_checkpoint
from fomal.outer import Reptile
from fomal.tasks.replicated import ReplicatedDataModule
from tests.helpers.learners import trainer
from tests.helpers.replicas import SEEDS, blobs, close, conv, fitted, plain, sines

# -- figures


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_runs_log_has_means_over_the_replicas(tmp_path: Path) -> None:
    learners = [plain(seed) for seed in SEEDS]
    callbacks = [ReplicaFiles(), AdaptationFigure(), ModelCheckpoint(tmp_path / "best", monitor="val/loss")]
    run = trainer(
        8,
        logger=CSVLogger(tmp_path, name="", version="run"),
        callbacks=callbacks,
        log_every_n_steps=2,
        val_check_interval=4,
        enable_checkpointing=True,
    )
    run.fit(Replicas(learners), datamodule=ReplicatedDataModule(sines(), SEEDS))
    whole, *each = (rows(tmp_path / "run" / part / "metrics.csv") for part in ("", "replica_0", "replica_1"))
    assert [int(row["step"]) for row in whole] == [2, 4, 4, 6, 8, 8]
    for mean, *own in zip(whole, *each, strict=True):
        assert mean.keys() == own[0].keys()
        assert sum(map(bool, mean.values())) in (4, 7)
        for name, value in mean.items():
            if value:
                assert float(value) == pytest.approx(statistics.fmean(float(row[name]) for row in own), rel=1e-12)
    for place in range(2):
        assert (tmp_path / "run" / f"replica_{place}" / "adaptation.png").is_file()
    best = torch.load(next((tmp_path / "best").glob("*.ckpt")), weights_only=True)
    assert len(best["fomal"]["replicas"]) == 2


def test_each_has_a_picture_of_a_task(tmp_path: Path) -> None:
    learners = [conv(seed, Reptile(), SGD(0.05), execution={"traced": False}) for seed in SEEDS]
    run = trainer(2, default_root_dir=tmp_path, callbacks=[EpisodeGrid()], val_check_interval=2)
    run.fit(Replicas(learners), datamodule=ReplicatedDataModule(blobs(), SEEDS))
    pictures = [(tmp_path / f"replica_{place}" / "episode.png").read_bytes() for place in range(2)]
    assert pictures[0] != pictures[1]
    assert not (tmp_path / "episode.png").exists()


# Student's quantiles at 0.975 as tabulated.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
QUANTILES |= {11: 2.201, 12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 60: 2.000, 120: 1.980, 1000: 1.962}


@pytest.mark.parametrize("degrees", QUANTILES)
def test_the_interval_is_students(degrees: int) -> None:
    values = [float((7 * i * i) % 11) for i in range(degrees + 1)]
    mean, half = student_interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / degrees)
    assert half == pytest.approx(QUANTILES[degrees] * deviation / math.sqrt(len(values)), rel=3e-4)


def test_one_value_has_no_interval() -> None:
    mean, half = student_interval([2.5])
    assert mean == 2.5
    assert math.isnan(half)


# -- values that are not finite


def jumping(seed: int, at: int | None) -> MetaLearner:
    """A learner whose outer step size is 1e30 in meta-iteration `at` + 1."""
    return plain(
        seed,
        inner=SGD(0.02, momentum=0.5),
        outer={"schedule": lambda o: LambdaLR(o, lambda step: 1e30 if step == at else 1.0)},
    )


def diverging(folder: Path, at: int | None) -> tuple[Replicas, dict[str, Any]]:
    """Three replicas, of which the second jumps."""
    replicas = Replicas([jumping(seed, at if seed == 1 else None) for seed in range(3)])
    run = trainer(
        12,
        logger=CSVLogger(folder, name="", version="run"),
        enable_checkpointing=True,
        callbacks=[ReplicaFiles(), SaveLast(4)],
        log_every_n_steps=2,
        val_check_interval=4,
    )
    run.fit(replicas, datamodule=ReplicatedDataModule(sines(), range(3)))
    return replicas, torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_replica_that_diverges_stops_and_the_others_go_on(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    _, expected = diverging(tmp_path / "good", None)
    replicas, found = diverging(tmp_path / "bad", 5)
    assert replicas.stopped == found["fomal"]["stopped"] == {1: 7}
    said = [str(w.message) for w in recwarn if "replica" in str(w.message)]
    assert said == [
        "replica 1 stops at meta-iteration 7, where its loss, gradient, inner state or weights are not finite; the "
        "others go on. Lower its step sizes."
    ]
    good, bad = tmp_path / "good" / "run", tmp_path / "bad" / "run"
    for place in (0, 2):
        close(replica_checkpoint(found, place), replica_checkpoint(expected, place), 0)
        log = f"replica_{place}/metrics.csv"
        assert (bad / log).read_text() == (good / log).read_text()
    own = torch.load(bad / "replica_1" / "checkpoints" / "last.ckpt", weights_only=True)
    before = torch.load(good / "replica_1" / "checkpoints" / "previous.ckpt", weights_only=True)
    assert own["global_step"] == 4
    assert before["global_step"] == 8
    assert [row["step"] for row in rows(bad / "replica_1" / "metrics.csv")] == ["2", "4", "4", "6"]
    for mean, *others in zip(
        *(rows(bad / part / "metrics.csv")[4:] for part in ("", "replica_0", "replica_2")), strict=False
    ):
        assert int(mean["step"]) >= 8
        for name in filter(mean.get, mean):
            assert float(mean[name]) == pytest.approx(statistics.fmean(float(row[name]) for row in others), rel=1e-12)
    # What is read back knows of it; a test has no results of it.
    again = Replicas([jumping(seed, None) for seed in range(3)])
    test = trainer(callbacks=[ResultsFile()])
    ckpt_path = bad / "checkpoints" / "last.ckpt"
    test.test(again, datamodule=ReplicatedDataModule(sines(), range(3)), ckpt_path=ckpt_path, verbose=False)
    assert again.stopped == {1: 7}
    assert [(bad / f"replica_{place}" / "results.json").is_file() for place in range(3)] == [True, False, True]
    assert "2 replicas, 3 tasks each" in capsys.readouterr().out


def test_a_replica_may_diverge_at_once(tmp_path: Path) -> None:
    make = lambda place: plain(SEEDS[place], inner=SGD((0.02, 1e30)[place]))  # noqa: E731
    replicas = Replicas([make(0), make(1)])
    callbacks = [ReplicaFiles(), SaveLast(2)]
    run = trainer(4, default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=True, val_check_interval=2)
    with pytest.warns(UserWarning, match="replica 1 stops at meta-iteration 1,"):
        run.fit(replicas, datamodule=ReplicatedDataModule(sines(), SEEDS))
    assert run.global_step == 4
    assert not (tmp_path / "replica_1" / "checkpoints").exists()
    expected = fitted(make(0), sines(seed=SEEDS[0]), tmp_path, precision="32-true")
    close(
        replicas.learners[0].network.state_dict(),
        {name.removeprefix("network."): t for name, t in expected["state_dict"].items() if name.startswith("network.")},
        1e-5,
    )
    for name, p in make(1).network.named_parameters():
        assert torch.equal(p, replicas.learners[1].network.get_parameter(name))


def test_a_run_ends_where_no_replica_is_left(tmp_path: Path) -> None:
    replicas = Replicas([plain(seed, inner=SGD(1e30)) for seed in SEEDS])
    with (
        pytest.warns(UserWarning, match="replica . stops at meta-iteration 1,"),
        pytest.raises(FloatingPointError, match="^meta-iteration 1: no replica is left whose values are finite: lower"),
    ):
        trainer(4).fit(replicas, datamodule=ReplicatedDataModule(sines(), SEEDS))


# -- files


def test_an_earlier_run_in_the_same_folder_is_kept(tmp_path: Path) -> None:
    def once(steps: int) -> None:
        callbacks = [ReplicaFiles(), SaveLast(2)]
        logger = CSVLogger(tmp_path, name="", version="run")
        run = trainer(steps, logger=logger, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=1)
        run.fit(Replicas([plain(seed) for seed in SEEDS]), datamodule=ReplicatedDataModule(sines(), SEEDS))

    once(3)
    own = tmp_path / "run" / "replica_1"
    files = ["checkpoints/last.ckpt", "checkpoints/previous.ckpt", "metrics.csv"]
    before = [(own / name).read_bytes() for name in files]
    once(5)
    kept = ["checkpoints/last_1.ckpt", "checkpoints/previous_1.ckpt", "metrics_1.csv"]
    assert [(own / name).read_bytes() for name in kept] == before
    assert torch.load(own / files[0], weights_only=True)["global_step"] == 5
    assert len(rows(own / "metrics.csv")) == 5


def test_logs_of_a_trial_are_not_written(tmp_path: Path) -> None:
    callbacks = [ReplicaFiles(), SaveLast(1)]
    run = trainer(4, fast_dev_run=2, default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=True)
    run.fit(Replicas([plain(seed) for seed in SEEDS]), datamodule=ReplicatedDataModule(sines(), SEEDS))
    assert run.global_step == 2
    assert not list(tmp_path.rglob("*"))
