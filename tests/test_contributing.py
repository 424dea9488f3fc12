"""What CONTRIBUTING.md shows works as it stands there, outside of the package."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fomal.cli import main

TEXT = (Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^`(\w+\.py)`\n\n```python\n(.*?)^```", TEXT, re.M | re.S))
COMMANDS = re.findall(r"^uv run fomal (.+)$", TEXT, re.M)
SHORT = (
    *("--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"),
    "--trainer.enable_progress_bar=false",
)


def test_everything_that_is_shown_is_run() -> None:
    assert len(FILES) == TEXT.count("```python") == len(COMMANDS)
    for name, text in FILES.items():
        assert len(text.splitlines()) < 40
        assert any(re.search(rf"\b{Path(name).stem}\.", command) for command in COMMANDS), f"no command uses {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    cli = main([*shlex.split(command), *SHORT])
    parts = [cli.model.rule, cli.model.loss, *(cli.model.metrics or []), cli.datamodule]
    own = [part for part in parts if type(part).__module__ + ".py" in FILES]
    assert len(own) == 1
    assert cli.model.results["tasks"] > 0
    assert cli.trainer.global_step == 2
