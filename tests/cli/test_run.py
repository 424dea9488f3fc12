"""The command line's runs: their folder, their checkpoints, and what may not differ from those."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torchvision import models
from torchvision.models import WeightsEnum

from fomal.cli import main
from fomal.cli.checkpoint import refuse_differences
from fomal.cli.errors import UsageError
from fomal.data import SinusoidDataModule
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from tests.helpers.pictures import write_images
from tests.helpers.sine import tiny_model

QUIET = ("--trainer.enable_progress_bar=false",)
Fails = Callable[..., str]


def settings(folder: Path) -> dict[str, Any]:
    """A tiny sine run that logs into `folder`/run, the same folder every time."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "run"}}
    return {
        "seed_everything": 3,
        "model": tiny_model(),
        "data": {
            "class_path": "fomal.data.SinusoidDataModule",
            "init_args": {"meta_batch_size": 2, "val_tasks": 2, "test_tasks": 2},
        },
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "logger": logger,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
    }


def config_file(folder: Path) -> str:
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(settings(folder)))
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a run of 4 meta-iterations, written through the command line."""
    folder = tmp_path_factory.mktemp("trained")
    cli = main(["fit", "--config", config_file(folder)])
    cli.trainer.save_checkpoint(folder / "done.ckpt")
    return str(folder / "done.ckpt")


# -- a run and its folder


def test_a_run_leaves_its_config_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = main(["fit", "--config", config_file(tmp_path)])
    folder = tmp_path / "run"
    assert capsys.readouterr().out.splitlines()[-1] == f"The run is in {folder}."
    assert (folder / "metrics.csv").is_file()
    assert cli.trainer.global_step == 4
    assert cli.datamodule.seed == 3
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert cli.model.config == {key: saved[key] for key in ("seed_everything", "model", "data", "trainer")}
    assert "seed" not in saved["data"]["init_args"]  # linked
    again = main(["fit", "--config", str(folder / "config.yaml"), "--seed_everything=4"])
    assert again.datamodule.seed == 4


def test_an_earlier_run_in_the_same_folder_is_kept(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = config_file(tmp_path)
    main(["fit", "--config", config])
    first = [(tmp_path / "run" / name).read_text() for name in ("config.yaml", "metrics.csv")]
    main(["fit", "--config", config, "--trainer.max_steps=6"])
    assert [(tmp_path / "run" / name).read_text() for name in ("config_1.yaml", "metrics_1.csv")] == first
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    assert len(list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))) == 3
    assert not [w for w in recwarn if "will be deleted" in str(w.message)]


def failing(at: str | int) -> tuple[str, str]:
    return "--trainer.callbacks+=tests.helpers.failing.Fail", f"--trainer.callbacks.at={at}"


def there(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("at", ["setup", "on_fit_start", 0])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_failed_start_leaves_everything_as_it_was(at: str | int, earlier: bool, tmp_path: Path, fails: Fails) -> None:
    start = ("fit", "--config", config_file(tmp_path), "--trainer.enable_checkpointing=true")
    if earlier:
        main(start)
    before = there(tmp_path)
    deep = ("--trainer.logger.name=a/b",) if not earlier else ()
    assert fails(*start, *deep, *failing(at), code=1).startswith("no")
    assert there(tmp_path) == before


@pytest.mark.parametrize("kind", ["TensorBoard", "replicas", "replicas after a run alone", "resumed"])
def test_a_failed_start_in_a_folder_that_is_there_leaves_it_so(kind: str, tmp_path: Path, fails: Fails) -> None:
    start = ["fit", "--config", config_file(tmp_path), "--trainer.enable_checkpointing=true"]
    start += ["--trainer.logger.class_path=TensorBoardLogger"] if kind == "TensorBoard" else []
    again = ["--replicas=2"] if "replicas" in kind else []
    often = ["--trainer.callbacks+=fomal.callbacks.SaveLast", "--trainer.callbacks.every_n_meta_iterations=2"]
    main([*start, *(again if kind == "replicas" else []), *(often if kind == "resumed" else [])])
    before = there(tmp_path)
    assert (tmp_path / "run" / "metrics.csv").is_file() == (kind != "TensorBoard")
    at: str | int = 0
    if kind == "resumed":  # goes back by two rows of the log
        again, at = [f"--ckpt_path={tmp_path}/run/checkpoints/previous.ckpt"], 2
    assert fails(*start, *again, *failing(at), code=1).startswith("no")
    assert there(tmp_path) == before


def test_an_evaluation_takes_no_log_away(checkpoint: str, tmp_path: Path, fails: Fails) -> None:
    """Not if it fails either, and then it leaves nothing."""
    log = tmp_path / "run" / "metrics.csv"
    log.parent.mkdir()
    log.write_text("step,loss\n")
    loggers = [
        {"class_path": name, "init_args": {"save_dir": str(tmp_path), "name": "", "version": version}}
        for name, version in (("CSVLogger", "run"), ("TensorBoardLogger", "run"), ("TensorBoardLogger", "new"))
    ]
    test = ("test", "--ckpt_path", checkpoint, *QUIET, f"--trainer.logger={loggers}")
    before = there(tmp_path)
    assert fails(*test, *failing("on_test_start"), code=1).startswith("no")
    assert there(tmp_path) == before
    main(test)
    assert log.with_name("metrics_1.csv").read_text() == "step,loss\n"


def test_a_run_that_fails_later_keeps_what_it_has(tmp_path: Path, fails: Fails) -> None:
    fails("fit", "--config", config_file(tmp_path), *failing(2), code=1)
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_evaluating_leaves_no_config_and_no_log(checkpoint: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("validate", "test", "predict"):
        cli = main([verb, "--ckpt_path", checkpoint, "--trainer.enable_progress_bar=false"])
        assert cli.trainer.logger is None
        assert cli.model.config["model"]["train"]["steps"] == 2
    assert not list(tmp_path.rglob("config.yaml"))
    assert not list(tmp_path.rglob("metrics.csv"))


def test_validation_interval_beyond_the_run_and_limits_work(tmp_path: Path) -> None:
    quiet = ("--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}")
    config = config_file(tmp_path)
    main(["fit", "--config", config, *quiet, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"])
    assert (tmp_path / "config.yaml").is_file()
    cli = main(["fit", "--config", config, *quiet, "--trainer.val_check_interval=2"])
    assert "val/loss" in cli.trainer.callback_metrics
    cli = main(["fit", "--config", config, "--trainer.fast_dev_run=true"])
    assert cli.trainer.global_step == 1
    assert not (tmp_path / "run").exists()


class Stop(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_is_exit_code_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomal.cli.run.default_callbacks", lambda trainer: [Stop()])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", config_file(tmp_path)])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert stop.value.code == 130
    assert isinstance(stop.value.__cause__, KeyboardInterrupt)


# -- checkpoints bring their configuration


def test_a_checkpoint_is_enough_to_test(checkpoint: str) -> None:
    cli = main(["test", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar=false"])
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert weights.keys() == cli.model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in cli.model.state_dict().items())
    assert cli.datamodule.seed == 3
    assert cli.trainer.max_steps == -1  # of the trainer only the precision is taken


def test_a_checkpoint_is_enough_to_go_on(checkpoint: str, fails: Fails) -> None:
    folder = Path(checkpoint).parent / "run"
    settings = ("--data.num_workers=0", "--trainer.log_every_n_steps=1", "--trainer.logger.version=run")
    cli = main(["fit", "--ckpt_path", checkpoint, *settings])
    assert cli.trainer.max_steps == cli.trainer.global_step == 4
    assert (folder / "metrics_1.csv").is_file()  # the logger's folder is the same
    assert (folder / "config_1.yaml").is_file()
    message = fails("fit", "--ckpt_path", checkpoint, "--trainer.max_steps=9", code=1)
    assert message.startswith("trainer.max_steps=9, but the checkpoint's run has 4")


@pytest.mark.parametrize(
    "same",
    [
        ["--model.train.steps=2", "--seed_everything=3"],
        ["--model.inner_optimizer.lr=2e-2"],
        ["--model.inner_optimizer=SGD", "--model.network=fomal.models.mlp.MLP"],
        ["--model.eval.steps=3", "--model.execution.vectorize=false", "--data.shots=5", "--data.test_tasks=3"],
        ["--config", "{model: {inner_optimizer: {init_args: {lr: '0.02'}}, network: {init_args: {hidden: [4]}}}}"],
    ],
)
def test_equal_values_and_evaluation_settings_may_be_given(same: list[str], checkpoint: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["test", "--ckpt_path", checkpoint, *same, "--print_config"])
    assert stop.value.code == 0


@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model.train.steps=8"], "model.train.steps is 2 in the checkpoint, but 8 was given: leave it out"),
        (["--seed_everything=4"], "seed_everything is 3 in the checkpoint, but 4 was given"),
        (["--model.network.hidden=[8]"], "model.network.hidden is [4] in the checkpoint, but [8] was given"),
        (["--config", "{model: {inner_state: reset}}"], "model.inner_state is carried in the checkpoint, but reset"),
        (
            ["--model.inner_optimizer", "Adam"],
            "model.inner_optimizer.class_path is fomal.inner.SGD in the checkpoint, but fomal.inner.Adam was given",
        ),
        (
            ["--model.train.steps=8", "--model.outer.final=0.5"],
            "model.outer.final is 0.0 in the checkpoint, but 0.5 was given; model.train.steps is 2 in the",
        ),
        (["--data.seed=5"], "data.seed=5 was given, but it follows seed_everything=3"),
    ],
)
def test_what_differs_from_the_checkpoint_is_refused(
    verb: str, given: list[str], message: str, checkpoint: str, fails: Fails
) -> None:
    assert fails(verb, "--ckpt_path", checkpoint, *given).startswith(message)


def test_resuming_also_keeps_the_data(checkpoint: str, fails: Fails) -> None:
    assert fails("fit", "--ckpt_path", checkpoint, "--data.shots=5") == (
        "data.shots is 10 in the checkpoint, but 5 was given: leave it out, or start a new run without --ckpt_path."
    )


@pytest.mark.parametrize(
    ("key", "free_to_evaluate", "free_to_resume"),
    [
        ("ways", False, False),
        ("partition", False, False),
        ("partition_seed", False, False),
        ("train_classes", False, False),
        ("val_classes", False, False),
        ("rotations", False, False),
        ("shots", True, False),
        ("root", True, True),
        ("download", True, True),
    ],
)
def test_no_other_classes_are_tested_than_the_run_left_out(
    key: str, free_to_evaluate: bool, free_to_resume: bool
) -> None:
    data = "fomal.data.OmniglotDataModule"
    before, now = ({"data": {"class_path": data, "init_args": {key: value}}} for value in (1, 2))
    for verb, free in (("test", free_to_evaluate), ("validate", free_to_evaluate), ("fit", free_to_resume)):
        with nullcontext() if free else pytest.raises(UsageError, match=f"data.{key} is 1 in the checkpoint, but 2"):
            refuse_differences(before, now, verb)


def test_nan_does_not_differ_from_itself() -> None:
    settings = [{"model": {"x": [float("nan"), 1]}, "data": {"class_path": "fomal.data.SinusoidDataModule"}}] * 2
    first, again = (yaml.safe_load(yaml.safe_dump(part)) for part in settings)
    refuse_differences(first, again, "fit")
    again["model"]["x"][1] = 2
    with pytest.raises(UsageError, match="model.x is"):
        refuse_differences(first, again, "fit")


# -- checkpoints of other origin


@pytest.mark.parametrize("verb", ["test", "analyze"])
def test_a_folder_is_taken_for_its_checkpoint(verb: str, checkpoint: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(Path(checkpoint).read_bytes())
    cli = main([verb, "--ckpt_path", str(tmp_path), *(["--tasks=3"] if verb == "analyze" else QUIET)])
    assert f"the checkpoint is {folder / 'last.ckpt'}" in capsys.readouterr().err
    assert (tmp_path / ("analysis/analysis.json" if verb == "analyze" else "version_0/results.json")).is_file()
    assert cli.config[verb].model.train.steps == 2


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, fails: Fails) -> None:
    for verb in ("fit", "test", "validate", "predict", "analyze"):
        assert fails(verb, "--ckpt_path", str(tmp_path)).startswith(f"--ckpt_path {tmp_path} has no checkpoint; it has")


def test_a_missing_file_and_a_file_of_another_kind(tmp_path: Path, fails: Fails) -> None:
    assert fails("test", "--ckpt_path", "no.ckpt") == "--ckpt_path no.ckpt: there is no such file or folder."
    (tmp_path / "text.ckpt").write_text("hello")
    assert "cannot be read as a checkpoint" in fails("test", "--ckpt_path", str(tmp_path / "text.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    message = fails("test", "--ckpt_path", str(tmp_path / "other.ckpt"))
    assert "is not a checkpoint of fomal: give one written by `fomal fit`" in message


def test_a_checkpoint_made_in_python_needs_a_config(tmp_path: Path, fails: Fails) -> None:
    model = MetaLearner(MLP(hidden=[4]), Reptile(), SGD(0.02), train=InnerSchedule(2), eval=InnerSchedule(2, 5))
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=SinusoidDataModule(meta_batch_size=2))
    path = str(tmp_path / "python.ckpt")
    trainer.save_checkpoint(path)
    assert fails("test", "--ckpt_path", path) == (
        f"--ckpt_path {path} brings no configuration with it: give --config FILE too."
    )
    cli = main(["test", "--ckpt_path", path, "--config", config_file(tmp_path), "--trainer.logger=false"])
    assert torch.equal(cli.model.network.layers[1].weight, model.network.layers[1].weight)


def test_a_configuration_that_no_longer_fits_is_said_to_be_the_checkpoints(
    checkpoint: str, tmp_path: Path, fails: Fails
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["fomal"]["config"]["model"]["network"]["class_path"] = "gone.Net"
    torch.save(content, tmp_path / "old.ckpt")
    message = fails("test", "--ckpt_path", str(tmp_path / "old.ckpt"), "--trust", "gone.Net")
    assert message.startswith(f"the configuration in {tmp_path / 'old.ckpt'} cannot be used: model.network=gone.Net")


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_weights_that_a_run_began_with_may_be_given_again(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint's take their place, and stored configurations do without them."""
    weights = models.squeezenet1_1().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **kwargs: weights)
    classes = [f"{split}/{split}{number}" for split in ("train", "val", "test") for number in range(3)]
    pictures = write_images(tmp_path / "images", dict.fromkeys(classes, 2), 32, 32)
    network = {"factory": "torchvision.models.squeezenet1_1", "options": {"weights": "DEFAULT"}}
    data = {"root": str(pictures), "ways": 3, "shots": 1, "query_shots": 1, "image_size": 32, "meta_batch_size": 1}
    changed = settings(tmp_path)
    changed["model"]["network"] = {"class_path": "fomal.models.Classifier", "init_args": network}
    changed["data"] = {
        "class_path": "fomal.data.ImageFolderDataModule",
        "init_args": data | {"val_tasks": 1, "test_tasks": 1, "cache_dir": str(tmp_path / "cache")},
    }
    changed["trainer"] |= {"max_steps": 1, "enable_checkpointing": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
    given = ("--config", str(tmp_path / "run.yaml"))
    main(["fit", *given])
    again = main([verb, *given, "--ckpt_path", "last" if verb == "fit" else str(tmp_path / "run")])
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["network"]["init_args"]
    assert stored["options"] == {"weights": "DEFAULT"}
    assert again.trainer.global_step == (verb == "fit")
    with pytest.raises(SystemExit):  # another network is another run
        main([verb, *given, "--ckpt_path", str(tmp_path / "run"), "--model.network.options.dropout=0.1"])
