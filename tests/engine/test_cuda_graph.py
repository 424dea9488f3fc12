"""A replayed meta-iteration is the plain one, or is not used."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fomal.data import SinusoidDataModule
from fomal.engine import cuda_graph as captured
from fomal.inner import SGD, SGLD, Adam
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.tasks.episode import Numbers
from fomal.tasks.sampler import SPLITS
from tests.helpers.groups import merged
from tests.helpers.learners import Blobs, assert_same, blob_learner, sine_learner, trainer, weights
from tests.helpers.poisoned import Poisoned
from tests.helpers.trace import tape, traced

CASES = [
    (Reptile(), Adam(0.01, beta1=0.5)),
    (FOMAML(tail_shots=1), Adam(0.01)),
    (QueryFOMAML(), SGD(0.05, momentum=0.5)),
    (MAML(), Adam(0.01, eps_root=1e-8)),
]
MORE = [
    (Reptile(), SGLD(0.02, 1e-3)),
    (TruncatedMAML(1), SGD(0.05, momentum=0.5)),
    (BinomialMAML(2), SGD(0.05, weight_decay=0.01)),
    (StepCombination([0.5, 1.0, 2.0]), SGD(0.05)),
]


def named(cases: list[Any]) -> Any:
    ids = [f"{type(rule).__name__}-{type(inner).__name__}" for rule, inner in cases]
    return pytest.mark.parametrize(("rule", "inner"), cases, ids=ids)


class Resident(Blobs):
    """Images as they are on a device: varied already, so that drawing them reads no number from a tensor."""

    def setup(self, stage: str | None = None) -> None:
        if not self.classes:
            super().setup(stage)
            self.classes["train"] = self.classes["train"].resident(torch.device("cpu"))


def data_of(kind: str, **settings: Any) -> Any:
    settings = {"train_shots": 4, "train_query_shots": 2, "meta_batch_size": 3, "seed": 3, **settings}
    return Resident(**settings) if kind == "blobs" else SinusoidDataModule(**settings)


def fit(kind: str, rule: Any, inner: Any, steps: int = 3, data: Any = None, run: Any = None, **settings: Any) -> Any:
    if kind == "blobs":
        learner = blob_learner(rule, inner, **merged({"train": {"steps": 2}}, settings))
    else:
        learner = sine_learner(rule, inner, **settings)
    trainer(steps, **(run or {})).fit(learner, datamodule=data or data_of(kind))
    return learner


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fomal")]


def assert_same_run(found: Any, expected: Any) -> None:
    assert_same(weights(found), weights(expected))
    assert (found.carried or {}).keys() == (expected.carried or {}).keys()
    for part, values in (expected.carried or {}).items():
        assert_same(found.carried[part], values)


class Counting:
    """A way to capture, and how many captures and replays there were."""

    def __init__(self, capture: Any) -> None:
        self.capture, self.captures, self.replays = capture, 0, 0

    def __call__(self, function: Any, buffers: Any) -> Any:
        self.captures += 1
        replay = self.capture(function, buffers)

        def counted() -> Any:
            self.replays += 1
            return replay()

        return counted


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The CPU captures too."""
    capture = Counting(tape)
    monkeypatch.setitem(captured.CAPTURES, "cpu", capture)
    return capture


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
@pytest.mark.parametrize("kind", ["sine", "blobs"])
@named(CASES)
def test_replays_are_the_plain_run(rule: Any, inner: Any, kind: str, precision: str, counting: Counting) -> None:
    run = {"precision": precision}
    expected = fit(kind, rule, inner, run=run)
    found = fit(kind, rule, inner, run=run, data=data_of(kind, on_device=True), execution={"cuda_graph": True})
    assert found.captured.reason == ""
    assert (counting.captures, counting.replays) == (1, 2 + 3)  # two prove it, and all are replayed
    assert_same_run(found, expected)


@named(MORE)
def test_replays_are_the_plain_run_of_other_rules(rule: Any, inner: Any, counting: Counting) -> None:
    found = fit("sine", rule, inner, data=data_of("sine", on_device=True), execution={"cuda_graph": True})
    assert (counting.captures, counting.replays, found.captured.reason) == (1, 5, "")
    assert_same_run(found, fit("sine", rule, inner))


@pytest.mark.parametrize("kind", ["sine", "blobs"])
def test_replays_of_episodes_drawn_before_are_the_plain_run(kind: str, counting: Counting) -> None:
    found = fit(kind, MAML(), SGD(0.02), execution={"cuda_graph": True})
    assert (counting.captures, counting.replays, found.captured.reason) == (1, 5, "")
    assert_same_run(found, fit(kind, MAML(), SGD(0.02)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("blobs", {"run": {"precision": "bf16-mixed"}}),
        ("blobs", {"adapt": ["head.*"]}),
        ("blobs", {"inner_state": "reset", "outer": {"optimizer": lambda p: torch.optim.Adam(p, 0.01)}}),
        ("sine", {"execution": {"vectorize": False}, "train": {"replacement": True, "batch_size": 2}}),
    ],
    ids=["autocast", "a part adapted", "reset", "looped"],
)
def test_replays_are_the_plain_run_under_other_settings(kind: str, settings: Any, counting: Counting) -> None:
    case = (QueryFOMAML(), Adam(0.01))
    expected = fit(kind, *case, **settings)
    settings = merged(settings, {"execution": {"cuda_graph": True}})
    found = fit(kind, *case, data=data_of(kind, on_device=True), **settings)
    assert (counting.captures, counting.replays, found.captured.reason) == (1, 5, "")
    assert_same_run(found, expected)


@pytest.mark.parametrize("kind", ["sine", "blobs"])
def test_torchs_own_tracer_agrees(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", traced)
    case = (Reptile(), Adam(0.01))
    settings = {"train": {"steps": 1}}
    found = fit(kind, *case, data=data_of(kind, on_device=True), execution={"cuda_graph": True}, **settings)
    assert found.captured.reason == ""
    assert_same_run(found, fit(kind, *case, **settings))


# -- what must not be replayed


def holding(name: str) -> Any:
    """A capture in which one of the inputs is a constant: the mistake that a graph makes easy."""

    def capture(function: Any, buffers: list[torch.Tensor]) -> Any:
        places = {"number": [0], "phi": [1, 2, 3, 4], "steps": [5], "moment": [6, 7, 8, 9]}[name]
        held = {place: buffers[place].clone() for place in places}
        return tape(lambda b: function([held.get(i, t) for i, t in enumerate(b)]), buffers)

    return capture


def failing(function: Any, buffers: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nand a long story")


def different(function: Any, buffers: Any) -> Any:
    return tape(lambda b: [1.01 * t if t.is_floating_point() else t for t in function(b)], buffers)


OFF = r"a replay is off by \d\.\de[-+]\d\d of the result's norm"


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        *((holding(name), OFF) for name in ("number", "phi", "steps", "moment")),
        (failing, "operation not permitted when stream is capturing"),
        (different, "a replay is off by 1.0e-02 of the result's norm"),
    ],
    ids=["number", "phi", "steps", "moment", "failing", "different"],
)
def test_a_capture_that_fails_or_holds_on_to_an_input_is_not_used(
    capture: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(captured.CAPTURES, "cpu", capture)
    case = (Reptile(), Adam(0.01))
    with caplog.at_level(logging.WARNING):
        found = fit("sine", *case, data=data_of("sine", on_device=True), execution={"cuda_graph": True})
    (line,) = warnings_of(caplog)
    start = "Meta-iterations of MLP are not captured: "
    assert line == start + found.captured.reason
    assert re.fullmatch(reason, found.captured.reason)
    assert_same_run(found, fit("sine", *case))


class Reading(nn.Module):
    """Looks at a value, as no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else 2 * y


DRAWS = "it draws random numbers from torch's generator, as dropout does"


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)), DRAWS),
        (Reading, "a number is read from a tensor"),
    ],
    ids=["dropout", "reading"],
)
def test_a_network_that_is_no_function_of_tensors_runs_plainly_and_says_so(
    network: Any, reason: str, counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    def run(**settings: Any) -> Any:
        torch.manual_seed(1)
        return fit(
            "sine", Reptile(), SGD(0.01), network=network(), **merged({"execution": {"vectorize": False}}, settings)
        )

    expected = run()
    with caplog.at_level(logging.WARNING):
        found = run(data=data_of("sine", on_device=True), execution={"cuda_graph": True})
    assert warnings_of(caplog) == [f"Meta-iterations of {type(found.network).__name__} are not captured: {reason}"]
    assert counting.replays == 0
    assert_same_run(found, expected)


class At(L.Callback):
    """Change a learner before its third meta-iteration."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def on_train_batch_start(self, trainer: Any, learner: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            self.change(learner)


def test_a_changed_setting_is_captured_anew(counting: Counting) -> None:
    def run(**settings: Any) -> Any:
        change = At(lambda learner: setattr(learner.inner_optimizer, "lr", 0.05))
        return fit("sine", Reptile(), SGD(0.01), run={"callbacks": [change]}, **settings)

    expected = run()
    found = run(execution={"cuda_graph": True})
    assert counting.captures == 2
    assert_same_run(found, expected)


CHANGES = {
    "an activation": lambda learner: setattr(learner.network.layers, "2", nn.ReLU()),
    "a frozen weight's memory": lambda learner: setattr(learner.network.layers[1].weight, "data", torch.ones(16, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network_is_captured_anew(change: str, counting: Counting) -> None:
    def run(**settings: Any) -> Any:
        torch.manual_seed(0)
        network = MLP(hidden=(16,))
        network.layers[1].weight.requires_grad_(False)
        callbacks = [At(CHANGES[change])]
        return fit("sine", Reptile(), SGD(0.01), run={"callbacks": callbacks}, network=network, **settings)

    expected = run()
    found = run(execution={"cuda_graph": True})
    assert counting.captures == 2
    assert found.captured.reason == ""
    assert_same_run(found, expected)


def test_endless_kinds_of_meta_batches_do_not_fill_the_memory(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    class Every(L.Callback):
        def on_train_batch_start(self, trainer: Any, learner: Any, *args: Any) -> None:
            learner.inner_optimizer.lr = 0.01 / (1 + trainer.global_step)

    steps = captured.MOST + 2
    with caplog.at_level(logging.WARNING):
        found = fit("sine", Reptile(), SGD(), steps, run={"callbacks": [Every()]}, execution={"cuda_graph": True})
    assert counting.captures == captured.MOST
    (line,) = warnings_of(caplog)
    assert line.endswith("it is given more than 8 kinds of inputs")
    assert_same_run(found, fit("sine", Reptile(), SGD(), steps, run={"callbacks": [Every()]}))


@pytest.mark.parametrize("bad", [{1}, {9, 10}], ids=["first", "replayed"])
def test_a_task_that_is_not_finite_is_still_named(bad: set[int], counting: Counting) -> None:
    step, names = (1, "1") if bad == {1} else (3, "9, 10")
    with pytest.raises(FloatingPointError, match=f"^meta-iteration {step}: .* of training episode {names} is not"):
        fit("sine", Reptile(), SGD(0.01), data=Poisoned(bad), execution={"cuda_graph": True})
    assert counting.replays == (0 if bad == {1} else 2 + 3)


def test_results_are_not_overwritten_by_the_next_replay(counting: Counting) -> None:
    kept: list[Any] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, learner: Any, *args: Any) -> None:
            moment = learner.carried["second_moment"]
            kept.append((moment, {name: t.clone() for name, t in moment.items()}))

    fit("sine", Reptile(), Adam(0.01), run={"callbacks": [Keep()]}, execution={"cuda_graph": True})
    for now, then in kept:
        assert_same(now, then)
    first, second = (next(iter(kept[i][0].values())) for i in (1, 2))
    assert not torch.equal(first, second)


def test_it_is_refused_or_left_out_where_it_cannot_be() -> None:
    with pytest.raises(
        ValueError, match="cuda_graph=True with model.outer.on_nonfinite='skip_task'.* use on_nonfinite: raise"
    ):
        sine_learner(execution={"cuda_graph": True}, outer={"on_nonfinite": "skip_task"})
    with pytest.warns(UserWarning, match="cuda_graph=True has no effect on cpu: meta-iterations run as they are"):
        found = fit("sine", Reptile(), SGD(0.01), execution={"cuda_graph": True})
    assert found.captured is None
    assert_same_run(found, fit("sine", Reptile(), SGD(0.01)))


# -- nothing waits for the device


class NothingOfTheHost(TorchDispatchMode):
    """Refuses tensors of the host, and tensors made of its numbers: both are copied, for which a graph cannot wait."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op is not torch.ops.aten.lift_fresh.default, "a tensor is made of numbers of the host"
        result = op(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, result)):
            assert not (isinstance(t, torch.Tensor) and t.device.type == "cpu"), f"{op} with {t}"
        return result


@pytest.mark.parametrize("kind", ["sine", "blobs"])
@named(CASES + MORE)
def test_a_meta_iteration_needs_nothing_of_the_host(
    rule: Any, inner: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device without data, where reading a number, or choosing by a mask, is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # there is none on that device
    data = data_of(kind)
    data.setup("fit")
    learner = (blob_learner if kind == "blobs" else sine_learner)(
        rule, inner, execution={"vectorize": True, "traced": False}
    )
    learner.trainer = trainer()
    learner.trainer.datamodule = data
    learner.to("meta")
    number = torch.arange(3, device="meta")
    batch = Numbers(number, 0, SPLITS.index("train"))
    data.sample(batch)  # moves the images
    state, phi = learner.begun_state(), learner.initialisation()
    learner.objective._settled = 2, False  # as it is before a capture
    with NothingOfTheHost():
        found = learner.gradient_of(batch, phi, state)
        assert found.is_finite().device.type == "meta"
    assert found.gradient.keys() <= phi.keys()
    assert found.gradient


@pytest.mark.parametrize("mistake", ["copy", "read", "mask"])
def test_waiting_for_the_device_would_be_seen(mistake: str) -> None:
    x = torch.ones(3, device="meta")
    do = {
        "copy": lambda: x[[0, 2]],
        "read": lambda: x.sum().item(),
        "mask": lambda: x[x > 0],
    }
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingOfTheHost():
        do[mistake]()


# -- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = {"accelerator": "gpu", "devices": 1}


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["sine", "blobs"])
def test_episodes_drawn_on_a_gpu_are_those_of_the_cpu(kind: str) -> None:
    data = data_of(kind, shots=2)
    data.setup("fit")
    for split in ("train", "val"):
        expected = data.episodes(split, torch.arange(50))
        found = data.episodes(split, torch.arange(50, device="cuda"))
        assert found.support_x.device.type == "cuda"
        for name, value in expected._asdict().items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():  # the sine's own rounding
                torch.testing.assert_close(getattr(found, name).cpu(), value, rtol=1e-6, atol=1e-6)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(getattr(found, name).cpu(), value)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("on_device", [True, False], ids=["drawn-within", "drawn-before"])
@pytest.mark.parametrize("kind", ["sine", "blobs"])
@named(CASES + MORE)
def test_twenty_replays_on_a_gpu_are_the_plain_run(
    rule: Any, inner: Any, kind: str, on_device: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In float64, where sums in another order differ by rounding that twenty meta-iterations do not magnify."""
    run = {**ON_GPU, "precision": "64-true"}
    expected = fit(kind, rule, inner, 20, run=run)
    found = fit(kind, rule, inner, 20, run=run, data=data_of(kind, on_device=on_device), execution={"cuda_graph": True})
    assert found.captured.reason == ""
    assert not warnings_of(caplog)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-7, atol=1e-9)
    for part, values in (expected.carried or {}).items():
        for name, value in values.items():
            torch.testing.assert_close(found.carried[part][name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_other_precisions_and_compiled_steps_are_captured_on_a_gpu(precision: str, compiled: bool) -> None:
    run = {**ON_GPU, "precision": precision}
    data = data_of("blobs", on_device=True)
    found = fit(
        "blobs", Reptile(), SGD(0.05), 6, run=run, data=data, execution={"cuda_graph": True, "compiled": compiled}
    )
    assert found.captured.reason == ""
    expected = weights(fit("blobs", Reptile(), SGD(0.05), 6, run=run))
    tolerance = 1e-3 if precision == "32-true" else 5e-2
    for name, value in weights(found).items():
        assert (value - expected[name]).norm() <= tolerance * expected[name].norm(), name


def watched(kind: str, before: Any, after: Any) -> Any:
    """A learner with something done around each of its training steps."""
    learner = (blob_learner if kind == "blobs" else sine_learner)(Reptile(), Adam(0.01), execution={"cuda_graph": True})
    step = learner.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        before(batch_idx)
        try:
            step(batch, batch_idx)
        finally:
            after(batch_idx)

    learner.training_step = training_step
    return learner


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", ["sine", "blobs"])
def test_a_replayed_meta_iteration_waits_for_nothing_on_a_gpu(kind: str) -> None:
    strict = []

    def before(batch_idx: int) -> None:
        if batch_idx > 2 and (batch_idx + 1) % 10:  # every tenth looks at what was found
            strict.append(batch_idx)
            torch.cuda.set_sync_debug_mode("error")

    learner = watched(kind, before, lambda _: torch.cuda.set_sync_debug_mode("default"))
    trainer(30, **ON_GPU, log_every_n_steps=1000).fit(learner, datamodule=data_of(kind, on_device=True))
    assert learner.captured.reason == ""
    assert len(strict) == 25


@pytest.mark.gpu
@gpu
def test_memory_does_not_grow_with_replays_on_a_gpu() -> None:
    used = []
    measure = lambda _: used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))  # noqa: E731
    learner = watched("blobs", lambda _: None, measure)
    trainer(60, **ON_GPU).fit(learner, datamodule=data_of("blobs", on_device=True))
    assert learner.captured.reason == ""
    assert used[10] == used[59]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)), DRAWS),
        (Reading, "synchroniz"),
    ],
    ids=["dropout", "reading"],
)
def test_what_a_gpu_cannot_capture_runs_plainly(network: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    def run(**settings: Any) -> Any:
        torch.manual_seed(1)
        run = {**ON_GPU, "precision": "64-true"}
        return fit(
            "sine",
            Reptile(),
            SGD(0.01),
            run=run,
            network=network(),
            **merged({"execution": {"vectorize": False}}, settings),
        )

    with caplog.at_level(logging.WARNING):
        found = run(execution={"cuda_graph": True})
    (line,) = warnings_of(caplog)
    assert reason in line
    for name, value in weights(run()).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-9, atol=1e-12)
