"""Absurd values and paths for the verbs: refused in one line that names the argument, with nothing written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import yaml

from fomal.cli import main
from fomal.learner.meta_learner import MetaLearner

NUMBERS = ("-1", "nan", "inf", "1" + "0" * 30, "", "abc", "[1, 2]", "true", "1.5")
TEXTS = ("", "x\0y", "a" * 300)
FILES = (*TEXTS, "missing", "folder", "empty", "text", "/dev/zero", "text/below")  # to read from
PLACES = (*TEXTS, "folder", "/dev/zero", "text/below")  # to write to
DEVICES = ("", "abc", "0", "meta", "mkldnn", "cuda:99")
CLASSES = ("", "3", "abc", "[]", "{class_path: }", "{class_path: 3}")
WRONG = ("3", "''", "[]", "{class_path: null}")  # in YAML

ADAPT = ("adapt", "--ckpt_path=CKPT", "--support=SUPPORT", "--out=m", "--steps=1")
CLASSIFY = ("classify", "--adapted=MODEL", "--images=SUPPORT", "--out=labels.csv")
EXPORT = ("export", "--adapted=MODEL", "--format=torch-export")
COMPARE = ("compare", "RUN", "--out=figure.png")
ANALYZE = ("analyze", "--config", "sinusoid/reptile")
FIT = ("fit", "--trainer.max_steps=1")
TABLE = [
    *((ADAPT, name, NUMBERS) for name in ("steps", "batch_size", "seed")),
    *((ADAPT, name, FILES) for name in ("ckpt_path", "support", "labels")),
    (ADAPT, "out", PLACES),
    (ADAPT, "device", DEVICES),
    (ADAPT, "optimizer", CLASSES),
    ((*ADAPT, "--optimizer=fomal.inner.SGD"), "optimizer.lr", ("-1", "nan", "", "[1]")),
    (ADAPT, "on_error", ("", "abc")),
    *((ADAPT, name, ("",)) for name in ("file_column", "separator", "encoding", "include", "exclude", "trust")),
    *((CLASSIFY, name, FILES) for name in ("adapted", "images", "labels")),
    *((CLASSIFY, name, PLACES) for name in ("out", "sheet")),
    (CLASSIFY, "device", DEVICES),
    (EXPORT, "adapted", FILES),
    (EXPORT, "out", PLACES),
    (EXPORT, "format", ("", "abc")),
    (COMPARE, "out", PLACES),
    (COMPARE, "metric", ("", "abc")),
    (COMPARE, "labels", ("",)),
    *((ANALYZE, name, ("0", *NUMBERS)) for name in ("tasks", "batches")),
    (ANALYZE, "lr", ("0", "-1", "nan", "inf", "", "abc", "[1]")),
    (ANALYZE, "out", (*TEXTS, "text", "text/below")),
    (FIT, "ckpt_path", FILES),
    (FIT, "config", FILES),
    *((FIT, f"model.{name}", CLASSES) for name in ("network", "rule", "inner_optimizer", "outer.optimizer")),
    (FIT, "model.outer.schedule", (*CLASSES, "{}", "{init_args: {}}")),
    (FIT, "data", (*CLASSES[:4], "{class_path: 3}")),
    (FIT, "seed_everything", ("-1", "nan", "", "[1]", "1" + "0" * 30)),
]


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a few wrong things in it, in which nothing may be made, and no run may begin."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("hello\n")
    monkeypatch.chdir(tmp_path)

    def never(*args: object) -> None:
        raise AssertionError("a run has begun")

    monkeypatch.setattr(MetaLearner, "training_step", never)
    yield
    assert sorted(os.listdir()) == ["empty", "folder", "text"]
    assert not os.listdir("folder")


@pytest.mark.parametrize(("command", "name", "values"), TABLE, ids=[f"{c[0]}-{n}" for c, n, _ in TABLE])
def test_absurd_value_of_an_option_is_refused_by_its_name(
    command: tuple[str, ...],
    name: str,
    values: tuple[str, ...],
    checkpoint: Path,
    model: Path,
    support: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = {"CKPT": checkpoint, "SUPPORT": support, "MODEL": model, "RUN": checkpoint.parents[1]}
    wrong = []
    for value in values:
        args = [arg for arg in command if not arg.startswith(f"--{name}=")]
        for word, path in there.items():
            args = [str(path) if arg == word else arg.replace(f"={word}", f"={path}") for arg in args]
        code: object = None
        try:
            main([*args, f"--{name}={value}"])
        except SystemExit as stop:
            code = stop.code
        said = [line for line in capsys.readouterr().err.splitlines() if "fomal: error: " in line]
        if code not in (1, 2) or len(said) != 1 or name.split(".")[-1] not in said[0] or len(said[0]) > 500:
            wrong.append((value, code, said))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product(("network", "rule", "inner_optimizer"), ("{}", "null", *WRONG, "{init_args: {}}")),
        *product(("outer.optimizer",), ("null", *WRONG)),  # it has a default, so that {} changes nothing of it
        *product(("outer.schedule",), ("{}", *WRONG, "{init_args: {}}")),
    ],
)
def test_part_of_a_config_that_names_no_class_is_refused_by_its_name(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        "network": {"class_path": "fomal.models.MLP"},
        "rule": {"class_path": "fomal.outer.Reptile"},
        "inner_optimizer": {"class_path": "fomal.inner.SGD"},
    }
    config = {"data": {"class_path": "fomal.data.SinusoidDataModule"}, "trainer": {"max_steps": 1}}
    group, _, setting = name.partition(".")
    wrong = yaml.safe_load(value)
    config["model"] = model | {group: {setting: wrong} if setting else wrong}
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", yaml.safe_dump(config)])
    said = [line for line in capsys.readouterr().err.splitlines() if "fomal: error: " in line]
    assert stop.value.code in (1, 2)
    assert len(said) == 1
    assert name in said[0]


@pytest.mark.parametrize("run", ["x\0y", "a" * 300, "missing", "empty", "text/below"])
def test_run_that_is_none_is_refused_by_its_name(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["compare", run, "--out=figure.png"], ["experiment", run]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code in (1, 2)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert run[:60].replace("\0", r"\x00") in said[0]
