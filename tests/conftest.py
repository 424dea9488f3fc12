"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fomal.cli import main
from fomal.engine.tracing import Tracer
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.inner.optimizer import InnerOptimizer
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree
from tests.helpers.episodes import SmallConv, classification_episode
from tests.helpers.launch import launch  # noqa: F401 # a fixture
from tests.helpers.resume import whole  # noqa: F401 # a fixture


def shared_data(name: str) -> Path:
    """The folder `shared/data/<name>` beside the repository; skips the test without it, but fails it in CI."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / name
    if not folder.is_dir():
        reason = f"needs the data set {name}, which is not in ../shared/data/{name} beside the repository"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """The complete Omniglot, as its two zips."""
    return shared_data("omniglot")


@pytest.fixture(scope="session")
def image_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the images of real data sets are decoded once for all tests, those of other processes too."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "image_cache"


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """A hundred images of each class of CIFAR-FS, as a zip."""
    return shared_data("cifar_fs") / "cifar_fs_100.zip"


TRACE = Tracer.__call__


@pytest.fixture(scope="session", autouse=True)
def eager() -> Iterator[None]:
    """Trace nothing in this process: each shape takes seconds, and most tests have shapes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracer, "__call__", lambda self, name, function, *args: function(*args))
        yield


@pytest.fixture(autouse=True)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in tests marked so."""
    if "traced" in request.keywords:
        monkeypatch.setattr(Tracer, "__call__", TRACE)


@pytest.fixture
def episode() -> Episode:
    """A meta-batch of random classification tasks."""
    return classification_episode()


@pytest.fixture
def network() -> nn.Module:
    """A network for it."""
    torch.manual_seed(0)
    return SmallConv().double()


@pytest.fixture(params=["eager", "traced"])
def make_inner(
    request: pytest.FixtureRequest, network: nn.Module, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., InnerLoop]:
    """Builds the inner loops of the meta-batch for an inner optimiser, as users run them and as they are written."""
    is_traced = request.param == "traced"
    if is_traced:
        monkeypatch.setattr(Tracer, "__call__", TRACE)

    def make(optimizer: InnerOptimizer, steps: int = 4, batch: int = 5, **changes: Any) -> InnerLoop:
        phi = tree.detach(dict(network.named_parameters()))
        settings = {
            "objective": Objective(network, vectorize=True, tracer=Tracer(network, True) if is_traced else None),
            "optimizer": optimizer,
            "state": optimizer.init(phi),
            "indices": minibatch_indices(0, 0, episode.number, episode.support_x.shape[1], steps, batch),
            "episode": episode,
        }
        return InnerLoop(**{**settings, **changes})

    return make


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must fail; its one-line message."""

    def run(*args: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fomal: error: ")]
        assert len(lines) == 1
        assert len(lines[0]) < 500  # with the long paths of a test folder
        return lines[0].removeprefix("fomal: error: ")

    return run
