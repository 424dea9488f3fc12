"""A compiled step is the plain one, or is not used."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fomal.inner import SGD, SGLD, Adam
from fomal.inner.compiled import CompiledStep
from fomal.outer import MAML, Reptile
from tests.test_learner import Blobs, assert_same, blob_learner, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fomal")]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_compiled_run_is_the_plain_one_up_to_rounding(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for compiled in (False, True):
        learner = blob_learner(Reptile(), SGD(0.05, momentum=0.5), compiled=compiled)
        data = Blobs(test_tasks=10, eval_tasks_per_batch=10)
        run = trainer(3, precision="64-true")
        with caplog.at_level(logging.WARNING):
            run.fit(learner, datamodule=data)
            run.test(learner, datamodule=data, verbose=False)
        found.append((weights(learner), learner.carried, learner.results["metrics"]))
    assert learner.compiled is not None
    assert learner.compiled.reason == ""
    assert not warnings_of(caplog)
    assert len(learner.compiled._proven) == 2  # the mini-batches of training and of evaluation
    (plain, state, figures), (quick, quick_state, quick_figures) = found
    for name, value in plain.items():
        torch.testing.assert_close(quick[name], value, rtol=1e-9, atol=1e-11)
    for name, value in state["momentum"].items():
        torch.testing.assert_close(quick_state["momentum"][name], value, rtol=1e-8, atol=1e-10)
    assert quick_figures == pytest.approx(figures, rel=1e-7)


def plainly(rule: Any, inner: Any, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    learner = blob_learner(rule, inner, **settings)
    trainer(2).fit(learner, datamodule=Blobs(train_query_shots=2))
    return learner, weights(learner)


@pytest.mark.parametrize("case", ["cannot", "differs"])
def test_what_cannot_be_compiled_or_differs_runs_plainly_and_says_so(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_wrongly(function: Any, **settings: Any) -> Any:
        def compiled(*args: Any) -> Any:
            if case == "cannot":
                raise RuntimeError("no C++ compiler\nand a long story")
            moved, state, gradient, loss = function(*args)
            return moved, state, {name: 1.01 * g for name, g in gradient.items()}, loss

        return compiled

    _, expected = plainly(Reptile(), Adam(0.01))
    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with caplog.at_level(logging.WARNING):
        learner, found = plainly(Reptile(), Adam(0.01), compiled=True)
    assert_same(found, expected)
    reason = "no C++ compiler" if case == "cannot" else r"the compiled gradient is off by 9.9e-03 of its norm"
    assert warnings_of(caplog) == [f"Inner steps of Conv4 are not compiled: {reason}"]
    assert learner.compiled.reason == reason


def test_too_little_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "compile", lambda function, **settings: compiled)
    learner = blob_learner(Reptile(), Adam(0.01), compiled=True, tasks_per_chunk=2)
    with pytest.raises(torch.OutOfMemoryError, match="^2 tasks at a time do not fit: lower model.tasks_per_chunk=2. "):
        trainer(1).fit(learner, datamodule=Blobs())
    assert learner.compiled.reason == ""


@pytest.mark.parametrize(("rule", "inner"), [(MAML(), SGD(0.02)), (Reptile(), SGLD(0.02, 1e-3))])
def test_what_is_not_meant_for_it_is_left_alone(rule: Any, inner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = plainly(rule, inner)
    monkeypatch.setattr(CompiledStep, "__call__", lambda *args: pytest.fail("compiled"))
    assert_same(plainly(rule, inner, compiled=True)[1], expected)
