"""Other loggers are one line away, see the figures, and never stop training."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record
from wandb.wandb_agent import Agent

from fomal.cli import configs_dir, main
from fomal.cli.run import FomalCLI
from fomal.loggers import WandbLogger
from tests.helpers.sine import tiny_model

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
        "callbacks": [{"class_path": "fomal.callbacks.AdaptationFigure"}],
    },
}
IMAGES = {
    "seed_everything": 3,
    "model": tiny_model()
    | {"network": {"class_path": "fomal.models.Conv4", "init_args": {"ways": 3, "filters": 2, "image_size": 20}}},
    "data": {
        "class_path": "fomal.data.GlyphDataModule",
        "init_args": {"ways": 3, "shots": 1, "query_shots": 1, "meta_batch_size": 2, "val_tasks": 2, "image_size": 20},
    },
    "trainer": RUN["trainer"] | {"callbacks": [{"class_path": "fomal.callbacks.EpisodeGrid"}]},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A complete config, as the shipped ones, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    Path("images.yaml").write_text(yaml.safe_dump(IMAGES))
    return "run.yaml"


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Weights & Biases as on a new machine, whose home folder this is; its server is not there."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    for part in ("CACHE", "DATA"):  # so that what the logger sets is undone
        monkeypatch.setenv(f"WANDB_{part}_DIR", "")
        monkeypatch.delenv(f"WANDB_{part}_DIR")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    end_wandb()
    yield home
    end_wandb()


def end_wandb() -> None:
    """Write the run out, forget it, and end W&B's process."""
    wandb.finish()
    wandb.teardown()


def logger(**settings: Any) -> list[str]:
    """The logger's lines of a config, laid over one with another logger."""
    init = {"project": "sine", "save_dir": "runs", **settings}
    return [
        "--config",
        yaml.safe_dump({"trainer": {"logger": {"class_path": "fomal.loggers.WandbLogger", **{"init_args": init}}}}),
    ]


def records(run_id: str) -> list[Record]:
    """What is in the only offline run of an id: LevelDB's log format after a header of seven bytes."""
    end_wandb()
    (path,) = Path("runs/wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(found: list[Record]) -> list[dict[str, Any]]:
    """The rows that were logged."""
    rows = [record.history.item for record in found if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


# -- TensorBoard


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


@pytest.mark.parametrize(("config_file", "figure"), [("run.yaml", "adaptation"), ("images.yaml", "episode")])
@pytest.mark.usefixtures("config")
def test_tensorboard_shows_the_figures(config_file: str, figure: str) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra `tensorboard`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": name}}
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    cli = main(["fit", "--config", config_file, "--config", yaml.safe_dump({"trainer": {"logger": loggers}})])
    events = EventAccumulator(cli.trainer.loggers[1].log_dir).Reload()
    assert sorted(events.Tags()["images"]) == sorted([figure, "curve"])
    for name in (figure, "curve"):
        (image,) = events.Images(name)
        assert image.step == 4
        Path("shown.png").write_bytes(image.encoded_image_string)
        with Image.open("shown.png") as shown, Image.open(Path(cli.trainer.log_dir) / f"{name}.png") as drawn:
            assert np.array_equal(np.asarray(shown), np.asarray(drawn.convert("RGB")))


# -- Weights & Biases


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("config_file", "figure"), [("run.yaml", "adaptation"), ("images.yaml", "episode")])
@pytest.mark.usefixtures("config")
def test_wandb_offline(no_account: Path, config_file: str, figure: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*W&B.*")
        cli = main(["fit", "--config", config_file, *logger(offline=True, log_model=True)])
    assert isinstance(cli.trainer.logger, WandbLogger)
    run_id = cli.trainer.logger.version
    found = records(run_id)
    (run,) = (record.run for record in found if record.HasField("run"))
    assert run.project == "sine"
    updates = [update for record in found if record.HasField("config") for update in record.config.update]
    config = {update.key: json.loads(update.value_json) for update in updates}
    assert config["model"]["train"]["steps"] == 2
    assert config["data"]["init_args"]["meta_batch_size"] == 2
    assert {"seed_everything", "model", "data", "trainer"} <= config.keys()
    # The x axis is meta-iterations.
    rows = history(found)
    metric = "val/loss" if figure == "adaptation" else "val/accuracy"
    validated = [row for row in rows if metric in row]
    assert [row["trainer/global_step"] for row in validated] == [2, 4]
    assert validated[-1][metric] == pytest.approx(cli.trainer.callback_metrics[metric].item())
    assert [row["trainer/global_step"] for row in rows if "train/loss_last_step" in row] == [1, 2, 3, 4]
    axes = {record.metric.glob_name: record.metric.step_metric for record in found if record.HasField("metric")}
    assert axes["*"] == "trainer/global_step"
    # The figure is that of the run's folder.
    folder = Path("runs/sine") / run_id
    (row,) = (row for row in rows if any(key.partition("/")[0] == figure for key in row))
    assert row["trainer/global_step"] == 4
    (media,) = Path("runs/wandb").glob(f"offline-run-*/files/media/images/{figure}_*.png")
    assert media.read_bytes() == (folder / f"{figure}.png").read_bytes()
    # The checkpoint lies ready for the upload, in the folder of the runs.
    (artifact,) = (record.artifact for record in found if record.HasField("artifact"))
    assert (artifact.type, sorted(artifact.aliases)) == ("model", ["latest", "step4"])
    assert json.loads(artifact.metadata) == {"meta_iteration": 4}
    (entry,) = artifact.manifest.contents
    staged = Path(entry.local_path)
    assert staged.is_relative_to(Path("runs/wandb").absolute())
    assert staged.read_bytes() == (folder / "checkpoints" / "last.ckpt").read_bytes()
    assert (folder / "config.yaml").is_file()
    assert sorted(path.name for path in Path("runs").iterdir()) == ["sine", "wandb"]
    assert "WANDB_MODE" not in os.environ


@pytest.mark.timeout(120)
def test_the_checkpoints_that_are_logged(config: str, no_account: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for log_model, expected in {"all": ["step1", "step2"], True: ["step2"], False: []}.items():
        log = WandbLogger(offline=True, log_model=log_model, id=f"run{log_model}", save_dir="runs")
        for step in (1, 2):
            path.write_text(f"{step}")
            log.log_checkpoint(path, step, step == 2)
        log.log_metrics({"a": 1.0}, 2)
        found = [record.artifact for record in records(f"run{log_model}") if record.HasField("artifact")]
        assert [sorted(artifact.aliases) for artifact in found] == [["latest", alias] for alias in expected]
        contents = [Path(entry.local_path).read_text() for artifact in found for entry in artifact.manifest.contents]
        assert contents == [name.removeprefix("step") for name in expected]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("given", [{}, {"id": "mine"}])
def test_a_failed_start_leaves_no_run(given: dict[str, str], config: str, no_account: Path) -> None:
    def there() -> dict[str, bytes | Path]:
        return {
            str(path): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            for path in Path("runs").rglob("*")
        }

    start = ["fit", "--config", config, *logger(offline=True, log_model=not given, **given)]
    fail = ["--trainer.callbacks+=tests.helpers.failing.Fail", "--trainer.callbacks.at=0"]
    with pytest.raises(SystemExit):
        main([*start, *fail])
    assert not Path("runs").exists()
    main(start)
    end_wandb()
    before = there()
    with pytest.raises(SystemExit):
        main([*start, *fail])
    shutil.rmtree("runs/wandb/cache", ignore_errors=True)  # where W&B's process keeps logs of its own
    assert there() == {name: content for name, content in before.items() if "/cache" not in name}


@pytest.mark.timeout(120)
def test_without_an_account_the_run_goes_on_offline(config: str, no_account: Path) -> None:
    with pytest.warns(UserWarning, match=r"no account .*: it goes on offline; `wandb sync .*offline-run") as said:
        cli = main(["fit", "--config", config, *logger()])
    assert_finished(cli)
    (line,) = (str(warning.message) for warning in said if "W&B" in str(warning.message))
    (folder,) = Path("runs/wandb").glob("offline-run-*")
    assert str(folder) in line
    assert len(history(records(cli.trainer.logger.version))) >= 6
    assert not [path for path in no_account.rglob("*") if path.suffix in (".png", ".ckpt", ".wandb")]


@pytest.mark.timeout(120)
def test_without_a_network_the_run_goes_on_offline(
    config: str, no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    start, timeouts = wandb.init, []

    def init(**settings: Any) -> Any:
        """As `wandb.init` without a network, but at once: the service keeps the id of the run that failed."""
        if settings.get("mode") == "offline":
            return start(**settings)
        timeouts.append(settings["settings"]["init_timeout"])
        taken = wandb.Settings(run_id=settings["id"], mode="offline", root_dir="runs")
        wandb.setup().ensure_service().inform_init(settings=taken.to_proto(), run_id=settings["id"])
        raise wandb.errors.CommError("context deadline exceeded\nwhile retrying: ...")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match=r"online \(CommError: context deadline exceeded\): it goes on offline"):
        cli = main(["fit", "--config", config, *logger(id="mine")])
    assert_finished(cli)
    assert timeouts == [30]
    assert cli.trainer.logger.version == "mine"
    assert (Path("runs/sine/mine/checkpoints/last.ckpt")).is_file()


@pytest.mark.timeout(120)
def test_what_fails_later_is_said_once_and_training_goes_on(
    config: str, no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.CommError("the service is gone")

    for name in ("log", "log_artifact"):
        monkeypatch.setattr(wandb.Run, name, fail)
    monkeypatch.setattr(wandb.Config, "update", fail)
    with pytest.warns(UserWarning, match="W&B could not log") as said:
        cli = main(["fit", "--config", config, *logger(offline=True, log_model="all")])
    assert_finished(cli)
    lines = [str(warning.message) for warning in said if "W&B" in str(warning.message)]
    kinds = [line.partition(" (CommError: the service is gone)")[0] for line in lines]
    assert kinds == [f"W&B could not {what}" for what in ("log the configuration", "log metrics", "log a checkpoint")]


@pytest.mark.timeout(120)
def test_where_nothing_can_be_started_nothing_is_logged(
    config: str, no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = wandb.init

    def init(**settings: Any) -> Any:
        if settings.get("mode") == "disabled":
            return start(**settings)
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match=r"W&B can start no run \(OSError: no space left\): nothing is logged to it"):
        cli = main(["fit", "--config", config, *logger(log_model=True)])
    assert_finished(cli)
    assert not list(Path("runs").glob("wandb/*run-*"))


def assert_finished(cli: FomalCLI) -> None:
    """The run trained to its end and left its files."""
    assert cli.trainer.global_step == 4
    folder = Path("runs") / cli.trainer.logger.name / cli.trainer.logger.version
    assert {path.name for path in folder.iterdir()} == {"adaptation.png", "checkpoints", "config.yaml"}


def test_a_run_with_an_id_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from the command line, which gives every argument of `wandb.init`, as None."""
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    given = WandbLogger(id="mine", resume=None, settings=None, mode=None)._wandb_init
    assert (given["id"], given["resume"], given["settings"]) == ("mine", "allow", {"init_timeout": 30})
    assert "mode" not in given
    own = WandbLogger(fork_from="other?_step=3", settings={"quiet": True}, offline=True)._wandb_init
    assert "resume" not in own
    assert (own["settings"], own["mode"]) == ({"quiet": True}, "offline")


# -- sweeps


@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", sorted((configs_dir() / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_sweep_overrides_the_config(
    path: Path, tmp_path: Path, no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded by W&B's own agent, with a value for each parameter from its range."""
    monkeypatch.chdir(tmp_path)
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] in ("grid", "random", "bayes")
    random.seed(0)
    values = {
        name: random.choice(how["values"]) if "values" in how else random.uniform(how["min"], how["max"])
        for name, how in sweep["parameters"].items()
    }
    started: list[list[str]] = []
    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", lambda command, **_: started.append(command) or Process())
    for name in ("RUN_ID", "SWEEP_PARAM_PATH", "DIR"):  # which the agent sets, and the run has to find
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    agent = Agent(api=None, queue=None)
    agent._sweep_command = sweep["command"]
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"type": "run", "run_id": "run1", "program": sweep["program"], "args": arguments})
    ((env, program, *args),) = started
    assert (env, program) == ("/usr/bin/env", "fomal")
    quick = ["max_steps=2", "val_check_interval=2", "log_every_n_steps=1", "enable_progress_bar=false"]
    cli = main([*args, "--data.val_tasks=2", *[f"--trainer.{setting}" for setting in quick]])
    assert cli.trainer.global_step == 2
    for name, value in values.items():
        found: Any = cli.model.config
        for key in name.split("."):
            found = found["init_args"][key] if key not in found else found[key]
        assert found == value
    assert sweep["metric"]["name"] in cli.trainer.callback_metrics
    assert sweep["metric"]["goal"] == "minimize"
    log = cli.trainer.logger
    assert (log.version, log.experiment.sweep_id) == ("run1", "sweep1")
    assert log.experiment.summary[sweep["metric"]["name"]] == cli.trainer.callback_metrics[sweep["metric"]["name"]]


class Process:
    """A started one."""

    last_sigterm_time = None
