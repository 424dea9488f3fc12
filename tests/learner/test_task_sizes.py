"""Tasks of unequal size and weight: each is computed as it is by itself, and the means are weighted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fomal.analysis.alignment import halves
from fomal.callbacks import AdaptationFigure, EpisodeGrid, PredictionsFile
from fomal.engine.chunking import Chunks
from fomal.inner import SGD, Adam
from fomal.inner.loss import Loss
from fomal.learner.replicas import Replicas
from fomal.learner.side_by_side import SideBySide, optimizer_of_all
from fomal.models import MLP, BatchNorm
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.outer.meta_gradient import mean_over_processes, meta_gradient
from fomal.tasks.datamodule import EpisodeDataModule, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.replicated import ReplicatedDataModule
from fomal.utils.pytree import leaves
from fomal.utils.tree import Tree
from tests.helpers.learners import StopAfter, assert_same, sine_learner, trainer, weights
from tests.helpers.processes import Group

RULES = [Reptile(), FOMAML(), StepCombination([1, 0.5, 2]), QueryFOMAML(), MAML(), TruncatedMAML(1), BinomialMAML(1)]
ORDERS = [QueryFOMAML(), MAML(), TruncatedMAML(0), BinomialMAML(0)]
SIZES = [(7, 3), (4, 5), (7, 3), (9, 2)]
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


def parts(number: int) -> tuple[Tensor, ...]:
    """A task's support and query set, a function of its number."""
    generator = torch.Generator().manual_seed(number)
    found = []
    for n in SIZES[number % len(SIZES)]:
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        found += [x, (x.sum(1, keepdim=True) * (1 + number)).sin()]
    return tuple(found)


def padded(numbers: list[int], weighted: bool = True) -> Episode:
    """With NaN in place of what is not there, which would show in any sum."""
    episode = Episode.of_tasks([parts(number) for number in numbers], torch.tensor(numbers))
    for sets, size in (("support", episode.support_size), ("query", episode.query_size)):
        assert size is not None
        for name in (f"{sets}_x", f"{sets}_y"):
            t = getattr(episode, name)
            t[torch.arange(t.shape[1]) >= size[:, None]] = torch.nan
    return episode._replace(weight=WEIGHTS[torch.tensor(numbers) % 4]) if weighted else episode


def alone(number: int) -> Episode:
    return Episode(*(part[None] for part in parts(number)), number=torch.tensor([number]))


class Ragged(EpisodeDataModule):
    """The tasks of `parts`; their weights where `weighted`."""

    def __init__(self, weighted: bool = True, **settings: Any) -> None:
        super().__init__(meta_batch_size=4, train_query_shots=1, val_tasks=4, test_tasks=6, **settings)
        self.weighted = weighted

    def episodes(self, split: str, number: Tensor) -> Episode:
        return padded(number.tolist(), self.weighted)._replace(seed=self.seed, split=split_index(split))


def network_of(kind: str) -> nn.Module:
    layers = {"norm": [nn.Linear(2, 8), BatchNorm(8), nn.Tanh(), nn.Linear(8, 1)]}
    return nn.Sequential(*layers[kind]) if kind in layers else MLP(2, 1, hidden=[8])


def learner(rule: Any, kind: str, inner: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"train": {"steps": 3, "batch_size": 3}} | settings
    return sine_learner(rule, inner or SGD(0.05), network_of(kind), **settings).double()


CASES = [(rule, kind, None) for rule in RULES for kind in ("norm", "mlp")] + [(MAML(), "norm", 1), (FOMAML(), "mlp", 1)]


@pytest.mark.parametrize(("rule", "kind", "chunk"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_padded_task_says_what_it_says_alone(rule: Any, kind: str, chunk: int | None) -> None:
    made = learner(rule, kind, execution={"tasks_per_chunk": chunk})
    phi, state = made.initialisation(), made.begun_state()
    found = made.gradient_of(padded([0, 1, 2, 3]).check(), phi, state)
    each = [made.gradient_of(alone(number), phi, state) for number in range(4)]
    share = WEIGHTS / WEIGHTS.sum()
    for name, g in found.gradient.items():
        expected = sum(w * one.gradient[name] for w, one in zip(share, each, strict=True))
        torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.losses, sum(w * one.losses for w, one in zip(share, each, strict=True)))
    assert float(found.weight) == pytest.approx(WEIGHTS.mean())


def test_weights_count_in_the_carried_state() -> None:
    made = learner(Reptile(), "mlp", Adam(0.01))
    phi, state = made.initialisation(), made.begun_state()
    found = made.gradient_of(padded([0, 1, 2, 3]), phi, state).state["second_moment"]
    each = [made.gradient_of(alone(number), phi, state).state["second_moment"] for number in range(4)]
    for name, moment in found.items():
        expected = sum(w * one[name] for w, one in zip(WEIGHTS / WEIGHTS.sum(), each, strict=True))
        torch.testing.assert_close(moment, expected, rtol=1e-10, atol=1e-14)


def test_a_weight_of_zero_is_a_task_that_is_not_there() -> None:
    made = learner(MAML(), "mlp")
    phi, state = made.initialisation(), made.begun_state()
    episode = padded([0, 1])._replace(weight=torch.tensor([0.0, 0.7], dtype=torch.float64))
    found, expected = made.gradient_of(episode, phi, state), made.gradient_of(alone(1), phi, state)
    for name, g in found.gradient.items():
        torch.testing.assert_close(g, expected.gradient[name])
    nothing = made.gradient_of(episode._replace(weight=torch.zeros(2)), phi, state)
    assert all(not g.any() for g in nothing.gradient.values())


@pytest.mark.parametrize(
    "rule", [Reptile(), QueryFOMAML(), MAML(), BinomialMAML(1)], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize("chunk", [2, 1])
def test_weights_count_in_each_of_several_runs(rule: Any, chunk: int) -> None:
    runs = [learner(rule, "mlp", SGD(lr, momentum=0.0)) for lr in (0.05, 0.1)]
    episodes = [padded(numbers)._replace(support_size=None, query_size=None) for numbers in ([0, 2], [2, 0])]
    episodes = [episode._replace(weight=WEIGHTS[place : place + 2]) for place, episode in enumerate(episodes)]
    loops = [run.inner_loop(episode, training=True) for run, episode in zip(runs, episodes, strict=True)]
    phi = runs[0].initialisation()
    inner = SideBySide.join(loops, optimizer_of_all([run.inner_optimizer for run in runs]))
    found = meta_gradient(rule, inner, {name: torch.stack([p, p]) for name, p in phi.items()}, False, Chunks(chunk))
    for place, (run, episode) in enumerate(zip(runs, episodes, strict=True)):
        expected = run.gradient_of(episode, phi, run.begun_state())
        for name, g in expected.gradient.items():
            torch.testing.assert_close(found.gradient[name][place], g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.losses[place], expected.losses)


def shares_of(rank: int, path: str) -> None:
    """This process's part of the meta-batch, averaged with the other's."""
    torch.distributed.init_process_group("gloo")
    made = learner(QueryFOMAML(), "norm")
    phi, state = made.initialisation(), made.begun_state()
    found = made.gradient_of(padded([[0, 1], [2, 3]][torch.distributed.get_rank()]), phi, state)
    mean, _ = mean_over_processes(found, torch.zeros(1))
    if torch.distributed.get_rank() == 0:
        torch.save(mean.gradient, path)
    torch.distributed.destroy_process_group()


def test_weights_count_over_processes(tmp_path: Path) -> None:
    made = learner(QueryFOMAML(), "norm")
    phi, state = made.initialisation(), made.begun_state()
    expected = made.gradient_of(padded([0, 1, 2, 3]), phi, state).gradient
    group = Group(2, shares_of, 0, str(tmp_path / "mean.pt"), out=tmp_path)
    assert group.wait() == [0, 0], group.said()
    for name, g in torch.load(tmp_path / "mean.pt").items():
        torch.testing.assert_close(g, expected[name], rtol=1e-10, atol=1e-12)


def test_a_run_on_tasks_of_unequal_size_resumes(tmp_path: Path) -> None:
    straight, begun, resumed = (learner(Reptile(), "norm") for _ in range(3))
    trainer(6, precision="64-true").fit(straight, datamodule=Ragged())
    run = trainer(6, precision="64-true", callbacks=[StopAfter(3)])
    run.fit(begun, datamodule=Ragged())
    run.save_checkpoint(tmp_path / "three.ckpt")
    trainer(6, precision="64-true").fit(resumed, datamodule=Ragged(), ckpt_path=tmp_path / "three.ckpt")
    assert_same(weights(resumed), weights(straight))


@pytest.mark.parametrize("chunk", [None, 1])
def test_an_evaluation_of_padded_tasks_is_that_of_each_alone(chunk: int | None) -> None:
    made = learner(Reptile(), "norm", execution={"tasks_per_chunk": chunk})
    found = made.evaluate(padded([0, 1, 2, 3, 5]))
    assert found.predictions.shape == (5, 5, 1)
    for place, number in enumerate([0, 1, 2, 3, 5]):
        expected = made.evaluate(alone(number))
        torch.testing.assert_close(found.losses[place], expected.losses[0])
        torch.testing.assert_close(found.distance[place], expected.distance[0])
        there = expected.predictions.shape[1]
        torch.testing.assert_close(found.predictions[place, :there], expected.predictions[0])
        assert not found.predictions[place, there:].any()


def test_the_figures_of_a_test_are_weighted_and_its_rows_are_of_what_there_is(tmp_path: Path) -> None:
    made = learner(Reptile(), "norm")
    run = trainer(1, precision="64-true", default_root_dir=tmp_path, callbacks=[PredictionsFile()])
    run.test(made, datamodule=Ragged(), verbose=False)
    losses = torch.stack([made.evaluate(alone(number)._replace(split=2)).losses[0, -1] for number in range(6)])
    weight = WEIGHTS[torch.arange(6) % 4]
    assert made.results["metrics"]["test/loss"] == pytest.approx(float((losses * weight).sum() / weight.sum()))
    run.predict(made, datamodule=Ragged())
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(rows) - 1 == sum(SIZES[number % 4][1] for number in range(6))
    assert "nan" not in "".join(rows)


@pytest.mark.parametrize(
    "rule", [QueryFOMAML(), MAML(), TruncatedMAML(0), BinomialMAML(0)], ids=lambda r: type(r).__name__
)
def test_without_inner_steps_a_rule_with_queries_learns_jointly(rule: Any) -> None:
    """The outer gradient is that of the mean query loss at the initialisation."""
    made = learner(rule, "mlp", train={"steps": 0})
    phi = made.initialisation()
    found = made.gradient_of(padded([0, 1, 2, 3], weighted=False), phi, made.begun_state())

    def mean_loss(params: Tree) -> Tensor:
        losses = []
        for number in range(4):
            _, _, x, y = parts(number)
            losses.append((torch.func.functional_call(made.network, params, x) - y).square().mean())
        return torch.stack(losses).mean()

    gradient, loss = torch.func.grad_and_value(mean_loss)(phi)
    for name, g in gradient.items():
        torch.testing.assert_close(found.gradient[name], g)
    torch.testing.assert_close(found.losses, loss.expand(2))


class OfADict(nn.Module):
    """Sees examples, whose tensors have names, and the task's own tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(3, 1, hidden=[8])

    def forward(self, x: dict[str, Any]) -> dict[str, Tensor]:
        features = torch.cat([x["place"]["left"], x["place"]["right"], x["scale"]], -1)
        return {"value": self.inner(features)}


class NamedError(Loss):
    def __call__(self, forward: Any, x: Any, y: Any) -> Tensor:
        return (forward(x)["value"] - y["value"]).square().flatten(1).mean(1)


class Named(Ragged):
    """The same tasks with inputs and targets by name; the query set has what nobody looks at, too."""

    def episodes(self, split: str, number: Tensor) -> Episode:
        episode = super().episodes(split, number)
        support, query = (
            {"place": {"left": x[..., :1], "right": x[..., 1:]}} for x in (episode.support_x, episode.query_x)
        )
        query["place"]["more"] = torch.zeros(*episode.query_y.shape[:2], 2, dtype=torch.int64)
        support_y, query_y = ({"value": y} for y in (episode.support_y, episode.query_y))
        task = {"scale": number[:, None].double()}
        return episode._replace(support_x=support, query_x=query, support_y=support_y, query_y=query_y, task=task)


class Joined(Ragged):
    """The same tasks in one tensor."""

    def episodes(self, split: str, number: Tensor) -> Episode:
        episode = super().episodes(split, number)
        x, q = (
            torch.cat([x, number[:, None, None].double().expand(*x.shape[:2], 1)], -1)
            for x in (episode.support_x, episode.query_x)
        )
        return episode._replace(support_x=x, query_x=q)


def test_tensors_by_name_and_of_the_task_are_as_one_tensor(tmp_path: Path) -> None:
    found = []
    for data, network, loss in ((Named(), OfADict(), NamedError()), (Joined(), MLP(3, 1, hidden=[8]), None)):
        torch.manual_seed(0)
        for p in network.parameters():
            nn.init.normal_(p, std=0.3)
        made = sine_learner(MAML(), SGD(0.02), network, loss=loss, train={"steps": 2, "batch_size": 3}).double()
        run = trainer(3, precision="64-true", default_root_dir=tmp_path, callbacks=[PredictionsFile()])
        run.fit(made, datamodule=data)
        run.test(made, datamodule=data, verbose=False)
        if loss is not None:
            run.predict(made, datamodule=data)
        found.append((list(weights(made).values()), made.results["metrics"]))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][1] == pytest.approx(found[1][1])
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[1].split(",")[:3] == ["0", "0", "value.0"]


def test_what_knows_equal_tasks_alone_says_so() -> None:
    made, episode = learner(Reptile(), "mlp"), padded([0, 1])
    with pytest.raises(ValueError, match=r"may be of unequal size: take the groups of Episode.by_size\(\)"):
        made.inner_loop(episode, training=True)
    for wrong in (episode, Named().episodes("train", torch.arange(2))):
        with pytest.raises(ValueError, match="^gradient alignment needs tasks of equal size, whose inputs and targets"):
            halves(wrong)
    made, data = Replicas([learner(Reptile(), "mlp") for _ in range(2)]), ReplicatedDataModule(Ragged(), [0, 1])
    with pytest.raises(ValueError, match="unequal size do not work with replicas yet: train runs one by one"):
        trainer(1, precision="64-true").fit(made, datamodule=data)


def test_a_run_with_every_drawing_goes_on(tmp_path: Path, recwarn: Any) -> None:
    for data, network, loss in ((Ragged(), network_of("mlp"), None), (Named(), OfADict(), NamedError())):
        made = sine_learner(Reptile(), SGD(0.02), network, loss=loss, train={"batch_size": 3}).double()
        drawings = [AdaptationFigure(), EpisodeGrid(), PredictionsFile()]
        run = trainer(1, precision="64-true", default_root_dir=tmp_path, callbacks=drawings, val_check_interval=1)
        run.fit(made, datamodule=data)
    assert not [w for w in recwarn if "goes on without" in str(w.message)]


def test_a_separate_tail_of_unequal_classes_is_refused() -> None:
    y = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    x = torch.rand(2, 4, 2, dtype=torch.float64)
    episode = Episode(x, y, x, y, torch.arange(2), 2, support_size=torch.tensor([4, 3]))
    made = sine_learner(FOMAML(tail_shots=1), SGD(0.1), MLP(2, 2, hidden=[8])).double()
    with pytest.raises(ValueError, match="^tail_shots=1 keeps examples of each class, but Episode.support_size"):
        made.gradient_of(episode, made.initialisation(), made.begun_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"support_size": torch.tensor([1, 8])}, r"support_size=\[1, 8\] must be from 1 to 7"),
        ({"support_size": torch.tensor([0, 7])}, r"support_size=\[0, 7\] must be from 1 to 7"),
        (
            {"query_size": torch.tensor([3.0, 1.0])},
            r"query_size has shape \(2,\) and torch.float32: give a tensor \(2,\)",
        ),
        ({"weight": torch.tensor([1.0])}, r"weight has shape \(1,\) and torch.float32: give a tensor \(2,\)"),
        ({"weight": torch.tensor([1.0, -1.0])}, r"weight=\[1.0, -1.0\] must be finite and not negative"),
        ({"weight": torch.tensor([1, 2])}, "weight has shape .* give a tensor .* of torch.float32"),
        ({"task": {"a": torch.zeros(2)}}, "task goes to the network beside inputs that are dicts"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Episode.{message}"):
        padded([0, 1])._replace(**changes).check()


def test_labels_in_the_padding_are_none() -> None:
    y = torch.tensor([[0, 1, -7], [1, 0, 1]])
    x = torch.zeros(2, 3, 4)
    whole = Episode(x, y, x, y, torch.arange(2), 2, support_size=torch.tensor([2, 3]), query_size=torch.tensor([2, 3]))
    assert whole.check() is whole
    with pytest.raises(ValueError, match="label -7"):
        whole._replace(query_size=None).check()
    (_, small), (places, large) = whole.by_size()
    assert (small.support_examples, large.query_examples, places.tolist()) == (2, 3, [1])
    assert all(t.shape[1] == 2 for t in leaves(small.support_x))
