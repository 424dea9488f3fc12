from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomal.cli import main
from fomal.cli.configs import config_names
from fomal.cli.experiments import experiment_names, merged, read_experiment, slug
from tests.sine import tiny_model

BASE = {
    "seed_everything": 0,
    "model": tiny_model(),
    "data": {
        "class_path": "fomal.data.SinusoidDataModule",
        "init_args": {"train_shots": 10, "val_tasks": 4, "test_tasks": 6},
    },
    "trainer": {
        "max_steps": 4,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
    },
}
METHODS = {"Reptile": {}, "(g1 + g2) / 2": {"model": {"rule": {"class_path": "fomal.outer.FOMAML"}}}}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes an experiment over a tiny base; the path of its file."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))

    def make(**content: Any) -> str:
        whole = {"title": "A test", "base": "base.yaml", "methods": METHODS} | content
        Path("mine.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        return "mine.yaml"

    return make


def test_an_experiment_runs_goes_on_and_draws(write: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    name = write(settings={"model": {"inner_steps": 3}})
    methods = main(["experiment", name, "--trainer.log_every_n_steps", "1"])
    out = Path("runs/experiments/mine")
    folders = [out / "reptile/seed_0", out / "g1_plus_g2_over_2/seed_0"]
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [r["config"]["model"]["inner_steps"] for r in results] == [3, 3]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [c["trainer"]["log_every_n_steps"] for c in configs] == [1, 1]
    assert [r["meta_iterations"] for r in results] == [4, 4]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["method"] for row in rows] == list(METHODS) == [method.label for method in methods]
    assert [float(row["loss"]) for row in rows] == [r["metrics"]["test/loss"] for r in results]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "[2/2] g1_plus_g2_over_2, seed 0: " in capsys.readouterr().out

    # One run is lost, another has a checkpoint without results: only these two are run again.
    times = [(folder / "results.json").stat().st_mtime_ns for folder in folders]
    (folders[1] / "results.json").unlink()
    main(["experiment", name])
    assert (folders[0] / "results.json").stat().st_mtime_ns == times[0]
    again = json.loads((folders[1] / "results.json").read_text())
    assert again["metrics"] == results[1]["metrics"]

    (out / "curves.png").unlink()
    main(["experiment", name, "--draw"])
    assert (out / "curves.png").is_file()


def test_a_sweep_shares_equal_runs_between_panels(write: Callable[..., str]) -> None:
    sweeps = {
        "steps": [{"at": 1, "settings": {"model": {"inner_steps": 1}}}, {"at": 2}],
        "shots": [{"at": 10}, {"at": 20, "methods": {"Reptile": {"data": {"init_args": {"train_shots": 20}}}}}],
    }
    experiment = read_experiment(write(sweeps=sweeps))
    assert len(experiment.points) == 8
    names = [run.name for run in experiment.runs]
    # Two steps are the base's, and so are ten shots, and FOMAML's twenty.
    assert names == [
        *("steps/1/reptile", "steps/1/g1_plus_g2_over_2", "steps/2/reptile", "steps/2/g1_plus_g2_over_2"),
        "shots/20/reptile",
    ]
    (run,) = [run for run in experiment.runs if run.name == "shots/20/reptile"]
    assert run.settings["data"]["init_args"]["train_shots"] == 20
    overrides = run.overrides(Path("here"), 3)
    assert overrides["seed_everything"] == 3
    assert overrides["trainer"]["logger"]["init_args"] == {"save_dir": "here", "name": run.name, "version": "seed_3"}


def test_a_run_that_fails_does_not_end_the_others(write: Callable[..., str], fails: Callable[..., str]) -> None:
    broken = {"broken": {"model": {"inner_steps": 0}}, "Reptile": {}}
    message = fails("experiment", write(methods=broken))
    assert message.startswith("1 runs failed: broken (seed 0)")
    assert Path("runs/experiments/mine/reptile/seed_0/results.json").is_file()


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ({"titel": ""}, (), "the file has the unknown key 'titel' - did you mean title?"),
        ({"base": "sinusoid/reptil"}, (), "base sinusoid/reptil is neither a file nor a shipped config - did you mean"),
        ({"sweeps": {"a": [{"at": 1, "methods": {"MAML": {}}}]}}, (), "'a' at 1 names 'MAML', which is no method"),
        ({"sweeps": {"a": [{"settings": {}}]}}, (), "a point of 'a' lacks at"),
        ({"methods": {"a b": {}, "a_b": {"model": {"inner_steps": 1}}}}, (), "two methods would share the folder a_b"),
        ({}, ("--only", "MAML"), "--only MAML: the runs are reptile, g1_plus_g2_over_2"),
        ({}, ("--draw",), "has no finished run of mine: leave out --draw"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    content: dict[str, Any], args: tuple[str, ...], message: str, write: Callable[..., str], fails: Callable[..., str]
) -> None:
    assert message in fails("experiment", write(**content), *args)
    assert not Path("runs").exists()


def test_experiments_have_names_and_are_no_configs(fails: Callable[..., str]) -> None:
    assert experiment_names() == ["gradient_combinations", "overlap"]
    assert not [name for name in config_names() if "experiments" in name]
    assert "did you mean overlap" in fails("experiment", "overlaps")
    assert "use `fomal experiment overlap`" in fails("fit", "--config", "experiments/overlap")


@pytest.mark.parametrize("name", experiment_names())
def test_every_run_of_a_shipped_experiment_can_be_built(name: str, tmp_path: Path, omniglot_root: Path) -> None:
    experiment = read_experiment(f"experiments/{name}")
    assert len(experiment.runs) >= 10
    wanted = {point.method: point.run for point in experiment.points}  # the last of each method
    for run in wanted.values():
        config = merged(run.overrides(tmp_path, 0), {"data": {"init_args": {"root": str(omniglot_root)}}})
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", experiment.base, "--config", yaml.safe_dump(config), "--print_config"])
        assert stop.value.code == 0


def test_a_slug_is_a_folders_name() -> None:
    assert slug("(g1 + g2) / 2") == "g1_plus_g2_over_2"
    assert slug("FOMAML, separate tail") == "fomaml_separate_tail"
