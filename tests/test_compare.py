from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from fomal.cli import main
from tests.plots.test_runs import config, make_run


def test_runs_are_drawn_and_tabulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"reptile_{seed}", config(seed=seed), accuracy=0.7 + 0.1 * seed)
    make_run(tmp_path / "other", config(rule="MAML"), accuracy=0.9)
    out = tmp_path / "new" / "figure.png"
    main(["compare", str(tmp_path / "runs"), str(tmp_path / "other"), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(row["label"], row["seed"], float(row["accuracy"])) for row in rows] == [
        ("Reptile", "0", 0.7),
        ("Reptile", "1", pytest.approx(0.8)),
        ("MAML", "0", 0.9),
    ]
    table = capsys.readouterr().out
    assert "75.00 ± 2.12" in table
    assert "90.00 ± 3.00" in table


def test_labels_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", config())
    (method,) = main(["compare", str(tmp_path), "--out", str(tmp_path / "f.pdf"), "--labels", "mine"])
    assert method.label == "mine"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, fails: Callable[..., str]) -> None:
    make_run(tmp_path / "a", config())
    run, out = str(tmp_path / "a"), ("--out", str(tmp_path / "f.png"))
    (tmp_path / "empty").mkdir()
    assert "there is no such folder" in fails("compare", str(tmp_path / "b"), *out)
    assert "holds no run: there is neither a metrics.csv nor a results.json" in fails(
        "compare", str(tmp_path / "empty"), *out
    )
    assert "a figure can be" in fails("compare", run, "--out", str(tmp_path / "f.doc"))
    assert "--metric loss: the runs have in common accuracy" in fails("compare", run, *out, "--metric", "loss")
    assert "--labels gives 2 names, but there are 1 methods: a" in fails("compare", run, *out, "--labels", "a", "b")
    assert "did you mean --metric" in fails("compare", run, *out, "--metrics", "loss")
    assert "--out" in fails("compare", run)
    assert not (tmp_path / "f.png").exists()
