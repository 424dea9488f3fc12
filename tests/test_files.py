from __future__ import annotations

from pathlib import Path

from fomal.files import keep_earlier


def test_a_file_gets_the_first_free_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for run in range(3):
        assert path.exists() is False
        path.write_text(f"run {run}")
        assert keep_earlier(path) == tmp_path / f"metrics_{run + 1}.csv"
    assert [(tmp_path / f"metrics_{n}.csv").read_text() for n in (1, 2, 3)] == ["run 0", "run 1", "run 2"]


def test_nothing_happens_without_a_file(tmp_path: Path) -> None:
    assert keep_earlier(tmp_path / "config.yaml") is None
    assert list(tmp_path.iterdir()) == []


def test_a_gap_is_filled_and_nothing_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config_1.yaml").write_text("first")
    (tmp_path / "config_3.yaml").write_text("third")
    (tmp_path / "config.yaml").write_text("new")
    assert keep_earlier(tmp_path / "config.yaml") == tmp_path / "config_2.yaml"
    assert (tmp_path / "config_1.yaml").read_text() == "first"
    assert (tmp_path / "config_3.yaml").read_text() == "third"
