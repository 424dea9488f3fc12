"""Runs read back from their folders, grouped and labelled by their configs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fomal.plots.runs import differing_settings, find_runs, flat_settings, mean_of, methods, read_run
from tests.helpers.runs import CURVE, config, make_run, make_test

# -- reading


def test_a_run_is_read_with_its_settings_curve_and_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", config(rule="FOMAML", tail_shots=2))
    assert run.settings["model.rule"] == "FOMAML"
    assert run.settings["model.rule.tail_shots"] == 2
    assert run.settings["model.train.steps"] == 5
    assert run.settings["trainer.max_steps"] == 200
    assert run.curves == {"accuracy": [(100, 0.5, 0.02), (200, 0.6, 0.01)]}
    assert run.final == {"accuracy": (0.7, 0.03)}
    assert (run.tasks, run.meta_iterations) == (100, 200)


def test_the_metrics_of_interrupted_starts_come_first_in_their_order(tmp_path: Path) -> None:
    make_run(tmp_path / "a", config())
    (tmp_path / "a" / "metrics.csv").rename(tmp_path / "a" / "metrics_2.csv")
    (tmp_path / "a" / "metrics_10.csv").write_text(CURVE.format(last=0.8))
    (tmp_path / "a" / "metrics_mine.csv").write_text(CURVE.format(last=0.1))  # no start of the run
    assert read_run(tmp_path / "a").curves["accuracy"][-1] == (200, 0.8, 0.01)
    (tmp_path / "a" / "metrics.csv").write_text(CURVE.format(last=0.9))
    assert read_run(tmp_path / "a").curves["accuracy"][-1] == (200, 0.9, 0.01)


def test_a_network_tested_otherwise_than_trained_has_the_settings_of_its_test(tmp_path: Path) -> None:
    make_run(tmp_path / "a", config())
    tested = config()
    tested["data"]["init_args"]["shots"] = 5
    settings = make_test(tmp_path / "a", tested, 0.8, meta_iterations=200).settings
    assert (settings["data.shots"], settings["trainer.max_steps"]) == (5, 200)


def test_results_without_an_interval_or_a_value_are_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"tasks": 1, "metrics": {"test/loss": null, "test/loss_ci95": null}}')
    assert all(map(math.isnan, read_run(tmp_path).final["loss"]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", "results.json is damaged: .*Test or train that run again, or leave it out"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("results.json", "[]", "results.json is not of a run of fomal"),
    ],
)
def test_a_damaged_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "a", config())
    make_test(tmp_path / "x" / "b", config(), 0.5)
    assert find_runs(tmp_path) == [tmp_path / "x" / "a", tmp_path / "x" / "b"]
    assert find_runs(tmp_path / "x" / "b") == [tmp_path / "x" / "b"]
    assert find_runs(tmp_path / "x" / "a" / "nothing") == []


def test_settings_without_classes_are_flat_too() -> None:
    assert flat_settings({"seed_everything": 1, "model": {"a": {"b": [1, 2]}}}) == {
        "seed_everything": 1,
        "model.a.b": [1, 2],
    }


# -- grouping and labels


def test_labels_are_the_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", config(seed=1)),
        make_run(tmp_path / "b", config(seed=1, steps=10)),
        make_run(tmp_path / "c", config(seed=2, rule="FOMAML", tail_shots=2)),
    ]
    assert [method.label for method in methods(runs)] == [
        "Reptile, steps=5",
        "Reptile, steps=10",
        "FOMAML, steps=5",
    ]
    assert [method.label for method in methods(runs[1:])] == ["Reptile", "FOMAML"]  # that is enough
    assert [method.label for method in methods(runs[:1])] == ["Reptile"]  # nothing differs


def test_lists_and_numbers_are_short(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(w), config(rule="StepCombination", weights=w)) for w in ([1.0, 0.5], [1.0, 1.0])]
    assert [method.label for method in methods(runs)] == ["weights=[1, 0.5]", "weights=[1, 1]"]


def test_settings_of_the_same_last_name_are_written_out(tmp_path: Path) -> None:
    settings = [config(), config()]
    settings.append(config())
    for one, (inner, outer) in zip(settings, ((0.1, 1), (1.1, 1), (1.1, 2)), strict=True):
        one["model"] |= {"inner": {"lr": inner}, "outer": {"lr": outer}}
    runs = [make_run(tmp_path / str(i), one) for i, one in enumerate(settings)]
    assert methods(runs)[2].label == "model.inner.lr=1.1, model.outer.lr=2"


def test_labels_are_no_longer_than_they_need_be(tmp_path: Path) -> None:
    settings = [config(), config(rule="FOMAML", steps=7, tail_shots=2)]
    runs = [make_run(tmp_path / str(i), one) for i, one in enumerate(settings)]
    assert [method.label for method in methods(runs)] == ["Reptile", "FOMAML"]
    differing = differing_settings([[run] for run in runs])
    assert set(differing) == {"model.rule", "model.rule.tail_shots", "model.train.steps"}


def test_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path: Path) -> None:
    one = make_run(tmp_path / "0", config(seed=0), accuracy=0.7, last=0.6)
    two = make_run(tmp_path / "1", config(seed=1), accuracy=0.8, last=0.7)
    (method,) = methods([one, two])
    mean, ci = method.final("accuracy")
    assert mean == pytest.approx(0.75)
    assert ci == pytest.approx(0.0212132, rel=1e-5)  # sqrt(0.03^2 + 0.03^2) / 2
    assert method.curve("accuracy")[1] == (200, pytest.approx(0.65), pytest.approx(0.00707107, rel=1e-5))
    assert mean_of([(1.0, 0.5)]) == (1.0, 0.5)
    assert mean_of([(0.0, 0.3), (1.0, 0.4), (2.0, 1.2)]) == pytest.approx((1.0, 1.3 / 3))


def test_curves_are_averaged_where_all_seeds_have_them(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), config(seed=seed)) for seed in (0, 1)]
    del runs[0].curves["accuracy"][0]
    assert [step for step, _, _ in methods(runs)[0].curve("accuracy")] == [200]


def test_the_same_seed_twice_is_not_averaged(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, config(seed=seed)) for name, seed in (("a", 0), ("b", 1), ("c", 0))]
    assert [(method.label, len(method.runs)) for method in methods(runs)] == [
        (f"Reptile ({tmp_path / 'a'})", 2),
        (f"Reptile ({tmp_path / 'c'})", 1),
    ]


def test_a_method_has_a_final_figure_only_if_all_its_runs_have(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "0", config(seed=0)), make_run(tmp_path / "1", config(seed=1), accuracy=None)]
    (method,) = methods(runs)
    assert method.final("accuracy") is None
    assert method.metrics() == ["accuracy"]


def test_an_untrained_network_is_a_method_of_its_own(tmp_path: Path) -> None:
    trained = make_run(tmp_path / "a", config())
    untrained = make_test(tmp_path / "b", config(), 0.2)
    assert [method.label for method in methods([trained, untrained])] == ["Reptile", "untrained"]
