"""Memory: that of a run, of a rule, and of the chunks that fit into it."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks import SaveLast
from fomal.data import SinusoidDataModule
from fomal.engine import chunking as memory
from fomal.engine.chunking import Chunks, free_bytes, peak_bytes, task_bytes
from fomal.evaluation.protocols import classify
from fomal.inner import SGD, Adam
from fomal.inner.loop import InnerLoop
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, QueryFOMAML, Reptile
from fomal.outer.meta_gradient import meta_gradient
from tests.helpers.groups import merged
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer
from tests.helpers.processes import Group

STEPS = 5000
WARM = 2000  # meta-iterations until caches and arenas have their size


class Resident(Callback):
    """Notes the resident memory of this process, in MiB."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % 20 == 0:
            # Without the pages of libraries, which come in as they are first used.
            line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
            self.seen.append((trainer.global_step, int(line.split()[1]) / 1024))


def train(folder: Path) -> None:
    resident = Resident()
    learner = sine_learner(inner=Adam(0.01), outer={"on_nonfinite": "skip_task"})
    callbacks = [resident, SaveLast(250)]
    logger = CSVLogger(folder, name="", version="run")
    settings = {"callbacks": callbacks, "logger": logger, "log_every_n_steps": 10, "val_check_interval": 250}
    data = SinusoidDataModule(val_tasks=20)
    trainer(STEPS, enable_checkpointing=True, **settings).fit(learner, datamodule=data)
    torch.save(resident.seen, folder / "seen.pt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resident_memory_has_no_slope(tmp_path: Path) -> None:
    """With its logging, validation and checkpoints."""
    group = Group(1, train, tmp_path, out=tmp_path)
    assert group.wait(800) == [0], group.said()
    step, memory = np.array([row for row in torch.load(tmp_path / "seen.pt") if row[0] >= WARM]).T
    a, b = np.triu_indices(len(step), len(step) // 2)
    slopes = 1000 * (memory[b] - memory[a]) / (step[b] - step[a])  # Theil and Sen: a single jump does not count
    low, slope, high = np.quantile(slopes, [0.025, 0.5, 0.975])
    print(f"{slope:.3f} ({low:.3f} to {high:.3f}) MiB per 1,000 meta-iterations, at {memory[-1]:.0f} MiB")
    # A copy of this small network's parameters, kept each time, would be 5.
    assert low <= 0 or slope < 0.2, f"memory grows by {slope:.3f} MiB in 1,000 meta-iterations"


FIRST_ORDER = [Reptile(), FOMAML(), QueryFOMAML()]
RULES = [*FIRST_ORDER, MAML()]


def inner_loop(learner: Any, tasks: int, training: bool = True) -> tuple[InnerLoop, Any]:
    """The inner loops of a number of tasks, and the initialisation."""
    is_sine = isinstance(learner.network, MLP)
    data: Any = SinusoidDataModule(train_query_shots=5) if is_sine else Blobs(train_query_shots=2)
    data.setup("fit")
    episode = data.on_after_batch_transfer(data.episodes("train", torch.arange(tasks)), 0)
    return learner.inner_loop(episode, training), learner.initialisation()


def wide_learner(*args: Any, **settings: Any) -> Any:
    """Of sine waves, with the paper's network."""
    return sine_learner(*args, **{"network": MLP(), **settings})


def peak(rule: Any, tasks: int = 4, make: Any = wide_learner, chunks: Chunks | None = None, **settings: Any) -> int:
    learner = make(rule, Adam(0.01, eps_root=1e-8), **merged({"execution": {"vectorize": True}}, settings))
    inner, phi = inner_loop(learner, tasks)
    meta_gradient(rule, inner, phi, skip=False, chunks=chunks)  # what is traced takes more at its first use
    return peak_bytes(lambda: meta_gradient(rule, inner, phi, skip=False, chunks=chunks))


def name(value: Any) -> str:
    return value.__name__ if callable(value) and hasattr(value, "__name__") else type(value).__name__


@pytest.mark.parametrize("make", [wide_learner, blob_learner], ids=name)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_the_peak_is_the_allocators(rule: Any, make: Any) -> None:
    """Beside what torch's profiler hears of every allocation, those within operations too."""
    inner, phi = inner_loop(make(rule, SGD(0.01), execution={"vectorize": True, "traced": False}), 4)
    gc.collect()  # what earlier tests have left is not freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rule(inner, phi)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert peak_bytes(lambda: rule(inner, phi)) == pytest.approx(np.cumsum(sizes).max(), rel=0.1)


@pytest.mark.parametrize("make", [wide_learner, blob_learner], ids=name)
@pytest.mark.parametrize("rule", FIRST_ORDER, ids=name)
def test_memory_of_first_order_rules_does_not_grow_with_the_inner_steps(rule: Any, make: Any) -> None:
    """But for a loss of each step and task."""
    few, many = (peak(rule, make=make, train={"steps": steps}) for steps in (5, 50))
    assert many == pytest.approx(few, rel=0.03)


@pytest.mark.parametrize("make", [wide_learner, blob_learner], ids=name)
def test_memory_of_maml_grows_with_the_inner_steps(make: Any) -> None:
    few, many = (peak(MAML(), make=make, train={"steps": steps}) for steps in (2, 20))
    assert many > 5 * few


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_memory_of_chunks_is_that_of_a_chunk(rule: Any) -> None:
    whole, chunked, alone = (
        peak(rule, tasks, blob_learner, chunks) for tasks, chunks in ((16, None), (16, Chunks(2)), (2, None))
    )
    assert chunked < whole / 4
    assert chunked < 1.5 * alone  # beside it is the mean


@pytest.mark.traced
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
@pytest.mark.parametrize("make", [wide_learner, blob_learner], ids=name)
@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_task_takes_its_share_of_the_peak(rule: Any, make: Any, vectorize: bool) -> None:
    inner, phi = inner_loop(make(rule, SGD(0.01), execution={"vectorize": vectorize}), 8)
    estimate = task_bytes(inner, lambda part: rule(part, phi))
    rule(inner, phi)  # what is traced takes more at its first use
    # Of what is traced too much: an estimate is of functions as they are written, which keep more.
    assert 0.5 <= estimate / (peak_bytes(lambda: rule(inner, phi)) / 8) <= 2.5


def test_in_evaluation_three_steps_show_what_all_take() -> None:
    inner, phi = inner_loop(blob_learner(eval={"steps": 30}), 8, training=False)
    whole = peak_bytes(lambda: classify(inner, phi))
    assert 0.8 <= task_bytes(inner, lambda part: classify(part, phi), steps=3) / (whole / 8) <= 1.2


def test_an_estimate_leaves_no_trace() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    learner = sine_learner(QueryFOMAML(), Adam(0.01), network)
    data = SinusoidDataModule(train_query_shots=5)
    inner, phi = learner.inner_loop(data.episodes("train", torch.arange(4)), training=True), learner.initialisation()
    before, state = torch.get_rng_state(), {part: dict(values) for part, values in inner.state.items()}
    versions = [t._version for t in [*phi.values(), *inner.state["second_moment"].values()]]
    assert task_bytes(inner, lambda part: learner.rule(part, phi)) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(inner.state[part][name] is value for part in state for name, value in state[part].items())
    assert [t._version for t in [*phi.values(), *inner.state["second_moment"].values()]] == versions


class Limited(Reptile):
    """Notes how many tasks it runs at once, and finds no memory for more than `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.seen: list[int] = []

    def __call__(self, inner: InnerLoop, start: Any) -> Any:
        self.seen.append(inner.episode.tasks)
        if inner.episode.tasks > self.most:
            raise torch.OutOfMemoryError("no room. Tried to allocate 2 GiB.\nand more")
        return super().__call__(inner, start)


def test_as_many_tasks_as_fit_into_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    inner, phi = inner_loop(blob_learner(), 8)
    needed = task_bytes(inner, lambda part: Reptile()(part, phi))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 6.5 * needed)
    rule, chunks = Limited(8), Chunks()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            meta_gradient(rule, inner, phi, skip=False, chunks=chunks)
    assert rule.seen == [1, *[3, 3, 2] * 2]  # one task, once, to see what it takes
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fomal.engine.chunking"]
    mib = 2**20
    assert line == (
        f"adapting 3 of 8 training tasks at a time: a task takes about {needed / mib:.1f} MiB and "
        f"{6.5 * needed / mib:.1f} MiB are free; set model.execution.tasks_per_chunk to choose"
    )
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0.0)
    meta_gradient(rule, inner, phi, skip=False, chunks=Chunks())
    assert rule.seen[7:] == [1] * 9


@pytest.mark.parametrize("free", [1e9, float("inf")])
def test_all_tasks_at_once_where_they_fit(free: float, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    inner, phi = inner_loop(sine_learner(), 8)
    rule = Limited(8)
    found = meta_gradient(rule, inner, phi, skip=False, chunks=Chunks())
    assert rule.seen == ([1, 8] if free == 1e9 else [8])
    assert not caplog.records
    for name, value in meta_gradient(rule, inner, phi, skip=False).gradient.items():
        assert torch.equal(found.gradient[name], value)


def test_chunks_that_do_not_fit_after_all_are_halved(caplog: Any) -> None:
    inner, phi = inner_loop(sine_learner(), 16)
    rule, chunks = Limited(5), Chunks()
    with caplog.at_level(logging.WARNING):
        found = meta_gradient(rule, inner, phi, skip=False, chunks=chunks)
    assert rule.seen == [1, 16, 8, 4, 4, 4, 4]
    lines = [record.getMessage() for record in caplog.records if record.name == "fomal.engine.chunking"]
    assert lines == [f"{n} training tasks at a time do not fit into memory: going on with {n // 2}" for n in (16, 8)]
    for name, value in Reptile()(inner, phi)[0].items():
        torch.testing.assert_close(found.gradient[name], value, rtol=1e-4, atol=1e-7)
    meta_gradient(rule, inner, phi, skip=False, chunks=chunks)
    assert rule.seen[7:] == [4, 4, 4, 4]


def test_what_does_not_fit_says_what_to_do() -> None:
    inner, phi = inner_loop(sine_learner(), 8)
    message = "^4 tasks at a time do not fit: lower model.execution.tasks_per_chunk=4. "
    message += r"\(no room. Tried to allocate 2 GiB.\)$"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        meta_gradient(Limited(2), inner, phi, skip=False, chunks=Chunks(4))
    for chunks in (Chunks(), Chunks(1)):
        with pytest.raises(torch.OutOfMemoryError, match="^one task alone does not fit: adapt with smaller mini-b"):
            meta_gradient(Limited(0), inner, phi, skip=False, chunks=chunks)


def test_a_chunk_has_a_task() -> None:
    with pytest.raises(ValueError, match=r"^model.execution.tasks_per_chunk=0 must be at least 1\.$"):
        sine_learner(execution={"tasks_per_chunk": 0})


def test_without_linux_no_limit_is_known(tmp_path: Path) -> None:
    assert memory._system_bytes(tmp_path) == float("inf")
    assert free_bytes(torch.device("meta")) == float("inf")


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_bytes", lambda root: 800.0)
    assert free_bytes(torch.device("cpu")) == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 200
