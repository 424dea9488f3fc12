"""The verb experiment: what its files mean, what is run and what is not, what it draws, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fomal.cli import configs_dir, main
from fomal.cli.configs import config_names
from fomal.cli.errors import UsageError
from fomal.cli.experiment import _fomal, split
from fomal.cli.experiments import experiment_names, read_experiment, slug
from tests.helpers.runs import make_run
from tests.helpers.sine import tiny_model

Fails = Callable[..., str]
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
OUT = Path("runs/experiments/mine")
FOLDERS = [OUT / "reptile/seed_0", OUT / "g1_plus_g2_over_2/seed_0"]


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The command lines that were run, which is in this process: another takes seconds to start."""
    made: list[tuple[str, ...]] = []

    def run(*args: str) -> str:
        made.append(args)
        try:
            main(args)
        except SystemExit as stop:
            return str(stop.__cause__)
        return ""

    monkeypatch.setattr("fomal.cli.experiment._fomal", run)
    return made


def table(path: Path = OUT / "results.csv") -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def results() -> list[dict[str, Any]]:
    return [json.loads((folder / "results.json").read_text()) for folder in FOLDERS]


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG"


# -- running


def test_each_run_is_a_fit_and_a_test_of_its_own(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    name = write(settings={"model": {"train": {"steps": 3}}})
    methods = main(["experiment", "--trainer.log_every_n_steps", "1", name, "--data.num_workers=0"])
    assert [call[0] for call in calls] == ["fit", "test"] * 2
    # Settings of the machine are for the test too.
    assert ["--trainer.log_every_n_steps" in call for call in calls] == [True, False] * 2
    assert all("--data.num_workers=0" in call for call in calls)
    assert [r["config"]["model"]["train"]["steps"] for r in results()] == [3, 3]
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in FOLDERS]
    assert [c["trainer"]["log_every_n_steps"] for c in configs] == [1, 1]
    assert [r["meta_iterations"] for r in results()] == [4, 4]
    assert [(row["method"], row["seed"], row["tasks"]) for row in table()] == [(name, "0", "6") for name in METHODS]
    assert [method.label for method in methods] == list(METHODS)
    for figure in ("loss", "loss_ci95"):
        assert [float(row[figure]) for row in table()] == [r["metrics"][f"test/{figure}"] for r in results()]
    assert is_png(OUT / "curves.png")
    out = capsys.readouterr().out
    assert "[2/2] g1_plus_g2_over_2, seed 0: " in out
    assert all(f"{r['metrics']['test/loss']:.4f}" in out for r in results())


def test_an_interrupted_experiment_goes_on(write: Callable[..., str], calls: list[tuple[str, ...]]) -> None:
    name = write()
    main(["experiment", name])
    times, before = [(folder / "results.json").stat().st_mtime_ns for folder in FOLDERS], results()
    # One run was stopped before its test: it has a checkpoint, and goes on from there.
    (FOLDERS[1] / "results.json").unlink()
    calls.clear()
    main(["experiment", name])
    checkpoint = str(FOLDERS[1] / "checkpoints" / "last.ckpt")
    assert [call[:3] for call in calls] == [("fit", "--ckpt_path", checkpoint), ("test", "--ckpt_path", checkpoint)]
    assert (FOLDERS[0] / "results.json").stat().st_mtime_ns == times[0]
    assert results()[1]["metrics"] == before[1]["metrics"]
    # Another was lost altogether.
    shutil.rmtree(FOLDERS[0])
    main(["experiment", name])
    assert results()[0]["metrics"] == before[0]["metrics"]
    calls.clear()
    main(["experiment", name])
    assert not calls


def test_drawing_reads_and_runs_nothing(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    name = write()
    make_run(FOLDERS[0], BASE, accuracy=0.7)
    make_run(FOLDERS[0].with_name("seed_10"), BASE | {"seed_everything": 10}, accuracy=0.8)
    (method,) = main(["experiment", name, "--draw", "--data.root", "elsewhere"])
    assert method.final("accuracy") == pytest.approx((0.75, 0.0212132), rel=1e-5)  # all seeds that are there
    assert is_png(OUT / "curves.png")
    assert [(row["seed"], float(row["accuracy"])) for row in table()] == [("0", 0.7), ("10", 0.8)]
    out = capsys.readouterr().out
    assert "75.00 ± 2.12" in out
    assert "1 of 2 results are there." in out
    (method,) = main(["experiment", name, "--draw", "--seeds", "10", "11"])
    assert [run.settings["seed_everything"] for run in method.runs] == [10]
    assert not calls


def test_seeds_and_only_choose_runs(write: Callable[..., str], calls: list[tuple[str, ...]]) -> None:
    name = write()
    (method,) = main(["experiment", name, "--out", "there", "--seeds", "1", "2", "--only", "rept"])
    assert [run.settings["seed_everything"] for run in method.runs] == [1, 2]
    assert sorted(path.name for path in Path("there/reptile").iterdir()) == ["seed_1", "seed_2"]
    a, b = (run.final["loss"] for run in method.runs)
    assert method.final("loss") == pytest.approx(((a[0] + b[0]) / 2, (a[1] ** 2 + b[1] ** 2) ** 0.5 / 2))
    assert [run.name for run in read_experiment(name).runs_named("(g1")] == ["g1_plus_g2_over_2"]


def test_a_run_that_fails_does_not_end_the_others(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["experiment", write(methods={"broken": {"model": {"train": {"steps": 0}}}, "Reptile": {}})])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fomal: error: 1 run failed: broken (seed 0); the same command tries again."
    )
    assert (FOLDERS[0] / "results.json").is_file()
    assert [row["method"] for row in table()] == ["Reptile"]


def test_a_run_is_two_processes_of_its_own(write: Callable[..., str]) -> None:
    main(["experiment", write(methods={"Reptile": {}}, settings={"trainer": {"max_steps": 2}})])
    assert json.loads((FOLDERS[0] / "results.json").read_text())["meta_iterations"] == 2
    assert is_png(OUT / "curves.png")


def test_the_error_of_a_failed_run_is_its_last_line(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["experiment", write(settings={"model": {"train": {"steps": 0}}})])
    out = capsys.readouterr().out
    assert "[1/2] reptile, seed 0 failed: model.train.steps=0 leaves Reptile nothing" in out
    assert "2 results" not in out  # nothing to draw


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fomal("fitt") == "'fitt' is not a verb of fomal - did you mean fit?"
    assert _fomal("--version") == ""
    popen = subprocess.Popen
    code = "import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr("subprocess.Popen", lambda args, **kwargs: popen([sys.executable, "-c", code], **kwargs))
    assert _fomal("fit") == "exit code -9: so far"


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), "2"), (SystemExit(143), "15")])
def test_a_run_is_asked_once_to_stop_by_whatever_stops_the_experiment(
    stop: BaseException, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in a group of its own, which Ctrl-C on a terminal does not reach, and is waited for."""
    (tmp_path / "run.py").write_text(
        "import signal, sys, pathlib, time\n"
        "def said(number, frame):\n"
        "    time.sleep(0.2)\n"
        "    pathlib.Path(sys.argv[1]).write_text(str(number))\n"
        "    sys.exit()\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, said)\n"
        "print('there', flush=True)\n"
        "time.sleep(30)\n"
    )

    class Interrupted(subprocess.Popen[str]):
        asked = False

        def communicate(self, *args: Any, **kwargs: Any) -> Any:
            if self.asked:
                return super().communicate(*args, **kwargs)
            self.asked = True
            assert self.stdout is not None
            self.stdout.readline()
            assert os.getpgid(self.pid) != os.getpgid(0)
            raise stop

    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "asked")]
    monkeypatch.setattr("subprocess.Popen", lambda args, **kwargs: Interrupted(command, **kwargs))
    with pytest.raises(type(stop)):
        _fomal("fit")
    assert (tmp_path / "asked").read_text() == code


def test_results_of_other_settings_are_told(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["experiment", write(), "--trainer.max_steps", "2"])
    assert "was run with" not in capsys.readouterr().err
    name = write(settings={"model": {"train": {"steps": 3}}, "trainer": {"max_steps": 4}})
    main(["experiment", name, "--trainer.max_steps", "2", "--only", "Reptile"])
    assert capsys.readouterr().err.splitlines() == [
        f"fomal: {FOLDERS[0]} was run with model.train.steps=2 where the file has 3: remove it to run it anew."
    ]


# -- what a file means


def test_a_sweep_shares_equal_runs_between_panels(write: Callable[..., str]) -> None:
    sweeps = {
        "steps": [{"at": 1, "settings": {"model": {"train": {"steps": 1}}}}, {"at": 2}],
        "shots": [{"at": 10}, {"at": 20, "methods": {"Reptile": {"data": {"init_args": {"train_shots": 20}}}}}],
    }
    experiment = read_experiment(write(sweeps=sweeps))
    assert len(experiment.points) == 8
    # Two steps are the base's, and so are ten shots, and FOMAML's twenty.
    assert [run.name for run in experiment.runs] == [
        *("steps/1/reptile", "steps/1/g1_plus_g2_over_2", "steps/2/reptile", "steps/2/g1_plus_g2_over_2"),
        "shots/20/reptile",
    ]
    (run,) = experiment.runs_named("shots/20/reptile")
    assert run.settings["data"]["init_args"]["train_shots"] == 20
    # A panel is complete with the runs that it shares.
    assert [run.name for run in experiment.runs_named("shots/10")] == ["steps/2/reptile", "steps/2/g1_plus_g2_over_2"]
    overrides = run.overrides(Path("here"), 3)
    assert overrides["seed_everything"] == 3
    assert overrides["trainer"]["logger"]["init_args"] == {"save_dir": "here", "name": run.name, "version": "seed_3"}


def test_a_sweep_is_drawn_by_panel(
    write: Callable[..., str], calls: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps = {
        "steps": [{"at": 1, "settings": {"model": {"train": {"steps": 1}}}}, {"at": 2}],
        "shots": [{"at": 10}, {"at": 20, "settings": {"data": {"init_args": {"train_shots": 20}}}}],
    }
    methods = main(["experiment", write(sweeps=sweeps), "--only", "reptile"])
    assert len(calls) == 6
    assert [method.label for method in methods] == [
        f"{p}: Reptile" for p in ("steps 1", "steps 2", "shots 10", "shots 20")
    ]
    assert [(row["panel"], row["at"], row["method"]) for row in table()] == [
        *(("steps", "1.0", "Reptile"), ("steps", "2.0", "Reptile")),
        *(("shots", "10.0", "Reptile"), ("shots", "20.0", "Reptile")),
    ]
    assert table()[1]["folder"] == table()[2]["folder"]  # shared
    assert is_png(OUT / "sweep.png")
    out = capsys.readouterr().out
    assert "4 of 8 results are there." in out
    (line,) = (line for line in out.splitlines() if "Reptile" in line and f"{float(table()[3]['loss']):.4f}" in line)
    assert f"{float(table()[2]['loss']):.4f}" in line


def test_later_settings_are_merged_over_earlier_ones(write: Callable[..., str]) -> None:
    def steps(n: int, **more: int) -> dict[str, Any]:
        return {"model": {"train": {"steps": n}, **more}}

    methods = {"a": steps(2, method=2), "b": steps(2, method=2)}
    sweeps = {"s": [{"at": 1, "settings": steps(3, point=3), "methods": {"b": steps(4)}}]}
    first, second = read_experiment(write(settings=steps(1, common=1), methods=methods, sweeps=sweeps)).runs
    assert first.settings == steps(3, common=1, method=2, point=3)
    assert second.settings == steps(4, common=1, method=2, point=3)


def test_a_slug_is_a_folders_name() -> None:
    assert slug("(g1 + g2) / 2") == "g1_plus_g2_over_2"
    assert slug("FOMAML, separate tail") == "fomaml_separate_tail"
    assert slug("4.0") == "4.0"


def test_settings_for_every_fit_are_told_from_the_verbs_own() -> None:
    own, extra = split(
        ["--data.root", "x", "name", "--seeds", "0", "1", "--data.download=true", "--draw", "--a.b", "-1"]
    )
    assert own == ["name", "--seeds", "0", "1", "--draw"]
    assert extra == ["--data.root", "x", "--data.download=true", "--a.b", "-1"]


# -- mistakes


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ({"titel": ""}, (), "the file has the unknown key 'titel' - did you mean title?"),
        ({"base": "sinusoid/reptil"}, (), "base sinusoid/reptil is neither a file nor a shipped config - did you mean"),
        ({"base": "experiments/overlap"}, (), "base experiments/overlap is neither a file nor a shipped config"),
        ({"methods": {}}, (), "methods is empty"),
        ({"methods": {"a": 3}}, (), "method 'a' is 3: it must be a mapping"),
        ({"settings": [1]}, (), "settings is [1]: it must be a mapping"),
        (
            {"methods": {"a b": {}, "a_b": {"model": {"train": {"steps": 1}}}}},
            (),
            "'a_b' is no folder of one run alone",
        ),
        ({"methods": {"***": {}}}, (), "'' is no folder of one run alone"),
        ({"sweeps": {"a": []}}, (), "the sweep 'a' must be a list of points"),
        ({"sweeps": {"a": [{"settings": {}}]}}, (), "a point of 'a' lacks at"),
        ({"sweeps": {"a": [{"at": "x"}]}}, (), "'a' has a point at 'x': give a number"),
        ({"sweeps": {"a": [{"at": 1, "setings": {}}]}}, (), "a point of 'a' has the unknown key 'setings' - did you"),
        ({"sweeps": {"a": [{"at": 1, "methods": {"MAML": {}}}]}}, (), "'a' at 1 names 'MAML', which is no method; the"),
        ({"settings": {"model": {"inner_stepz": 1}}}, (), "reptile: there is no option model.inner_stepz - did you"),
        ({}, ("--data.shotz", "1"), "there is no option data.shotz of fomal.data.SinusoidDataModule - did you mean"),
        ({}, ("--onli", "x"), "there is no option --onli - did you mean --only?"),
        ({}, ("--only", "MAML"), "--only MAML: the runs are reptile, g1_plus_g2_over_2"),
        ({}, ("--draw",), "has no finished run of mine: leave out --draw"),
        ({}, ("--seed_everything", "3"), "--seed_everything is not for an experiment: give --seeds N"),
        ({}, ("--trainer.logger.name=x",), "--trainer.logger.name is not for an experiment: the folder is given with"),
        ({}, ("--seeds", "x"), "invalid int value: 'x'"),
        ({}, ("--seeds", "0", "-1"), "seeds=-1 must not be negative."),
        ({}, ("--seeds", "1" + "0" * 30), "must be at most 4294967295."),
        ({}, ("--only", "x\0y"), "--only x\\x00y: the runs are reptile"),
        ({}, ("--out", "mine.yaml"), "out=mine.yaml/results.csv cannot be written, since"),
        ({}, ("--out", "mine.yaml/below"), "out=mine.yaml/below/results.csv cannot be written, since"),
        ({}, ("--out", "x\0y"), "must be a path, without a zero byte in it."),
        ({}, ("--out", "a" * 300), "cannot be a file (File name too long): give another path."),
        ({}, ("--out", ""), "--out is empty: give a value, or leave it out."),
    ],
)
def test_what_cannot_be_meant_is_refused(
    content: dict[str, Any], args: tuple[str, ...], message: str, write: Callable[..., str], fails: Fails
) -> None:
    in_value = message.startswith(("seeds=", "must be", "out=", "cannot be"))
    assert message in fails("experiment", write(**content), *args, code=1 if in_value else 2)
    assert sorted(path.name for path in Path().iterdir()) == ["base.yaml", "mine.yaml"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    assert "is not valid YAML" in fails("experiment", str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("- 1")
    assert "the file must be a mapping with base, methods, settings" in fails("experiment", str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("title: x")
    assert "the file lacks base, methods" in fails("experiment", str(tmp_path / "a.yaml"))


def test_help_names_the_shipped_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["experiment", "--help"])
    assert "Shipped experiments: gradient_combinations, overlap" in capsys.readouterr().out


# -- the shipped ones


def test_experiments_have_names_and_are_no_configs(fails: Fails) -> None:
    assert {"gradient_combinations", "overlap"} <= set(experiment_names())
    assert not [name for name in config_names() if "experiments" in name]
    assert "did you mean overlap" in fails("experiment", "overlaps")
    for name in ("experiments/overlap", str(configs_dir() / "experiments" / "overlap.yaml")):
        assert fails("fit", "--config", name) == (
            f"--config {name} describes several runs: use `fomal experiment overlap`."
        )
    names = ("overlap", "experiments/overlap", "configs/experiments/overlap.yaml")
    assert len({read_experiment(name).title for name in names}) == 1
    with pytest.raises(UsageError, match="the shipped ones are gradient_combinations"):
        read_experiment("nothing like it")
