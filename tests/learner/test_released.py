"""The released run, named in its settings: a plain loop that does what the released code does, in float64.

A mini-batch's losses are summed; the tasks of a meta-batch run one after the other, with one state of TensorFlow 1's
Adam, which an evaluation begins from and leaves as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fomal.cli import main
from fomal.inner import SGD, Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.learner.settings import EvalSchedule, InnerSchedule
from fomal.models import Conv4
from fomal.outer import FOMAML, OuterRule, QueryFOMAML, Reptile
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils.tree import Tree
from tests.helpers.episodes import classification_episode
from tests.helpers.learners import sine_learner

LR, BETA2, EPS = 1e-2, 0.999, 1e-3  # an eps that shows


class TensorFlowAdam:
    """tf.train.AdamOptimizer with beta1 = 0, of parameters in place: its documentation's formulas."""

    def __init__(self, params: Tree) -> None:
        self.v, self.power = {name: torch.zeros_like(p) for name, p in params.items()}, BETA2

    def step(self, params: Tree, gradients: Tree) -> None:
        lr_t = LR * (1 - self.power) ** 0.5
        for name, g in gradients.items():
            self.v[name] = BETA2 * self.v[name] + (1 - BETA2) * g * g
            params[name] -= lr_t * g / (self.v[name].sqrt() + EPS)
        self.power *= BETA2


def learner(rule: OuterRule, **settings: Any) -> MetaLearner:
    torch.manual_seed(0)
    network = Conv4(3, image_size=9, filters=4).double()
    schedules = {
        "train": InnerSchedule(3, 6, reduction="sum"),
        "eval": EvalSchedule(4, 3, reduction="sum"),
        "inner_state": "in_series",
    }
    return MetaLearner(network, rule, Adam(LR, eps=EPS, epsilon="tensorflow"), **{**schedules, **settings})


def steps(network: Any, params: Tree, adam: TensorFlowAdam, episode: Episode, task: int, k: int, batch: int) -> Tree:
    """Adapt, in place; the parameters before the last step."""
    stream = episode.seed, episode.split, episode.number[task : task + 1]
    before: Tree = {}
    for index in minibatch_indices(*stream, episode.support_examples, k, batch):
        x, y = episode.support_x[task][index[0]], episode.support_y[task][index[0]]

        def loss(params: Tree, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(network, params, x), y, reduction="sum")

        before = {name: p.clone() for name, p in params.items()}
        adam.step(params, torch.func.grad(loss)(params))
    return before


@pytest.mark.parametrize("rule", [Reptile(), FOMAML()], ids=lambda rule: type(rule).__name__)
def test_the_released_run_is_a_plain_loop(rule: OuterRule) -> None:
    made = learner(rule)
    phi = made.initialisation()
    adam = TensorFlowAdam(phi)
    for meta_iteration in range(2):
        episode = classification_episode(seed=meta_iteration)._replace(number=torch.arange(4) + 4 * meta_iteration)
        found = made.gradient_of(episode, phi, made.begun_state())
        total = {name: torch.zeros_like(p) for name, p in phi.items()}
        for task in range(4):
            params = {name: p.clone() for name, p in phi.items()}
            before = steps(made.network, params, adam, episode, task, 3, 6)
            begun = before if isinstance(rule, FOMAML) else phi
            total = {name: t + (begun[name] - params[name]) / 4 for name, t in total.items()}
        for name, t in total.items():
            torch.testing.assert_close(found.gradient[name], t, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.state["second_moment"][name], adam.v[name], rtol=1e-9, atol=1e-14)
        made.carried = found.state
    result = made.evaluate(episode)
    for task in range(4):
        own = TensorFlowAdam(phi)
        own.v, own.power = dict(adam.v), adam.power
        params = {name: p.clone() for name, p in phi.items()}
        steps(made.network, params, own, episode, task, 4, 3)
        logits = torch.func.functional_call(made.network, params, episode.query_x[task])
        torch.testing.assert_close(result.logits_transductive[task], logits, rtol=1e-8, atol=1e-10)
    defaults = learner(rule, inner_state="carried").gradient_of(episode, phi, made.begun_state())
    assert any(not torch.allclose(defaults.gradient[name], found.gradient[name]) for name in phi)


def test_a_query_loss_is_a_mean_all_the_same() -> None:
    made, mean = learner(QueryFOMAML()), learner(QueryFOMAML(), train=InnerSchedule(0, 6))
    none = learner(QueryFOMAML(), train=InnerSchedule(0, 6, reduction="sum"))
    episode, phi = classification_episode(), made.initialisation()
    found, expected = (one.gradient_of(episode, phi, one.begun_state()) for one in (none, mean))
    for name, g in expected.gradient.items():
        assert torch.equal(found.gradient[name], g)
    assert made.gradient_of(episode, phi, made.begun_state()).losses.isfinite().all()


def test_torchs_epsilon_is_the_default_and_others_are_refused() -> None:
    assert Adam().epsilon == "torch"
    with pytest.raises(ValueError, match="epsilon='keras'"):
        Adam(epsilon="keras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model.train or model.eval: reduction='max'"):
        InnerSchedule(reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inner_state=in_series does not work with replicas yet"):
        Replicas([sine_learner(Reptile(), SGD(0.1), inner_state="in_series") for _ in range(2)])


def test_a_run_in_series_says_so_in_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adam = ("--model.inner_optimizer=fomal.inner.Adam", "--model.inner_optimizer.init_args.epsilon=tensorflow")
    options = ("--model.inner_state=in_series", "--model.train.reduction=sum", "--data.val_tasks=4", *adam)
    main(["fit", "--config", "sinusoid/reptile", "--trainer.max_steps=2", *options])
    saved = torch.load("runs/sinusoid/reptile/version_0/checkpoints/last.ckpt", weights_only=True)["fomal"]
    assert saved["settings"]["inner_state"] == "in_series"
    assert saved["settings"]["train"]["reduction"] == "sum"
    assert saved["carried"]["second_moment"]
