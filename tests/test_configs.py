"""The shipped configs and experiments: each is complete, says what its name says, and runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fomal.cli import configs_dir, main
from fomal.cli.configs import config_names
from fomal.cli.experiments import experiment_names, merged, read_experiment
from fomal.plots.runs import flat_settings

CONFIGS = [f"{name}.yaml" for name in config_names()]
TABLE = {"reptile": "fomal.outer.Reptile", "fomaml": "fomal.outer.QueryFOMAML", "maml": "fomal.outer.MAML"}
# The last part of a config's name says what is special about it; here with the class of its rule.
RULES = TABLE | {
    "truncated_maml": "fomal.outer.TruncatedMAML",
    "binomial_maml": "fomal.outer.BinomialMAML",
    "released_fomaml": "fomal.outer.FOMAML",
    "released_reptile": "fomal.outer.Reptile",
    "combination": "fomal.outer.StepCombination",
    "head_only": "fomal.outer.MAML",
    "joint": "fomal.outer.Reptile",
    "sgld": "fomal.outer.Reptile",
}
NEEDS_QUERY = {"fomaml", "maml", "truncated_maml", "binomial_maml", "head_only"}


def kind_of(config: str) -> str:
    """The key of `RULES` that a config's name ends in."""
    name = config.removesuffix(".yaml").rpartition("/")[2]
    return max((kind for kind in RULES if name == kind or name.endswith(f"_{kind}")), key=len)


# The folders of configs: their datamodule, and what their first lines begin with.
DATA_SETS = {
    "sinusoid": ("Sinusoid", ""),
    "omniglot": ("Omniglot", "Omniglot "),
    "glyphs": ("Glyph", "Glyphs "),
    "mini_imagenet": ("MiniImageNet", "Mini-ImageNet "),
    "cifar_fs": ("CIFARFS", "CIFAR-FS "),
    "fc100": ("FC100", "FC100 "),
    "image_folder": ("ImageFolder", "Your own images "),
    "taskset": ("Taskset", "Omniglot "),
}

# The released Reptile runs (Nichol et al. 2018, appendix A), by the network's filters, ways and shots.
RELEASED = ("inner lr", "inner steps", "inner batch size", "train_shots", "evaluation's")
RELEASED_RUNS = {
    (64, 5): ((1e-3, 5, 10, 10, 5), 100_000),
    (64, 20): ((5e-4, 10, 20, 10, 10), 200_000),
    (32, 5): ((1e-3, 8, 10, 15, None), 100_000),  # Mini-ImageNet, where evaluation's depends on the shots
}
SHORTER = {"quick_": 3000, "glyphs": 2000, "cifar_fs": 10_000, "fc100": 10_000, "image_folder": 10_000, "taskset": 3000}
COMPLETE = {
    "seed_everything": (),
    "model": (*("network", "rule", "inner_optimizer", "outer", "train", "eval"),),
    "data": ("class_path", "init_args"),
    "trainer": ("max_steps", "val_check_interval", "logger"),
}
DATA = ("shots", "query_shots", "train_shots", "meta_batch_size", "val_tasks", "test_tasks")


def load(config: str) -> dict[str, Any]:
    return yaml.safe_load((configs_dir() / config).read_text())


def test_every_row_of_the_published_table_has_its_config() -> None:
    rows = {f"omniglot/{w}way_{s}shot_{rule}.yaml" for w in (5, 20) for s in (1, 5) for rule in TABLE}
    assert len(rows) == 12
    assert rows <= set(CONFIGS)
    assert {f"mini_imagenet/5way_{s}shot_{rule}.yaml" for s in (1, 5) for rule in TABLE} <= set(CONFIGS)
    assert {f"sinusoid/{rule}.yaml" for rule in RULES.keys() - {"released_reptile"}} <= set(CONFIGS)
    assert {config.partition("/")[0] for config in CONFIGS} == set(DATA_SETS)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_complete_by_itself(config: str) -> None:
    content = load(config)
    assert content.keys() == COMPLETE.keys()
    for section, keys in COMPLETE.items():
        assert not keys or set(keys) <= content[section].keys()
    data, model = content["data"]["init_args"], content["model"]
    assert set(DATA) <= data.keys()
    if kind_of(config) in NEEDS_QUERY:
        assert data["train_query_shots"] >= 1
    if model["inner_optimizer"]["class_path"].endswith("Adam"):
        assert model["inner_state"] == ("in_series" if kind_of(config) == "released_reptile" else "carried")
    assert content["trainer"]["val_check_interval"] <= content["trainer"]["max_steps"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_what_its_name_says(config: str) -> None:
    content = load(config)
    data, model, trainer = content["data"]["init_args"], content["model"], content["trainer"]
    rule, folder = kind_of(config), config.partition("/")[0]
    assert model["rule"]["class_path"] == RULES[rule]
    assert trainer["logger"]["init_args"]["name"] == config.removesuffix(".yaml")
    data_set, title = DATA_SETS[folder]
    assert content["data"]["class_path"] == f"fomal.data.{data_set}DataModule"
    if folder == "sinusoid":
        return
    quick, ways, shots = re.search(r"/(quick_|omniglot_)?(\d+)way_(\d+)shot_", config).groups()
    assert (data["ways"], data["shots"]) == (int(ways), int(shots))
    network = model["network"]["init_args"]
    assert not {"ways", "in_channels", "image_size"} & network.keys()  # they follow from the data
    assert f"{title}{ways}-way {shots}-shot" in (configs_dir() / config).read_text().splitlines()[0]
    if rule in ("reptile", "released_reptile"):
        expected, full = RELEASED_RUNS[network.get("filters", 64), int(ways)]
        expected = [*expected[:-1], expected[-1] or (5 if shots == "1" else 15)]
        found = {
            "inner lr": model["inner_optimizer"]["init_args"]["lr"],
            "inner steps": model["train"]["steps"],
            "inner batch size": model["train"]["batch_size"],
            "train_shots": data["train_shots"],
            "evaluation's": model["eval"]["batch_size"],
        }
        assert [found[key] for key in RELEASED] == expected
        assert trainer["max_steps"] == next((n for part, n in SHORTER.items() if part in config), full)
        assert (model["inner_optimizer"]["init_args"]["beta1"], model["eval"]["steps"]) == (0, 50)
        assert (model["outer"]["optimizer"]["init_args"]["lr"], model["outer"]["final"]) == (1, 0)
    elif rule in TABLE:  # full batches
        assert model["train"]["batch_size"] == int(ways) * data["train_shots"]
        assert model["eval"]["batch_size"] == int(ways) * data["shots"]


# Data that is not at hand: the taskset's own tests run its config, Mini-ImageNet's and FC100's theirs their datamodule.
AT_HAND = ("sinusoid", "omniglot", "glyphs", "cifar_fs", "fc100", "image_folder")


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.partition("/")[0] in AT_HAND])
def test_a_config_runs_with_settings_of_the_data_alone_changed(
    config: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = ["--data.meta_batch_size=2", "--data.val_tasks=1", "--model.eval.steps=2"]
    fast += ["--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    folder = config.partition("/")[0]
    if folder not in ("sinusoid", "glyphs"):
        cache = request.getfixturevalue("image_cache")
        root = request.getfixturevalue("omniglot_root" if folder == "omniglot" else "cifar_root")
        fast += [f"--data.root={root}", f"--data.cache_dir={cache}", "--data.query_shots=1"]
    size = {"glyphs": 16, "image_folder": 16}.get(folder, {"omniglot": 28, "sinusoid": None}.get(folder, 32))
    channels = 3 if folder in ("cifar_fs", "fc100", "image_folder") else 1
    if folder != "sinusoid":
        fast += ["--data.ways=3"]
    if size == 16:
        fast += ["--data.image_size=16"]
    if folder == "image_folder":
        fast += ["--data.color=gray"]
        channels = 1
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", "--config", config, "--trainer.fast_dev_run", "2", *fast])
    assert cli.trainer.global_step == 2
    figures = cli.trainer.callback_metrics
    assert figures["train/loss_last_step"].isfinite()
    name = "val/loss" if folder == "sinusoid" else "val/accuracy"
    assert figures[name].isfinite()
    assert all(p.isfinite().all() for p in cli.model.network.parameters())
    if folder != "sinusoid":
        assert cli.model.network.head.out_features == 3
        assert cli.model.network.blocks[0].conv.in_channels == channels
        assert cli.datamodule.image_format.height == size
    assert not list(tmp_path.iterdir())  # a trial leaves nothing


# -- experiments: several runs each


@pytest.mark.parametrize("name", experiment_names())
def test_every_run_of_a_shipped_experiment_is_complete(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = read_experiment(name)
    assert len(experiment.runs) >= 10
    base = load(f"{experiment.base}.yaml")
    parsed: set[tuple[str, ...]] = set()
    for run in experiment.runs:
        config = merged(base, run.overrides(Path("here"), 0))
        assert config.keys() == COMPLETE.keys()
        model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
        assert trainer["val_check_interval"] <= trainer["max_steps"]
        # Each mini-batch of a gradient combination is new: a training task has as many examples as they take.
        if model["rule"]["class_path"].endswith("StepCombination"):
            assert len(model["rule"]["init_args"]["weights"]) == model["train"]["steps"]
            assert data["train_shots"] * data["ways"] == model["train"]["steps"] * model["train"]["batch_size"]
        # What there is not shows in the names of the settings: runs with the same names are parsed once.
        names = (*sorted(flat_settings(config)), model["rule"]["class_path"])
        if names not in parsed:
            parsed.add(names)
            with pytest.raises(SystemExit) as stop:
                main(["fit", "--config", yaml.safe_dump(config), "--print_config"])
            assert stop.value.code == 0
            assert yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]["init_args"]["name"] == run.name


@pytest.mark.parametrize("name", experiment_names())
def test_every_method_of_a_shipped_experiment_runs(
    name: str, tmp_path: Path, omniglot_root: Path, image_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = read_experiment(name)
    fast = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    fast += [
        "--model.network.filters=2",
        "--model.eval.steps=1",
        "--data.val_tasks=1",
        "--data.meta_batch_size=1",
    ]
    fast += [f"--data.root={omniglot_root}", f"--data.cache_dir={image_cache}"]
    for run in {point.method: point.run for point in experiment.points}.values():  # the last of each method
        cli = main(["fit", "--config", experiment.base, "--config", yaml.safe_dump(run.overrides(tmp_path, 0)), *fast])
        assert cli.trainer.global_step == 2
        assert cli.trainer.callback_metrics["val/accuracy"].isfinite()
    assert not list(tmp_path.iterdir())  # trials leave nothing
