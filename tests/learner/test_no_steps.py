"""An evaluation without inner steps: how good the initialisation is as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fomal.cli import main

DATA = ("--data.meta_batch_size=2", "--data.val_tasks=5", "--data.test_tasks=5")


def test_a_run_is_judged_before_adaptation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test of some steps says of the loss before the first is what a test of none says; it is in checkpoints."""
    monkeypatch.chdir(tmp_path)
    run = Path("runs/sinusoid/reptile/version_0")
    main(["fit", "--config", "sinusoid/reptile", "--trainer.max_steps=2", "--model.eval.steps=0", *DATA])
    main(["test", "--ckpt_path", str(run)])
    none = json.loads((run / "results.json").read_text())["metrics"]
    main(["test", "--ckpt_path", str(run), "--model.eval.steps=3"])
    some = json.loads((run / "results.json").read_text())["metrics"]
    assert none["test/loss"] == none["test/loss_before"]
    assert none["test/loss_before"] == pytest.approx(some["test/loss_before"], rel=1e-6)
    assert none["test/distance"] == 0
    assert some["test/distance"] > 0
