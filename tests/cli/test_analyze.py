"""The verb analyze: what it reports of a config or a checkpoint, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fomal.cli import main
from tests.helpers.sine import tiny_model

PNG = b"\x89PNG"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fomal.analysis.report.GROUPS", 4)  # fewer steps of the jackknife, at the same figures
    path = tmp_path / "config.yaml"
    data = {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"train_shots": 20}}
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False}
    model = tiny_model() | {"train": {"steps": 3, "batch_size": 5}}
    path.write_text(yaml.safe_dump({"seed_everything": 0, "model": model, "data": data, "trainer": trainer}))
    return path


def analyze(*args: str) -> dict:
    main(["analyze", "--tasks", "30", *args])
    return json.loads(Path("analysis/analysis.json").read_text())


def test_a_config_is_analysed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyze("--config", str(config))
    assert (found["terms"]["lr"], found["terms"]["tasks"], found["terms"]["batches"]) == (0.02, 30, 3)
    rules = found["limit"]["rules"]
    theory = {name: (c["avg_grad_theory"], c["avg_grad_inner_theory"]) for name, c in rules.items()}
    assert theory["Reptile"] == (3, 3)
    assert theory["MAML"] == (1, 4)
    assert theory["FOMAML"] == theory["QueryFOMAML"] == (1, 2)
    for name, c in rules.items():
        assert c["avg_grad"][0] == pytest.approx(c["avg_grad_theory"], rel=1e-2)
        assert c["avg_grad_inner"][0] == pytest.approx(c["avg_grad_inner_theory"], rel=0.2)
        assert found["slopes"][name] == pytest.approx(2, abs=0.05)
    assert found["alphas"][-1] / found["alphas"][0] == pytest.approx(100)
    assert Path("analysis/taylor.png").read_bytes().startswith(PNG)
    out = capsys.readouterr().out
    assert "30 tasks, 3 mini-batches each" in out
    assert "BinomialMAML(order=1)" in out


def test_a_checkpoint_brings_its_weights(config: Path) -> None:
    before = analyze("--config", str(config))
    main(["fit", "--config", str(config), "--trainer.max_steps", "30"])
    ckpt = next(Path("runs").rglob("last.ckpt"))
    after = analyze("--ckpt_path", str(ckpt))
    assert after["checkpoint"] == str(ckpt)
    assert after["terms"]["avg_grad"] != before["terms"]["avg_grad"]
    assert len(list(Path("analysis").glob("*.json"))) == 2  # the earlier one is kept
    weights = torch.load(ckpt, weights_only=True)["state_dict"]
    again = main(["analyze", "--tasks", "30", "--ckpt_path", str(ckpt)]).model.state_dict()
    for name, value in weights.items():
        assert torch.equal(again[name].to(value.dtype), value)


def test_the_configs_own_rule_is_compared_too(config: Path) -> None:
    combination = ["--model.rule", "StepCombination", "--model.rule.weights", "[0,1,1]"]
    rules = analyze("--config", str(config), *combination)["limit"]["rules"]
    own = rules["StepCombination of the config"]
    assert (own["avg_grad_theory"], own["avg_grad_inner_theory"]) == (2, 3)
    rules = analyze("--config", str(config), *combination, "--batches", "4")["limit"]["rules"]
    assert len(rules) == 6  # its three weights fit three mini-batches alone


def test_what_the_inner_loop_leaves_alone_is_no_part_of_it(config: Path) -> None:
    maml = ["--config", str(config), "--model.rule", "MAML", "--batches", "3"]
    whole = analyze(*maml)
    main(["analyze", "--tasks", "30", *maml, "--model.adapt", "[layers.3.*]", "--out", "head"])
    head = json.loads(Path("head/analysis.json").read_text())
    assert 0 < head["terms"]["avg_grad"][0] < whole["terms"]["avg_grad"][0]
    assert head["slopes"]["MAML"] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tasks", "2"), "tasks=2 must be at least 3"),
        (("--batches", "1"), "batches=1 must be at least 2"),
        (("--lr", "-1"), "lr=-1.0 must not be negative"),
        (("--lr", "0"), "lr=0.0 must be above 0"),
        (("--model.train.batch_size", "21"), "batch_size=21 must be from 1 to 20"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    args: tuple[str, ...], message: str, config: Path, fails: Callable[..., str]
) -> None:
    assert message in fails("analyze", "--config", str(config), *args, code=1)
    assert not Path("analysis").exists()


def test_a_misspelt_option_is_named(config: Path, fails: Callable[..., str]) -> None:
    assert "did you mean --tasks" in fails("analyze", "--config", str(config), "--task", "5")
