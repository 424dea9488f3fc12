"""Other loggers are one line away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from fomal.cli import main
from tests.sine import tiny_model

RUN = {
    "seed_everything": 3,
    "model": tiny_model(),
    "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"meta_batch_size": 2, "val_tasks": 2}},
    "trainer": {
        "max_steps": 4,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "val_check_interval": 2,
        "enable_progress_bar": False,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
    },
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A complete config, as the shipped ones, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    return "run.yaml"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases without a network, an account, or files outside the test's folder."""
    for part in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{part}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()  # ends its process


def test_tensorboard(config: str) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cli = main(["fit", "--config", config, "--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir=runs"])
    assert isinstance(cli.trainer.logger, TensorBoardLogger)
    folder = Path(cli.trainer.log_dir)
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    events = EventAccumulator(str(folder)).Reload()
    curve = events.Scalars("val/loss")
    assert [point.step for point in curve] == [2, 4]  # meta-iterations
    assert curve[-1].value == pytest.approx(cli.trainer.callback_metrics["val/loss"].item())
    assert [point.step for point in events.Scalars("train/loss_last_step")] == [1, 2, 3, 4]


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("offline")
def test_wandb_offline(config: str) -> None:
    line = "{trainer: {logger: {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: sine}}}}"
    cli = main(["fit", "--config", config, "--config", line])
    assert isinstance(cli.trainer.logger, WandbLogger)
    run = cli.trainer.logger.experiment
    assert dict(run.summary)["val/loss"] == pytest.approx(cli.trainer.callback_metrics["val/loss"].item())
    assert run.summary["trainer/global_step"] == 4  # meta-iterations
    assert run.config["model"]["inner_steps"] == 2
    assert run.config["data"]["init_args"]["meta_batch_size"] == 2
    assert set(run.config.keys()) == {"seed_everything", "model", "data", "trainer"}
    wandb.teardown()  # writes everything out
    (log,) = Path("runs/wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")
    assert b"val/loss" in log.read_bytes()
    # Of two runs of a project neither may overwrite the other's checkpoint.
    folder = Path("runs/sine") / run.id
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert (folder / "config.yaml").is_file()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["sine", "wandb"]
