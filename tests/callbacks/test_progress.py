"""What the progress bar tells, on a terminal and elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from fomal.callbacks import MetaProgressBar
from fomal.data import SinusoidDataModule
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from fomal.utils.terminal import PlainConsole


def trainer(*callbacks: Callback, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults = {"max_steps": 4, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **defaults, **settings})


def run(*callbacks: Callback, **settings: Any) -> L.Trainer:
    torch.manual_seed(0)
    learner = MetaLearner(MLP(hidden=[4]), Reptile(), SGD(0.02), train=InnerSchedule(2), eval=InnerSchedule(2, 5))
    fitting = trainer(*callbacks, **settings)
    fitting.fit(learner, datamodule=SinusoidDataModule(meta_batch_size=2, val_tasks=4))
    return fitting


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("sanity", [0, 1])
def test_lines_where_there_is_no_terminal(sanity: int, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(MetaProgressBar(line_every=0.0), num_sanity_val_steps=sanity)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("meta-iterations")]
    loss = rf"val/loss {done.callback_metrics['val/loss']:.4f}"
    figure = r"(\d+\.\d/s|\d+\.\d\d s each)"
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "2/4", "3/4", "4/4", "4/4"]
    assert re.fullmatch(rf"meta-iterations 1/4  {figure}", lines[0])
    assert re.fullmatch(rf"meta-iterations 2/4  {figure}  val/loss \d+\.\d{{4}}", lines[2])
    assert re.fullmatch(rf"meta-iterations 4/4  {figure}  {loss}", lines[-1])


def test_lines_are_rare_but_for_validations(capsys: pytest.CaptureFixture[str]) -> None:
    run(MetaProgressBar(), val_check_interval=3)
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["3/4", "4/4"]


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_bar_on_a_terminal(sanity: int) -> None:
    bar, out = MetaProgressBar(refresh=0.0), io.StringIO()
    bar._console = Console(file=out, force_terminal=True, width=200)
    done = run(bar, num_sanity_val_steps=sanity)
    text = without_codes(out.getvalue())
    assert "0/4" in text
    figures = f"val/loss {done.callback_metrics['val/loss']:.4f}"
    assert re.search(rf"meta-iterations 4/4 .*/s *\n{figures}", text)
    assert bar._bar is None  # closed


class Slow(Callback):
    """Meta-iterations of 20 ms, validations of 400 ms."""

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(0.02)

    def on_validation_batch_start(self, *args: Any) -> None:
        time.sleep(0.4)


def test_the_rate_leaves_out_validations(capsys: pytest.CaptureFixture[str]) -> None:
    run(MetaProgressBar(), Slow(), max_steps=12, val_check_interval=6)
    rates = [float(re.search(r"  ([\d.]+)/s", line).group(1)) for line in capsys.readouterr().out.splitlines()]
    assert len(rates) == 2
    assert all(12 < rate <= 50 for rate in rates)  # 6 meta-iterations in 520 ms would be 11.5


def test_evaluation_counts_batches(capsys: pytest.CaptureFixture[str]) -> None:
    learner = MetaLearner(MLP(hidden=[4]), Reptile(), SGD(0.02), train=InnerSchedule(2), eval=InnerSchedule(2, 5))
    data = SinusoidDataModule(val_tasks=4, test_tasks=4, eval_tasks_per_batch=2)
    evaluating = trainer(MetaProgressBar(line_every=0.0), inference_mode=False)
    for verb in (evaluating.validate, evaluating.test):
        verb(learner, data, verbose=False)
    evaluating.predict(learner, data)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [re.match(r"batches of tasks (\d)(/2)?  [\d.]+", line).group(1) for line in lines] == ["1", "2"] * 3


def test_disabled_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = MetaProgressBar(refresh=0.0, line_every=0.0)
    bar._console = Console(force_terminal=True)
    bar.disable()
    run(bar)
    assert capsys.readouterr().out == ""
    bar.enable()
    run(bar)
    assert "4/4" in without_codes(capsys.readouterr().out)


TALK = logging.getLogger("talk")
TALK.propagate = False


class Talkative(Callback):
    """Says something in every way there is."""

    def on_train_batch_end(self, *args: Any) -> None:
        TALK.warning("a log")
        print("a print", file=sys.stderr)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_messages_go_above_the_bar_which_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as a terminal does: the bar is there once, at the end, and no message is cut or left out."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr(sys, "__stderr__", out)
    monkeypatch.setattr(TALK, "handlers", [logging.StreamHandler(out)])
    bar = MetaProgressBar(refresh=0.0)
    bar._console = PlainConsole(file=out, force_terminal=True, width=width, soft_wrap=True)
    run(bar, Talkative())
    lines = screen(out.getvalue())
    assert [line.count("a log") + line.count("a print") for line in lines if line.startswith("a ")] == [1] * 8
    (last,) = [line for line in lines if line.startswith("meta")]
    assert len(last) <= width
    assert "/4" in last or width == 40
    assert lines[lines.index(last) + 1].startswith("val/loss")


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after what rich writes to it."""
    lines, row = [""], 0
    for code, rest in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)?([^\x1b\r\n]*)", text):
        if code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code in ("\x1b[2K", "\r"):
            lines[row] = lines[row] if code == "\r" else ""
        lines[row] = rest if rest and code == "\r" else lines[row] + rest
    return [line.rstrip() for line in lines]


def test_the_last_count_is_shown_however_rare_the_updates(capsys: pytest.CaptureFixture[str]) -> None:
    learner = MetaLearner(MLP(hidden=[4]), Reptile(), SGD(0.02), train=InnerSchedule(2), eval=InnerSchedule(2, 5))
    data = SinusoidDataModule(val_tasks=7, test_tasks=7, eval_tasks_per_batch=2)
    evaluating = trainer(MetaProgressBar(), inference_mode=False)
    evaluating.test(learner, data, verbose=False)
    evaluating.predict(learner, data)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [re.match(r"batches of tasks (\d)(/4)?  [\d.]+", line).group(1) for line in lines] == ["4", "4"]
