"""Adapting a part of a network in the inner loop."""

from __future__ import annotations

import warnings

import pytest
import torch
import yaml

from fomal.cli import main
from fomal.inner import SGD, SGLD, Adam
from fomal.models import Conv4
from fomal.models.parameters import matching
from fomal.outer import FOMAML, MAML, QueryFOMAML, Reptile, StepCombination
from tests.helpers.learners import Blobs, StopAfter, assert_same, blob_learner, trainer, weights
from tests.helpers.oracle import loss_of
from tests.helpers.sine import tiny_model

HEAD = {"head.weight", "head.bias"}


def moved(rule, **settings):
    """The names of the parameters that a short run changes."""
    learner = blob_learner(rule, inner=SGD(0.1), **settings)
    before = weights(learner)
    trainer(2).fit(learner, datamodule=Blobs(train_query_shots=2))
    return {name for name, value in weights(learner).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("rule", [Reptile(), QueryFOMAML(), MAML()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(
    ("adapt", "chosen"),
    [
        (["head.*"], lambda name: name in HEAD),
        (["*", "!head.*"], lambda name: name not in HEAD),
        (["*.norm.*"], lambda name: ".norm." in name),
    ],
    ids=["head", "body", "norm"],
)
@pytest.mark.filterwarnings("ignore:.*is made of the inner loop's displacements")
def test_what_is_adapted_and_what_is_learnt(rule, adapt, chosen):
    names = set(weights(blob_learner()))
    adapted = {name for name in names if chosen(name)}
    assert moved(rule, adapt=adapt, outer={"parameters": "adapted"}) == adapted
    assert moved(rule, adapt=adapt) == (names if rule.needs_query else adapted)


def test_adapting_the_head_equals_a_loop_with_torch_optim_over_the_head():
    learner, data = blob_learner(inner=SGD(0.1), adapt=["head.*"], outer={"parameters": "adapted"}), Blobs()
    learner.double()
    data.setup("fit")
    episode = data.on_after_batch_transfer(data.episodes("train", torch.arange(4)), 0)
    inner = learner.inner_loop(episode, training=True)
    end = inner.rollout(learner.initialisation()).end
    assert set(end) == HEAD
    for t in range(4):
        head = torch.nn.Linear(*reversed(learner.network.head.weight.shape)).double()
        head.load_state_dict(learner.network.head.state_dict())
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for x, y in inner.batches():
            with torch.no_grad():
                features = learner.network.blocks(x[t]).flatten(1)
            optimizer.zero_grad()
            loss_of(head, features, y[t]).backward()
            optimizer.step()
        torch.testing.assert_close(end["head.weight"][t], head.weight.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(end["head.bias"][t], head.bias.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "rule", [Reptile(), FOMAML(), StepCombination([0, 1, 1])], ids=lambda rule: type(rule).__name__
)
@pytest.mark.filterwarnings("ignore:.*is made of the inner loop's displacements")
def test_an_outer_optimiser_with_weight_decay_leaves_alone_what_displacements_do_not_reach(rule):
    decay = {"outer": {"optimizer": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)}}
    assert moved(rule, adapt=["head.*"], **decay) == HEAD


def test_evaluation_adapts_the_same_part():
    learner, data = blob_learner(QueryFOMAML(), inner=Adam(0.01), adapt=["head.*"]), Blobs(test_tasks=4)
    trainer(1).fit(learner, datamodule=Blobs(train_query_shots=1))
    assert set(learner.carried["second_moment"]) == HEAD
    data.setup("test")
    episode = data.on_after_batch_transfer(data.episodes("test", torch.arange(4)), 0)
    end = learner.inner_loop(episode, training=False).rollout(learner.initialisation()).end
    for name, p in learner.initialisation().items():
        assert torch.equal(end[name], p.expand(4, *p.shape)) == (name not in HEAD)
    assert learner.evaluate(episode).distance.min() > 0


def test_displacements_teach_nothing_to_the_rest_and_it_is_said():
    with pytest.warns(
        UserWarning, match=r"Reptile is made of .* the 12 tensors that adapt leaves out, from blocks.0.*"
    ):
        blob_learner(Reptile(), adapt=["head.*"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blob_learner(Reptile(), adapt=["head.*"], outer={"parameters": "adapted"})
        blob_learner(QueryFOMAML(), adapt=["head.*"])
        blob_learner(Reptile(), adapt=["*"])


@pytest.mark.parametrize("inner", [SGLD(0.05, 1e-4), SGD(0.05, momentum=0.5)], ids=["sgld", "momentum"])
def test_resuming_equals_not_stopping(inner, tmp_path):
    def fresh():
        return blob_learner(QueryFOMAML(), inner=inner, adapt=["head.*"])

    data = {"train_query_shots": 1}
    whole, part, rest = fresh(), fresh(), fresh()
    trainer(4).fit(whole, datamodule=Blobs(**data))
    first = trainer(4, callbacks=[StopAfter(2)])
    first.fit(part, datamodule=Blobs(**data))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(4).fit(rest, datamodule=Blobs(**data), ckpt_path=tmp_path / "half.ckpt")
    assert first.global_step == 2
    assert_same(weights(rest), weights(whole))
    assert rest.carried.keys() == whole.carried.keys()
    for name, values in whole.carried.items():
        assert_same(rest.carried[name], values)
        if name == "shared":
            assert values["steps"] == 4 * 3  # the noise goes on where it was
        else:
            assert set(values) == HEAD


def test_patterns_are_those_of_file_names():
    network = Conv4(5)
    assert matching(network, ["head.*"]) == HEAD
    assert matching(network, ["*.weight", "!blocks.*"]) == {"head.weight"}
    assert matching(network, ["head.bias", "head.weight"]) == HEAD
    with pytest.raises(ValueError, match=r"adapt: 'haed\.\*' matches no parameter; there are blocks.0.* and 6 more"):
        matching(network, ["head.*", "haed.*"])
    with pytest.raises(ValueError, match="leaves no parameter to adapt: give a pattern without an exclamation mark"):
        matching(network, ["!head.*"])
    with pytest.raises(ValueError, match="model.outer.parameters='none' is unknown: use one of all, adapted"):
        blob_learner(adapt=["*"], outer={"parameters": "none"})


def test_the_command_line_takes_it_from_the_checkpoint(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    model = tiny_model() | {"rule": {"class_path": "fomal.outer.MAML"}, "adapt": ["layers.3.*"]}
    data = {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"train_query_shots": 5, "test_tasks": 3}}
    run = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": run}))
    main(["fit", "--config", "c.yaml"])
    (checkpoint,) = map(str, tmp_path.rglob("last.ckpt"))
    cli = main(["test", "--ckpt_path", checkpoint])
    assert cli.model.adapted == {"layers.3.weight", "layers.3.bias"}
    assert "model.adapt is ['layers.3.*'] in the checkpoint" in fails(
        "test", "--ckpt_path", checkpoint, "--model.adapt", "[layers.1.*]"
    )
    for change in (["--model.adapt", "[layers.1.*]"], ["--model.outer.parameters", "adapted"]):
        message = fails("fit", "--ckpt_path", checkpoint, *change)
        assert f"{change[0].removeprefix('--')} is" in message
        assert "start a new run without --ckpt_path" in message
    message = fails("fit", "--config", "c.yaml", "--model.adapt", "[head.*]", code=1)
    assert message == (
        "adapt: 'head.*' matches no parameter; there are layers.1.weight, layers.1.bias, layers.3.weight, "
        "layers.3.bias."
    )
