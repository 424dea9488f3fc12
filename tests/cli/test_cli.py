"""The command line up to the moment a run starts: help, configs, mistakes, links, printed configs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fomal import __version__
from fomal.cli import VERBS, configs_dir, main
from fomal.cli.configs import config_names, find_config
from fomal.cli.given import Given

SINE = ("--config", "sinusoid/reptile")
NETWORK = """
from torch import nn

class NeedsWays(nn.Module):
    def __init__(self, ways: int, width: int = 3):
        super().__init__()

class NoWays(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
"""
DATA = """
from fomal.data import EpisodeDataModule

class WaysData(EpisodeDataModule):
    def __init__(self, ways: int = 5, **kwargs):
        super().__init__(**kwargs)

class SeedlessData(EpisodeDataModule):
    def __init__(self):
        super().__init__()
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_user_network.py").write_text(NETWORK)
    (tmp_path / "cli_user_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    """Run with --print_config; the configuration printed."""

    def run(*args: str) -> dict:
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


# -- help, version, verbs


def test_alone_prints_help_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    out = capsys.readouterr().out
    assert all(f"  {verb}" in out for verb in VERBS)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "usage: fomal VERB" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fomal {__version__}\n"


def test_python_m_fomal_exits_like_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fomal", "fitt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fomal: error: 'fitt' is not a verb of fomal - did you mean fit?\n"


def test_help_of_a_verb_lists_our_options_with_their_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--model.train.steps STEPS how many, k;" in out
    assert "fomal.models.ResNet12, ...)" in out
    assert "torchmetrics" not in out
    assert out.index("--model.network") < out.index("--data ") < out.index("--trainer.max_steps")


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_help_of_a_verb_is_whole_and_about_fomal(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.partition(" options:")[0].endswith(f"{VERBS[verb].summary.capitalize()}.")
    assert "--ckpt_path CKPT_PATH a checkpoint, or the folder of a run, for its newest; brings its configuration" in out
    assert not re.search("Useful to|Model Registry|return_predictions|optimization routine", out)


@pytest.mark.parametrize("verb", ["adapt", "classify", "export", "compare", "experiment", "analyze"])
def test_help_says_the_verb_once_and_no_pythons_names(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert "The verb" not in out
    assert "<class" not in out


def test_help_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["test", "--data.help", "fomal.data.SinusoidDataModule"])
    assert "support points of a validation or test task" in " ".join(capsys.readouterr().out.split())


# -- configs


def test_configs_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "sinusoid/reptile" in config_names()
    shipped = str(configs_dir() / "sinusoid" / "reptile.yaml")
    for name in ("sinusoid/reptile", "sinusoid/reptile.yaml", "configs/sinusoid/reptile.yaml", shipped):
        assert find_config(name) == shipped
    (tmp_path / "sinusoid").mkdir()
    (tmp_path / "sinusoid" / "reptile.yaml").touch()
    assert find_config("sinusoid/reptile.yaml") == "sinusoid/reptile.yaml"  # a file of the user goes first


def test_installed_configs_are_those_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomal.cli.configs.__file__", str(tmp_path / "site" / "fomal" / "cli" / "configs.py"))
    (tmp_path / "site" / "fomal" / "configs").mkdir(parents=True)
    assert configs_dir() == tmp_path / "site" / "fomal" / "configs"


def test_fit_without_a_config_says_which_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--model.train.steps=7", "--print_config"])
    captured = capsys.readouterr()
    assert captured.err == f"fomal: no --config given: using {configs_dir() / 'sinusoid' / 'reptile.yaml'}\n"
    config = yaml.safe_load(captured.out)
    assert config["model"]["train"]["steps"] == 7
    assert config["data"]["class_path"] == "fomal.data.SinusoidDataModule"


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_needs_a_checkpoint_or_a_config(verb: str, fails) -> None:
    message = fails(verb)
    assert message == f"give --ckpt_path FILE to {verb} a trained network, or --config for a new one."


def test_trainer_defaults(printed) -> None:
    mine = ("--config", str(configs_dir() / "sinusoid" / "reptile.yaml"))
    for verb in ("fit", "test"):
        trainer = printed(verb, *mine)["trainer"]
        assert (trainer["max_epochs"], trainer["check_val_every_n_epoch"], trainer["inference_mode"]) == (
            -1,
            None,
            False,
        )
    without = "{model: {network: fomal.models.MLP, rule: Reptile, inner_optimizer: SGD}, data: SinusoidDataModule}"
    assert printed("test", "--config", without)["trainer"]["logger"] is False
    trainer = printed("fit", "--config", without)["trainer"]
    assert trainer["logger"]["class_path"] == "lightning.pytorch.loggers.CSVLogger"
    assert (trainer["val_check_interval"], trainer["log_every_n_steps"]) == (1000, 50)


# -- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_epoch", "3"], r"no option --trainer.max_epoch - did you mean --trainer.max_epochs"),
        (["--model.train.step=3"], r"no option --model.train.step - did you mean --model.train.steps"),
        (["--inner_state=reset"], r"no option --inner_state - did you mean --model.inner_state\?"),
        (["--data.shotz=3"], r"no option data.shotz of fomal.data.SinusoidDataModule - did you mean shots\?"),
        (["--model.network.hid=[3]"], r"no option model.network.hid of fomal.models.MLP - did you mean hidden\?"),
        (["--model.outer.optimizer.lrr=1"], r"no option model.outer.optimizer.lrr of .*SGD - did you mean lr\?"),
        (["--model.rule", "Reptil"], r"model.rule=Reptil: there is no such class - did you mean fomal.outer.Reptile\?"),
        (["--model.network", "MLP"], r"^model.network=MLP is ambiguous: use .*fomal.models.MLP"),
        (["--data", "Sinusoid"], r"data=Sinusoid: .* did you mean fomal.data.SinusoidDataModule\?"),
        (["--trainer.logger", "CSVLoger"], r"trainer.logger=CSVLoger: .* did you mean lightning.*CSVLogger"),
        (["--model.train.steps", "x"], r"^model.train.steps=x: expected int\.$"),
        (["--data.shots", "x"], r"^data.shots=x: expected int\.$"),
        (
            ["--model.loss", "torch.nn.HuberLoss"],
            r"^model.loss=torch.nn.HuberLoss: a loss of torch's is written \{class_path: fomal.inner.Elementwise, "
            r"init_args: \{loss: torch.nn.HuberLoss\}\}\.$",
        ),
        (
            ["--model.query_loss={class_path: torch.nn.CrossEntropyLoss}"],
            r"^model.query_loss=.*: a loss of torch's is written fomal.inner.CrossEntropy\.$",
        ),
        (
            ["--model.inner_state", "reste"],
            r"^model.inner_state=reste: expected one of 'carried', 'in_series', 'reset'\.$",
        ),
        (["--config", "{model: {train: {stepz: 3}}}"], r"no option model.train.stepz - did you mean model.train.steps"),
        (["--config", "{data: {init_args: {shotz: 3}}}"], r"no option data.shotz of .* did you mean shots\?"),
        (["--config", "{trainers: {logger: false}}"], r"no option trainers.logger - did you mean trainer.logger\?"),
        (["--config", "{model: ["], r"is not valid YAML"),
        (["--config", "sinusoid/reptil"], r"no shipped config of that name - did you mean sinusoid/reptile"),
        (["--config", "nowhere/x.yaml"], r"no shipped config of that name; the shipped ones are in"),
        (
            ["--config", "{model: {train: 3}}"],
            r"^model.train=3 must be a mapping of steps, batch_size, replacement, reduction\.$",
        ),
        (
            ["--config", "{model: {outer: null}}"],
            r"^model.outer=null must be a mapping of optimizer, schedule, final, ",
        ),
        (["--model.execution=x"], r"^model.execution: Unable to load config 'x'"),
        (["extra"], r"^'extra' is not an option; settings are given as --KEY VALUE\.$"),
    ],
)
def test_mistakes_get_the_nearest_names(args: list[str], message: str, fails) -> None:
    assert re.search(message, fails("fit", *SINE, *args))


def test_missing_settings_are_named(fails) -> None:
    assert fails("fit", "--config", "{model: {train: {steps: 3}}}") == (
        "the following arguments are required: model.network, model.rule, model.inner_optimizer, data"
    )


@pytest.mark.parametrize("option", ["--config", "--ckpt_path", "--data", "--model.network"])
@pytest.mark.parametrize("bomb", [True, False])
def test_aliases_are_not_expanded_without_end(option: str, bomb: bool, tmp_path: Path, fails) -> None:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(["a0: &a0 [x]", *lines]) if bomb else "a: &a [*a]")
    assert "aliases for over" in fails("test", option, str(path))


@pytest.mark.parametrize("brackets", ["[" * 10_000, "{a: " * 10_000])
def test_what_is_nested_without_end_is_named(brackets: str, tmp_path: Path, fails) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(f"model: {brackets}")
    said = "is nested too deeply for a configuration"
    assert fails("fit", "--config", str(path)).startswith(f"--config {path} {said}")
    assert fails("fit", "--data", str(path)).startswith(f"{path} {said}")
    assert fails("fit", "--config", f"{{model: {brackets}").startswith(f"--config {{model: {brackets[:10]}")
    assert fails("fit", "--model.network", brackets).startswith(f"--model.network {said}")
    assert fails("experiment", str(path)).startswith(f"{path} {said}")
    path.rename(tmp_path / "config.yaml")
    (tmp_path / "results.json").write_text("{}")
    assert fails("compare", str(tmp_path), "--out", str(tmp_path / "f.png"), code=1).startswith(
        f"{tmp_path / 'config.yaml'} is damaged: "
    )


def test_a_missing_config_is_not_taken_for_a_file(fails) -> None:
    assert "expected one argument" in fails("fit", "--config")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--model.train.steps=0"],
            "model.train.steps=0 leaves Reptile nothing, which is made of the inner steps: use 1 or more",
        ),
        (["--data.shots=-1"], "shots=-1 must be at least 1."),
        (["--trainer.max_steps=-1"], "trainer.max_steps=-1 leaves the linear outer schedule without an end"),
    ],
)
def test_settings_refused_by_learner_and_data_are_one_line(args: list[str], message: str, fails, tmp_path) -> None:
    quiet = ("--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}")
    assert fails("fit", *SINE, *quiet, "--trainer.callbacks=null", *args, code=1).startswith(message)


def test_the_error_is_the_cause_and_its_traceback_is_a_variable_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SINE, "--model.train.steps=0"])
    assert isinstance(stop.value.__cause__, ValueError)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("FOMAL_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="1"):
        main(["fit", *SINE, "--model.train.steps=0"])
    assert "Traceback" in capsys.readouterr().err


# -- settings that follow from others


def test_what_was_given_is_the_last_of_each_key(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("{network: {class_path: a.Conv, init_args: {ways: 5}}}")
    (tmp_path / "run.yaml").write_text("{model: model.yaml, data: {class_path: b.Data, init_args: {ways: 3, seed: 1}}}")
    config = ["--config", str(tmp_path / "run.yaml")]
    given = Given([*config, "--data.init_args.seed", "2", "--data.ways=4"]).values
    assert given["model.network.ways"] == 5
    assert (given["data.seed"], given["data.ways"]) == (2, 4)
    assert Given([*config, "--data", "Data"]).values["data.seed"] == 1
    assert "data.seed" not in Given([*config, "--data", "Other"]).values
    assert "model.network.ways" not in Given([*config, "--model.network", '{"class_path": "Other"}']).values


@pytest.mark.usefixtures("user_code")
def test_the_network_gets_the_ways_of_the_data_where_it_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {}
    monkeypatch.setattr(
        "fomal.cli.run.FomalCLI.instantiate_classes", lambda cli: built.update(cli.config[cli.verb].as_dict())
    )
    monkeypatch.setattr("fomal.cli.run.FomalCLI.after_instantiate_classes", lambda cli: None)
    monkeypatch.setattr("fomal.cli.run.FomalCLI._run_subcommand", lambda cli, verb: None)
    ways = ("--data", "cli_user_data.WaysData", "--data.ways=7")

    def arguments(*args: str) -> tuple[dict, dict]:
        main(["fit", *SINE, *args])
        return built["model"]["network"]["init_args"], built["data"].get("init_args", {})

    assert arguments(*ways, "--model.network=cli_user_network.NeedsWays")[0]["ways"] == 7
    assert arguments(*ways, "--model.network=cli_user_network.NeedsWays", "--model.network.ways=7")[0]["ways"] == 7
    assert "ways" not in arguments(*ways, "--model.network=cli_user_network.NoWays")[0]
    assert "ways" not in arguments("--model.network=cli_user_network.NoWays")[0]
    assert arguments("--model.network=Conv4", "--model.network.ways=9")[0]["ways"] == 9
    assert arguments("--seed_everything=3")[1]["seed"] == 3
    assert arguments("--seed_everything=3", "--data.seed=3")[1]["seed"] == 3
    assert arguments("--seed_everything=true")[1]["seed"] == built["seed_everything"] > 0
    assert "seed" not in arguments("--data=cli_user_data.SeedlessData")[1]


@pytest.mark.usefixtures("user_code")
@pytest.mark.parametrize("way", ["option", "config"])
def test_a_value_that_a_link_would_ignore_is_refused(way: str, fails) -> None:
    ways = ("--data", "cli_user_data.WaysData", "--data.ways=7", "--model.network", "Conv4")
    wrong = {
        "option": ["--model.network.ways=20"],
        "config": ["--config", "{model: {network: {class_path: fomal.models.Conv4, init_args: {ways: 20}}}}"],
    }[way]
    assert fails("fit", *SINE, *ways, *wrong) == (
        "model.network.ways=20 was given, but it follows data.ways=7: leave it out, or change data.ways."
    )
    wrong = {"option": ["--data.seed=4"], "config": ["--config", "{data: {init_args: {seed: 4}}}"]}[way]
    assert fails("fit", *SINE, "--seed_everything=3", *wrong) == (
        "data.seed=4 was given, but it follows seed_everything=3: leave it out, or change seed_everything."
    )


FOLDER = ("fit", "--config", "image_folder/5way_1shot_reptile")
REPEATED = "{model: {network: {init_args: {ways: 5, in_channels: 3, image_size: 84}}}}"
NESTED = ("--model.network=fomal.models.Classifier", "--model.network.factory=fomal.models.Conv4")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data.image_size=20", "--data.color=gray"], {"image_size": 20, "in_channels": 1}),
        (["--config", "{data: {init_args: {image_size: [20, 30]}}}"], {"image_size": [20, 30], "in_channels": 3}),
        (["--config", REPEATED, "--data.image_size=20", "--data.ways=2"], {"image_size": 20, "in_channels": 3}),
        (["--model.network=fomal.models.ResNet12", "--data.color=gray"], {"in_channels": 1}),
        (
            ["--model.network=fomal.models.MLP", "--data.image_size=[2, 3]", "--data.ways=4"],
            {"in_features": 18, "out_features": 4},
        ),
        ([*NESTED, "--data.color=gray"], {"in_channels": 1, "image_size": 84}),
        (
            [*NESTED, "--model.network.options={in_channels: 3}", "--config", "{data: {init_args: {color: gray}}}"],
            {"options": {"in_channels": 1}},
        ),
        (["--data=SinusoidDataModule", "--model.network=fomal.models.MLP"], {"in_features": 1, "out_features": 1}),
    ],
)
def test_the_sizes_of_a_network_follow_from_the_data(args: list[str], expected: dict, printed) -> None:
    network = printed(*FOLDER, *args)["model"]["network"]["init_args"]
    assert {name: network[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.network.image_size=20"], "model.network.image_size=20 was given, but it follows data.image_size=84"),
        (
            ["--data.color=gray", "--config", REPEATED],
            "model.network.in_channels=3 was given, but it follows data.color",
        ),
        (
            [*NESTED, "--model.network.options={in_channels: 1}"],
            "model.network.options.in_channels=1 was given",
        ),
    ],
)
def test_a_size_that_contradicts_the_data_is_refused(args: list[str], message: str, fails) -> None:
    assert fails(*FOLDER, *args).startswith(message)


# -- printing the configuration


@pytest.mark.parametrize("name", ["sinusoid/reptile", "sinusoid/maml"])
def test_a_printed_config_prints_itself(name: str, tmp_path: Path, printed) -> None:
    args = ("--seed_everything=3", "--trainer.logger=null")
    first = printed("fit", "--config", name, *args)
    assert first["seed_everything"] == 3
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    assert printed("fit", "--config", str(tmp_path / "first.yaml")) == first
    changed = printed("fit", "--config", str(tmp_path / "first.yaml"), "--seed_everything=4")
    assert changed == first | {"seed_everything": 4}


def test_print_config_flags(fails, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *SINE, "--print_config=skip_default"])
    assert "inner_state" not in yaml.safe_load(capsys.readouterr().out)["model"]
    assert fails("fit", *SINE, "--print_config=all").startswith("--print_config=all is unknown: use skip_default")


def test_a_failed_download_is_one_line(fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("fomal.data.omniglot.download_url", no_network)
    options = ["--data.root", str(tmp_path), "--data.download", "true", "--data.cache_dir", str(tmp_path)]
    options += ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    message = fails("fit", "--config", "omniglot/5way_1shot_reptile", *options, code=1)
    assert "could not fetch" in message
    assert "images_background.zip" in message
