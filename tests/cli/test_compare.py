"""The verb compare: which runs it takes, what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fomal.cli import main
from tests.helpers.runs import config, make_run, make_test

Fails = Callable[..., str]


def test_runs_are_drawn_and_tabulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"reptile_{seed}", config(seed=seed), accuracy=0.7 + 0.1 * seed)
    make_run(tmp_path / "other", config(rule="MAML"), accuracy=0.9)
    make_test(tmp_path / "random", config(), 0.2)  # has no metrics.csv
    out = tmp_path / "new" / "figure.png"
    folders = [str(tmp_path / name) for name in ("runs", "other", "random")]
    made = main(["compare", *folders, "--out", str(out)])
    assert [(method.label, len(method.runs)) for method in made] == [
        ("Reptile", 2),
        ("MAML", 1),
        ("Reptile, untrained", 1),
    ]
    with Image.open(out) as image:
        assert image.format == "PNG"
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["seed"], float(row["accuracy"]), row["tasks"]) for row in rows] == [
        ("Reptile", "0", 0.7, "100"),
        ("Reptile", "1", pytest.approx(0.8), "100"),
        ("Reptile", "mean", pytest.approx(0.75), "200"),
        ("MAML", "0", 0.9, "100"),
        ("Reptile, untrained", "0", 0.2, "100"),
    ]
    assert float(rows[2]["accuracy_ci95"]) == pytest.approx(0.0212132, rel=1e-5)
    table = capsys.readouterr().out
    for cells in (("75.00 ± 2.12", " 2 ", " 200 "), ("90.00 ± 3.00", "MAML"), ("20.00 ± 3.00", "untrained")):
        (line,) = (line for line in table.splitlines() if cells[0] in line)
        assert all(cell in line or cell == "untrained" for cell in cells)


def test_labels_can_be_given(tmp_path: Path) -> None:
    make_run(tmp_path / "a", config())
    (method,) = main(["compare", str(tmp_path), "--out", str(tmp_path / "f.pdf"), "--labels", "mine"])
    assert method.label == "mine"
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_accuracy_is_drawn_unless_another_metric_is_asked_for(tmp_path: Path, fails: Fails) -> None:
    for name, metrics in {"a": {"test/accuracy": 0.5, "test/loss": 1.0}, "b": {"test/loss": 2.0}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"tasks": 3, "metrics": metrics}))
    both, out = (str(tmp_path / "a"), str(tmp_path / "b")), ("--out", str(tmp_path / "f.png"))
    message = fails("compare", *both, *out)
    assert message == f"--metric accuracy: {tmp_path / 'b'} has no such figure; in common they have loss."
    main(["compare", *both, *out, "--metric", "loss"])
    main(["compare", both[1], *out])  # losses alone
    main(["compare", both[0], *out, "--metric", "test/accuracy"])


def test_what_cannot_be_compared_is_refused(tmp_path: Path, fails: Fails) -> None:
    make_run(tmp_path / "a", config())
    run, out = str(tmp_path / "a"), ("--out", str(tmp_path / "f.png"))
    (tmp_path / "empty").mkdir()
    assert "there is no such folder" in fails("compare", str(tmp_path / "b"), *out)
    assert "holds no run: there is neither a metrics.csv nor a results.json" in fails(
        "compare", str(tmp_path / "empty"), *out
    )
    assert "f.doc: a figure can be ." in fails("compare", run, "--out", str(tmp_path / "f.doc"))
    assert fails("compare", run, *out, "--metric", "loss") == (
        "--metric loss: the runs have no such figure; in common they have accuracy."
    )
    assert "did you mean accuracy?" in fails("compare", run, *out, "--metric", "acuracy")
    assert "--labels gives 2 names, but there are 1 methods: Reptile" in fails(
        "compare", run, *out, "--labels", "a", "b"
    )
    assert "there is no option --metrics - did you mean --metric?" in fails("compare", "--metrics", "loss", run, *out)
    assert "--out" in fails("compare", run)
    assert not (tmp_path / "f.png").exists()


def test_a_damaged_run_is_named(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "results.json").write_text("{")
    assert "results.json is damaged" in fails("compare", str(tmp_path), "--out", str(tmp_path / "f.png"), code=1)


def test_the_files_of_a_run_are_not_replaced(tmp_path: Path, fails: Fails) -> None:
    make_run(tmp_path / "a", config())
    before = (tmp_path / "a" / "metrics.csv").read_text()
    message = fails("compare", str(tmp_path / "a"), "--out", str(tmp_path / "a" / "metrics.png"))
    assert "its table would replace" in message
    assert (tmp_path / "a" / "metrics.csv").read_text() == before


def test_a_run_that_has_only_begun_is_left_out(
    tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.csv").write_text("step,train/loss_last_step\n50,1.5\n")
    out = ("--out", str(tmp_path / "f.png"))
    assert "there is nothing to compare" in fails("compare", str(tmp_path), *out)
    make_run(tmp_path / "a", config())
    (method,) = main(["compare", str(tmp_path), *out])
    assert [run.folder.name for run in method.runs] == ["a"]
    assert f"{tmp_path / 'new'} is left out" in capsys.readouterr().err


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    assert "usage: fomal compare RUN... --out figure.png" in capsys.readouterr().out
