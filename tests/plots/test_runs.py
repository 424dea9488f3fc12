"""Runs read back from their folders, grouped and labelled by their configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomal.plots.compare import compare_figure
from fomal.plots.runs import Method, Run, find_runs, flat_settings, mean_of, methods, read_run
from fomal.plots.sweep import sweep_figure

CURVE = "step,val/accuracy,val/accuracy_ci95\n100,0.5,0.02\n200,{last},0.01\n"


def config(seed: int = 0, rule: str = "Reptile", steps: int = 5, **arguments: Any) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "model": {"rule": {"class_path": f"fomal.outer.{rule}", "init_args": arguments}, "inner_steps": steps},
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"shots": 1, "root": f"here/{seed}"}},
        "trainer": {"max_steps": 200, "logger": {"init_args": {"name": rule}}},
    }


def make_run(folder: Path, settings: dict[str, Any], accuracy: float | None = 0.7, last: float = 0.6) -> Run:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.csv").write_text(CURVE.format(last=last))
    if accuracy is not None:
        metrics = {"test/accuracy": accuracy, "test/accuracy_ci95": 0.03}
        results = {"tasks": 100, "metrics": metrics, "meta_iterations": 200, "config": settings}
        (folder / "results.json").write_text(json.dumps(results))
    return read_run(folder)


def test_a_run_is_read_with_its_settings_curve_and_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", config(rule="FOMAML", tail_shots=2))
    assert run.settings["model.rule"] == "FOMAML"
    assert run.settings["model.rule.tail_shots"] == 2
    assert run.settings["model.inner_steps"] == 5
    assert run.curves == {"accuracy": [(100, 0.5, 0.02), (200, 0.6, 0.01)]}
    assert run.final == {"accuracy": (0.7, 0.03)}
    assert (run.tasks, run.meta_iterations) == (100, 200)


def test_the_metrics_of_an_interrupted_run_come_first(tmp_path: Path) -> None:
    make_run(tmp_path / "a", config())
    (tmp_path / "a" / "metrics.csv").rename(tmp_path / "a" / "metrics_2.csv")
    (tmp_path / "a" / "metrics_10.csv").write_text(CURVE.format(last=0.8))
    assert read_run(tmp_path / "a").curves["accuracy"][-1] == (200, 0.8, 0.01)


def test_labels_are_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", config(seed=1)),
        make_run(tmp_path / "b", config(seed=1, steps=10)),
        make_run(tmp_path / "c", config(seed=1, rule="FOMAML", tail_shots=2)),
    ]
    assert [method.label for method in methods(runs)] == [
        "Reptile, inner_steps=5",
        "Reptile, inner_steps=10",
        "FOMAML, inner_steps=5, tail_shots=2",
    ]
    assert [method.label for method in methods(runs[:1])] == ["a"]  # nothing differs: the folder's name


def test_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path: Path) -> None:
    one = make_run(tmp_path / "0", config(seed=0), accuracy=0.7, last=0.6)
    two = make_run(tmp_path / "1", config(seed=1), accuracy=0.8, last=0.7)
    (method,) = methods([one, two])
    mean, ci = method.final("accuracy")
    assert mean == pytest.approx(0.75)
    assert ci == pytest.approx((0.03**2 + 0.03**2) ** 0.5 / 2)
    assert method.curve("accuracy")[1] == (200, pytest.approx(0.65), pytest.approx(2**0.5 * 0.01 / 2))
    assert mean_of([(1.0, 0.5)]) == (1.0, 0.5)


def test_a_method_has_a_final_figure_only_if_all_its_runs_have(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "0", config(seed=0)), make_run(tmp_path / "1", config(seed=1), accuracy=None)]
    (method,) = methods(runs)
    assert method.final("accuracy") is None
    assert method.metrics() == ["accuracy"]


def test_an_untrained_network_is_a_method_of_its_own(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "a", config())
    results = {"tasks": 100, "metrics": {"test/accuracy": 0.2}, "meta_iterations": None, "config": config()}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text(json.dumps(results))
    assert [method.label for method in methods([trained, read_run(tmp_path / "b")])] == ["a", "untrained"]


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "a", config())
    make_run(tmp_path / "x" / "b", config())
    assert find_runs(tmp_path) == [tmp_path / "x" / "a", tmp_path / "x" / "b"]
    assert find_runs(tmp_path / "x" / "b") == [tmp_path / "x" / "b"]
    assert find_runs(tmp_path / "x" / "a" / "nothing") == []


def test_settings_without_classes_are_flat_too() -> None:
    assert flat_settings({"seed_everything": 1, "model": {"a": {"b": [1, 2]}}}) == {
        "seed_everything": 1,
        "model.a.b": [1, 2],
    }


def test_the_figure_holds_curves_bands_and_results(tmp_path: Path) -> None:
    found = [
        Method("one", [make_run(tmp_path / "a", config())]),
        Method("two", [make_run(tmp_path / "b", config(), accuracy=None)]),
        Method("none", [Run(tmp_path, {}, final={"accuracy": (0.2, 0.01)})]),
    ]
    figure = compare_figure(found, "accuracy", "title")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["one (test 70 ± 3 %)"].get_ydata() == pytest.approx([50, 60])
    assert lines["two"].get_xdata() == pytest.approx([100, 200])
    assert lines["none (test 20 ± 1 %)"].get_ydata() == pytest.approx([20, 20])
    assert axes.collections[0].get_datalim(axes.transData).y1 == pytest.approx(61)  # the band
    (result,) = axes.containers
    assert result[0].get_ydata() == pytest.approx([70])


def test_a_sweep_has_a_panel_for_each_setting_and_a_style_for_each_method() -> None:
    panels = {
        "inner steps": {"Reptile": {2: (0.5, 0.1), 8: (0.7, 0.1)}, "FOMAML": {2: (0.6, 0.1)}},
        "step size": {"FOMAML": {0.1: (0.4, 0.1)}},
    }
    figure = sweep_figure(panels, "accuracy")
    first, second = figure.axes
    drawn = [[(c[0].get_xdata().tolist(), c[0].get_ydata().tolist()) for c in axes.containers] for axes in figure.axes]
    assert drawn == [[([2, 8], [50, 70]), ([2], [60])], [([0.1], [40])]]
    assert first.containers[1][0].get_color() == second.containers[0][0].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Reptile", "FOMAML"]
