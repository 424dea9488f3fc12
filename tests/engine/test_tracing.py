"""A trace does what the function does, or is not used."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fomal.engine import tracing as traced
from fomal.engine.tracing import Tracer
from fomal.inner import SGD, SGLD, Adam
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.models import MLP, Conv4
from fomal.outer import FOMAML, MAML, QueryFOMAML, Reptile
from fomal.utils.tree import difference
from tests.helpers.learners import Blobs, assert_same, blob_learner, trainer, weights

pytestmark = pytest.mark.traced

TASKS, BATCH = 3, 4


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fomal")]


def users_network() -> nn.Module:
    """Torch's own modules, in forms that have a rule and in others."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding="same", groups=3),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, 4),
    )


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "stride": (lambda: Conv4(4, 2, 8, 5), (2, 8, 8)),
    "pool": (lambda: Conv4(4, 2, 9, 5, downsample="pool", padding="symmetric"), (2, 9, 9)),
    "users": (users_network, (2, 8, 8)),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), MLP(1, 4)), (1,)),
}


def problem(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make().to(dtype)
    params = {n: p.detach() + 0.1 * torch.randn(TASKS, *p.shape, dtype=dtype) for n, p in network.named_parameters()}
    return network, params, torch.randn(TASKS, BATCH, *shape, dtype=dtype), torch.randint(4, (TASKS, BATCH))


def close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for a, b in zip(*(torch.utils._pytree.tree_flatten(t)[0] for t in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_traces_are_the_functions(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    network, params, x, y = problem(name, dtype)
    tracer = Tracer(network)
    plain, quick = Objective(network, True), Objective(network, True, tracer)
    optimizer = Adam(1e-2, eps=1e-2)  # with a small eps rounding decides where gradients are next to zero
    state = {
        "shared": {"steps": torch.tensor(3.0).double()},
        "second_moment": {n: p.square() for n, p in params.items()},
    }
    with caplog.at_level(logging.WARNING):
        for turn in range(3):  # traced, and replayed on other numbers
            x, params = x + 0.1 * turn, {n: p * (1 + 0.1 * turn) for n, p in params.items()}
            close(quick.gradients(params, x, y), plain.gradients(params, x, y), dtype)
            close(quick.losses(params, x, y), plain.losses(params, x, y), dtype)
            close(quick.predict(params, x), plain.predict(params, x), dtype)
            close(quick.predict_inductive(params, x, x[:, :2]), plain.predict_inductive(params, x, x[:, :2]), dtype)
            close(quick.step(optimizer, params, state, x, y, {}), plain.step(optimizer, params, state, x, y, {}), dtype)
    assert not lines(caplog)
    assert len(tracer.ways) == 5


def test_the_gradient_by_the_images_is_never_computed() -> None:
    network, params, x, y = problem("stride", torch.float64)
    objective = Objective(network, True)
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                seen.append(args[-1][:2])
            return func(*args, **(kwargs or {}))

    trace = traced.make_trace(objective.gradients, (params, x, y))
    with Watch():
        trace([*params.values(), x, y])
    assert seen == [[True, True]] * 3 + [[False, True]]
    seen.clear()
    with Watch():
        objective.gradients(params, x, y)
    assert seen == [[True, True]] * 3 + [[False, True]]


@pytest.mark.parametrize("inner", [SGD(0.05, momentum=0.5), Adam(0.01, eps=1e-3), SGLD(0.02, 1e-3)])
@pytest.mark.parametrize("rule", [Reptile(), FOMAML(tail_shots=1), QueryFOMAML(), MAML()])
def test_a_traced_run_is_the_plain_one_up_to_rounding(rule: Any, inner: Any) -> None:
    if rule.differentiates and isinstance(inner, Adam):
        inner = Adam(0.01, eps=1e-3, eps_root=1e-8)
    found = []
    for wanted in (False, None):
        learner = blob_learner(rule, inner, execution={"traced": wanted})
        data = Blobs(test_tasks=10, eval_tasks_per_batch=10, train_query_shots=2)
        run = trainer(3, precision="64-true")
        run.fit(learner, datamodule=data)
        run.test(learner, datamodule=data, verbose=False)
        found.append((weights(learner), learner.carried, learner.results["metrics"], learner.objective.tracer))
    (plain, state, figures, _), (quick, quick_state, quick_figures, tracer) = found
    assert tracer is not None
    assert tracer.is_on
    assert tracer.ways
    for name, value in plain.items():
        torch.testing.assert_close(quick[name], value, rtol=1e-8, atol=1e-9)
    close(quick_state, state, torch.float64)
    assert quick_figures == pytest.approx(figures, rel=1e-6)


def test_a_traced_run_that_goes_on_is_the_one_that_did_not_stop(tmp_path: Path) -> None:
    def fitted(steps: int, ckpt_path: Path | None = None) -> Any:
        learner = blob_learner(FOMAML(tail_shots=1), Adam(0.01), outer={"final": 1.0})
        run = trainer(steps)
        run.fit(learner, datamodule=Blobs(), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return learner

    whole = fitted(4)
    fitted(2)
    resumed = fitted(4, tmp_path / "last.ckpt")
    assert resumed.objective.tracer.ways
    assert_same(weights(resumed), weights(whole))
    assert_same(resumed.carried["second_moment"], whole.carried["second_moment"])


def test_every_autocast_and_mode_has_a_traces_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    network, params, x, y = problem("stride", torch.float32)
    tracer = Tracer(network)
    quick, plain = Objective(network, True, tracer), Objective(network, True)
    expected = quick.gradients(params, x, y)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), caplog.at_level(logging.WARNING):
        found = quick.gradients(params, x, y)[0]
    assert not lines(caplog)
    error, scale = difference(found, expected)
    assert 1e-4 < error / scale < 0.5  # in 16 bits, convolutions too; batch norm over four examples makes more of it
    network.eval()
    close(quick.gradients(params, x, y), plain.gradients(params, x, y), torch.float32)
    assert len(tracer.ways) == 3


class Own(nn.Module):
    """A user's network that does what `unsure` says beside its torch operations."""

    def __init__(self, unsure: str = "") -> None:
        super().__init__()
        self.body, self.unsure = nn.Sequential(nn.Flatten(), nn.Linear(128, 4)), unsure

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() if self.unsure == "python" else 1.0
        noise = torch.randn_like(x) if self.unsure == "torch" else 0.0
        return self.body(x * scale + noise)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("unsure", "wanted", "reason"),
    [
        (
            "",
            None,
            "Own is not known to compute the same each time; model.execution.traced: true says that",
        ),
        ("python", True, "the network draws random numbers"),
        ("torch", True, "the network draws random numbers"),
        ("hook", True, "body has hooks, which would run once only"),
    ],
)
def test_what_is_not_sure_to_be_the_same_each_time_runs_as_it_is_written(
    unsure: str, wanted: bool | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = Own(unsure)
    if unsure == "hook":
        network.body.register_forward_hook(lambda *args: None)
    params = {n: p.detach().expand(TASKS, *p.shape) for n, p in network.named_parameters()}
    x = torch.randn(TASKS, BATCH, 2, 8, 8)
    with caplog.at_level(logging.WARNING):
        objective = Objective(network, True, Tracer(network, wanted))
        for _ in range(2):
            random.seed(0)
            torch.manual_seed(0)
            found = objective.predict(params, x)
            random.seed(0)
            torch.manual_seed(0)
            torch.testing.assert_close(found, Objective(network, True).predict(params, x), rtol=0, atol=0)
    (line,) = lines(caplog)
    assert line.startswith(f"Own runs as it is written, which is slower (same results): {reason}")


def test_a_users_own_network_is_traced_where_it_is_said_to_be_the_same(caplog: pytest.LogCaptureFixture) -> None:
    network = Own()
    tracer = Tracer(network, True)
    params = {n: p.detach().expand(TASKS, *p.shape) for n, p in network.named_parameters()}
    x = torch.randn(TASKS, BATCH, 2, 8, 8)
    with caplog.at_level(logging.WARNING):
        found = Objective(network, True, tracer).predict(params, x)
    close(found, Objective(network, True).predict(params, x), torch.float32)
    assert len(tracer.ways) == 1
    assert not lines(caplog)


@pytest.mark.parametrize("case", ["cannot", "differs", "differs in one task"])
def test_what_cannot_be_traced_or_differs_runs_plainly_and_says_so(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = traced.make_trace

    def wrongly(function: Any, args: Any, compiled: bool = False) -> Any:
        if case == "cannot":
            raise RuntimeError("no such operation\nand a long story")
        replay = honest(function, args, compiled)

        def wrong(leaves: list[Tensor]) -> Any:
            factor = torch.full((len(leaves[0]),), 1.01, dtype=torch.float64)
            if case == "differs in one task":
                factor[1:] = 1
            return torch.utils._pytree.tree_map(
                lambda t: (t * factor.view(-1, *[1] * (t.dim() - 1))).to(t.dtype) if t.dim() else t, replay(leaves)
            )

        return wrong

    def fitted(**settings: Any) -> MetaLearner:
        learner = blob_learner(Reptile(), Adam(0.01), **settings)
        trainer(2).fit(learner, datamodule=Blobs())
        return learner

    expected = weights(fitted(execution={"traced": False}))
    monkeypatch.setattr(traced, "make_trace", wrongly)
    with caplog.at_level(logging.WARNING):
        learner = fitted()
    assert_same(weights(learner), expected)
    reason = "no such operation" if case == "cannot" else "what is traced is off by 1.0e-02 of its norm"
    remedy = "model.execution.traced: false says so beforehand"
    assert lines(caplog) == [f"Conv4 runs as it is written, which is slower (same results): {reason}; {remedy}"]


def test_too_little_memory_is_no_fault_of_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(traced, "make_trace", no_room)
    learner = blob_learner(Reptile(), Adam(0.01), execution={"tasks_per_chunk": 2})
    with pytest.raises(
        torch.OutOfMemoryError, match="^2 tasks at a time do not fit: lower model.execution.tasks_per_chunk=2. "
    ):
        trainer(1).fit(learner, datamodule=Blobs())
    assert learner.objective.tracer is not None
    assert learner.objective.tracer.is_on


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_traces_is_the_function(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("stride", "users"):
        network, params, x, y = problem(name, torch.float64)
        tracer = Tracer(network, None, compiled=True)
        plain, quick = Objective(network, True), Objective(network, True, tracer)
        for turn in range(2):
            args = (SGD(0.1), params, {}, x + turn, y, {})
            close(quick.step(*args), plain.step(*args), torch.float64)
        assert tracer.is_on
        assert len(tracer.ways) == 1
    assert not lines(caplog)
