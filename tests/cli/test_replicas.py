"""Replicas from the command line: what they leave, how they go on, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from fomal.adaptation import adapt
from fomal.cli import main, run
from fomal.learner.build import replica_configs
from fomal.plots.runs import find_runs
from tests.helpers.resume import same
from tests.helpers.sine import tiny_model

Fails = Callable[..., str]
STEPS = 23
QUIET = "--trainer.enable_progress_bar=false"


class Terminate(Callback):
    """Sends this process SIGTERM within a meta-iteration."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def config(folder: Path, **changes: Any) -> str:
    """A run in `folder`/run."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "run"}}
    save = {"class_path": "fomal.callbacks.SaveLast", "init_args": {"every_n_meta_iterations": 10}}
    settings = {"meta_batch_size": 2, "val_tasks": 3, "test_tasks": 5, "eval_tasks_per_batch": 3}
    content = {
        "seed_everything": 3,
        "model": tiny_model("Adam", lr=0.01)
        | {
            "outer": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}},
            "execution": {"traced": False},
        },
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": settings},
        "trainer": {
            **{"max_steps": STEPS, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False},
            **{"log_every_n_steps": 5, "val_check_interval": 10, "callbacks": [save]},
        },
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "given.yaml")


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def content(folder: Path) -> dict[str, Any]:
    """What a checkpoint has, but for where it is."""
    found = torch.load(last(folder), weights_only=True)
    for part in (found["fomal"], *found["fomal"].get("replicas", [])):
        del part["config"]
    return found


def results(folder: Path) -> dict[str, Any]:
    """The results that are there."""
    found = json.loads((folder / "results.json").read_text())
    return {key: found[key] for key in ("metrics", "tasks", "seed", "meta_iterations", "loss_by_step")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with joint/run, of the seeds 3 and 4, and these alone, 3/run and 4/run."""
    folder = tmp_path_factory.mktemp("runs")
    main(["fit", "--config", config(folder / "joint"), "--replicas=2"])
    for seed in (3, 4):
        main(["fit", "--config", config(folder / str(seed)), f"--seed_everything={seed}"])
    return folder


# -- what they leave


def test_each_replica_leaves_what_the_run_alone_does(runs: Path) -> None:
    joint = runs / "joint" / "run"
    for place, seed in enumerate((3, 4)):
        own, single = joint / f"replica_{place}", runs / str(seed) / "run"
        assert {path.name for path in own.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints", "curve.png"}
        assert (own / "metrics.csv").read_text() == (single / "metrics.csv").read_text()
        same(content(own), content(single))
        ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (own, single))
        where = {"save_dir": str(joint), "name": "", "version": f"replica_{place}"}
        assert ours["trainer"].pop("logger") == {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": where,
        }
        del theirs["trainer"]["logger"], theirs["replicas"], theirs["ckpt_path"]
        assert ours == theirs
    assert yaml.safe_load((joint / "config.yaml").read_text())["replicas"] == 2
    with (joint / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [5, 10, 10, 15, 20, 20]


def test_a_test_writes_the_results_of_each(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    joint = runs / "joint" / "run"
    main(["test", "--ckpt_path", str(last(joint)), QUIET])
    table = capsys.readouterr().out
    assert "2 replicas, 5 tasks each" in table
    for place, seed in enumerate((3, 4)):
        single = runs / str(seed) / "run"
        main(["test", "--ckpt_path", str(last(single)), QUIET])
        expected = results(single)
        assert results(joint / f"replica_{place}") == expected
        assert expected["seed"] == seed
        assert f"{expected['metrics']['test/loss']:.4f}" in table
        main(["test", "--ckpt_path", str(last(joint / f"replica_{place}")), QUIET])
        assert results(joint / f"replica_{place}") == expected
    assert not (joint / "results.json").exists()


def test_predictions_are_those_of_each(runs: Path) -> None:
    joint = runs / "joint" / "run"
    main(["predict", "--ckpt_path", str(last(joint)), QUIET])
    for place, seed in enumerate((3, 4)):
        main(["predict", "--ckpt_path", str(last(runs / str(seed) / "run")), QUIET])
        found, expected = (
            (folder / "predictions.csv").read_text()
            for folder in (joint / f"replica_{place}", runs / str(seed) / "run")
        )
        assert found == expected
    assert not (joint / "predictions.csv").exists()


def test_comparing_takes_the_replicas_for_the_run(runs: Path) -> None:
    joint = runs / "joint" / "run"
    assert find_runs(joint) == [joint / "replica_0", joint / "replica_1"]
    assert find_runs(runs) == [runs / "3" / "run", runs / "4" / "run", *find_runs(joint)]
    assert find_runs(joint / "replica_1") == [joint / "replica_1"]


def test_a_list_gives_each_its_settings(tmp_path: Path) -> None:
    each = [
        {"model.inner_optimizer.lr": 1e-3},
        {"model.inner_optimizer.lr": 0.02, "model.outer.optimizer.lr": 0.1},
        {"seed_everything": 8, "model.outer.optimizer.lr": 0.5},
    ]
    main(["fit", "--config", config(tmp_path / "joint", replicas=each)])
    for place, own in enumerate(each):
        given = [f"--{name}={value}" for name, value in own.items()]
        main(["fit", "--config", config(tmp_path / str(place)), *given])
        found, expected = content(tmp_path / f"joint/run/replica_{place}"), content(tmp_path / str(place) / "run")
        for name, weight in expected["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
        settings = yaml.safe_load((tmp_path / f"joint/run/replica_{place}/config.yaml").read_text())
        assert settings["seed_everything"] == own.get("seed_everything", 3)
        assert settings["model"]["inner_optimizer"]["init_args"]["lr"] == own.get("model.inner_optimizer.lr", 0.01)
        assert settings["model"]["outer"]["optimizer"]["init_args"]["lr"] == own.get("model.outer.optimizer.lr", 1e-3)


@pytest.mark.parametrize("logger", ["false", "WandbLogger"])
def test_other_loggers(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = config(tmp_path)
    where = {"default_root_dir": str(tmp_path / "run"), "logger": False}
    if logger != "false":
        settings = {"offline": True, "save_dir": str(tmp_path), "project": "p", "version": "run"}
        where = {"logger": {"class_path": f"fomal.loggers.{logger}", "init_args": settings}}
    main(["fit", "--config", given, "--config", yaml.safe_dump({"trainer": where}), "--replicas=2"])
    own = next(tmp_path.rglob("replica_1"))
    assert (own / "metrics.csv").is_file() == (logger != "false")
    before = content(own)
    assert before["global_step"] == STEPS
    cli = main(["fit", "--ckpt_path", str(last(own))])  # its own run ends where it did, in its folder
    assert cli.trainer.global_step == STEPS
    same(content(own), before)
    assert (own / "config_1.yaml").is_file()


# -- going on


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    usual = run.default_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(run, "default_callbacks", lambda trainer: [*usual(trainer), Terminate(12)])
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", config(folder), "--replicas=2"])
    assert ended.value.code == 143
    assert content(folder / "run" / "replica_1")["global_step"] == 13
    return folder / "run"


def assert_as_whole(folder: Path, runs: Path, *places: str) -> None:
    for place in places:
        same(content(folder / place), content(runs / "joint" / "run" / place))
        found, expected = (run / place / "metrics.csv" for run in (folder, runs / "joint" / "run"))
        assert found.read_text() == expected.read_text()


def test_going_on_equals_not_stopping(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    folder = stopped(tmp_path, monkeypatch)
    message = fails("fit", "--ckpt_path", str(last(folder)), "--replicas=3")
    assert message.startswith("replicas is 2 in the checkpoint, but 3 was given: leave it out, or start a new run")
    message = fails("fit", "--ckpt_path", str(last(folder / "replica_1")), "--replicas=2")
    assert message.startswith("replicas is null in the checkpoint, but 2 was given")
    changed = torch.load(last(folder), weights_only=True)
    changed["fomal"]["config"]["replicas"] = 10_000
    torch.save(changed, tmp_path / "changed.ckpt")
    message = fails("fit", "--ckpt_path", str(tmp_path / "changed.ckpt"))
    assert message.endswith("changed.ckpt: its configuration has replicas=10000, but it has 2.")
    # One alone, in its folder; then all, which takes its log back to where they were.
    main(["fit", "--ckpt_path", str(last(folder / "replica_1"))])
    assert_as_whole(folder, runs, "replica_1")
    assert content(folder / "replica_0")["global_step"] == content(folder)["global_step"] == 13
    main(["fit", "--config", str(tmp_path / "given.yaml"), "--replicas=2", "--ckpt_path=last"])
    assert_as_whole(folder, runs, "replica_0", "replica_1", "")


def test_a_replica_alone_saves_in_its_own_folder(tmp_path: Path) -> None:
    save = {"class_path": "fomal.callbacks.SaveLast", "init_args": {"dirpath": str(tmp_path / "elsewhere")}}
    trainer = yaml.safe_load(Path(config(tmp_path)).read_text())["trainer"] | {"callbacks": [save]}
    main(["fit", "--config", config(tmp_path, trainer=trainer), "--replicas=2"])
    own, all_of_them = last(tmp_path / "run" / "replica_0"), tmp_path / "elsewhere" / "last.ckpt"
    before = all_of_them.read_bytes()
    main(["fit", "--ckpt_path", str(own)])
    assert all_of_them.read_bytes() == before
    assert not (tmp_path / "elsewhere" / "last_1.ckpt").exists()
    assert own.is_file()


# -- what is refused


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that may not be used."""

    def use(*args: Any) -> None:
        raise AssertionError("the data have been used")

    for name in ("episodes", "prepare_data"):
        monkeypatch.setattr(f"fomal.data.SinusoidDataModule.{name}", use)


VARIED = "use seed_everything, model.inner_optimizer.lr, model.outer.optimizer.lr."


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("replicas", "message", "code"),
    [
        ("1", "replicas=1 must be 2 or more, or null for a run alone.", 1),
        ("1000000000", "replicas=1000000000 must be at most 10000.", 1),
        ("[{}]", "replicas=[{}] has fewer than 2 entries: give more, or null for a run alone.", 1),
        ("[]", "replicas=[] has fewer than 2 entries: give more, or null for a run alone.", 1),
        (
            "[{seed_everything: 1}, {model.train.steps: 3}]",
            f"replicas: model.train.steps cannot differ between them: {VARIED}",
            1,
        ),
        ("[{}, {seed_everything: 1.5}]", "replicas: seed_everything=1.5 must be an integer, not negative.", 1),
        ("[{}, {seed_everything: -1}]", "replicas: seed_everything=-1 must be an integer, not negative.", 1),
        ("[{}, {model.inner_optimizer.lr: x}]", "replicas: model.inner_optimizer.lr='x' must be a number, not neg", 1),
        ("[{}, {model.outer.optimizer.lr: true}]", "replicas: model.outer.optimizer.lr=True must be a number", 1),
        ("x", "replicas=x: expected one of int, list[dict[str, typing.Any]], null.", 2),
    ],
)
def test_replicas_that_cannot_be_meant(replicas: str, message: str, code: int, tmp_path: Path, fails: Fails) -> None:
    found = fails("fit", "--config", config(tmp_path), f"--replicas={replicas}", code=code)
    assert found.startswith(message)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seed_everything=false"], "seed_everything=false leaves the weights to chance: give replicas a seed, or"),
        (
            ["--model.adapt=[layers.1.*]", "--model.outer.parameters=adapted"],
            "model.adapt does not work with replicas yet: leave one of the two out.",
        ),
        (
            ["--model.outer.on_nonfinite=skip_task"],
            "model.outer.on_nonfinite=skip_task does not work with replicas: leave one of",
        ),
        (
            ["--model.execution.cuda_graph=true"],
            "model.execution.cuda_graph does not work with replicas yet: leave one of the two out.",
        ),
        (["--data.on_device=true"], "data.on_device=True does not work with replicas yet: leave one of the two out."),
        (["--model.inner_optimizer=SGLD"], "SGLD samples noise by episode, which replicas do not know: use another"),
    ],
)
def test_what_replicas_do_not_know_is_refused(given: list[str], message: str, tmp_path: Path, fails: Fails) -> None:
    assert fails("fit", "--config", config(tmp_path), "--replicas=2", *given, code=1).startswith(message)


def test_a_step_size_needs_an_optimiser_to_be_of() -> None:
    model = tiny_model() | {"outer": {"optimizer": None}}
    whole = {"seed_everything": 0, "model": model, "data": {"class_path": "x"}}
    with pytest.raises(ValueError, match="^replicas: model.outer.optimizer.lr needs model.outer.optimizer with its cl"):
        replica_configs(whole, [{}, {"model.outer.optimizer.lr": 1.0}])


def test_a_drawn_seed_is_the_first_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    settings = ["--replicas=2", "--seed_everything=true", "--trainer.fast_dev_run=true"]
    cli = main(["fit", "--config", config(tmp_path), *settings])
    assert [learner.config["seed_everything"] for learner in cli.model] == cli.datamodule.seeds
    assert cli.datamodule.seeds == [cli.model.config["seed_everything"] + place for place in range(2)]
    assert not (tmp_path / "run").exists()


def test_other_verbs_ask_for_the_checkpoint_of_one(runs: Path, fails: Fails) -> None:
    joint = last(runs / "joint" / "run")
    message = "the checkpoint is of replicas: give that of one, replica_0/checkpoints/last.ckpt, say."
    with pytest.raises(ValueError, match=f"^{message}$"):
        adapt(joint, torch.zeros(2, 1, 9, 9, dtype=torch.uint8), ["a", "b"])
    (runs / "images" / "a").mkdir(parents=True, exist_ok=True)
    support = ["--support", str(runs / "images"), "--out", str(runs / "model")]
    assert fails("adapt", "--ckpt_path", str(joint), *support, code=1) == message
    assert fails("analyze", "--ckpt_path", str(joint)) == (
        "replicas are not analysed together: give the checkpoint of one, or leave --replicas out."
    )


def test_an_experiment_has_no_replicas(tmp_path: Path, fails: Fails) -> None:
    experiment = {"title": "t", "base": config(tmp_path), "methods": {"a": {"replicas": 2}}}
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(experiment))
    message = fails("experiment", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "out"))
    assert message.endswith("'a' sets replicas, but an experiment runs its seeds by itself: --seeds.")


def test_callbacks_of_a_run_alone_are_refused(tmp_path: Path, fails: Fails) -> None:
    given = ["--config", config(tmp_path), "--replicas=2", "--trainer.callbacks+=GradientAlignment"]
    message = "GradientAlignment does not work with replicas: leave one of the two out."
    assert fails("fit", *given, code=1) == message
