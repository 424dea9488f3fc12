import copy
import logging

import lightning as L
import pytest
import torch
from torch import nn

from fomal.data.sinusoid import SinusoidDataModule
from fomal.inner import SGD, Adam
from fomal.inner.loop import gather_examples
from fomal.learner.meta_learner import MetaLearner
from fomal.models import MLP, BatchNorm, Conv4
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, TruncatedMAML
from tests.helpers.learners import Blobs, StopAfter, assert_same, blob_learner, sine_learner, trainer, weights
from tests.helpers.oracle import adapt_one, batches


def test_a_run_is_the_papers_algorithm_written_out():
    """Five meta-iterations in float64 against a loop over tasks with torch.optim and the interpolation by hand."""
    data = SinusoidDataModule(train_shots=10, meta_batch_size=3)
    learner = sine_learner(inner=SGD(0.02, momentum=0.5))
    network = copy.deepcopy(learner.network).double()
    trainer(5, precision="64-true").fit(learner, datamodule=data)
    state = None
    for iteration in range(5):
        episode = data.episodes("train", torch.arange(3 * iteration, 3 * iteration + 3)).floating(torch.float64)
        indices = learner._minibatch_indices(episode, training=True)
        make = lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5)  # noqa: E731
        runs = [adapt_one(network, make, *batches(episode, indices, t), state=state) for t in range(3)]
        states = [run[2].state_dict() for run in runs]
        state = states[0]
        for index in state["state"]:
            buffers = torch.stack([s["state"][index]["momentum_buffer"] for s in states])
            state["state"][index]["momentum_buffer"] = buffers.mean(0)  # carried as the tasks' mean
        with torch.no_grad():
            epsilon = 1 - iteration / 5
            for name, p in network.named_parameters():
                mean = torch.stack([run[0].get_parameter(name) for run in runs]).mean(0)
                p += epsilon * (mean - p)
    for name, p in network.named_parameters():
        torch.testing.assert_close(learner.network.get_parameter(name), p, rtol=1e-9, atol=1e-12)


RULES = [Reptile(), FOMAML(tail_shots=1), QueryFOMAML(), MAML(), TruncatedMAML(2), BinomialMAML(2)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_same_run_twice_is_bitwise_equal(rule):
    def run():
        learner = blob_learner(rule, inner=SGD(0.1))
        trainer(3).fit(learner, datamodule=Blobs(train_query_shots=2))
        return weights(learner)

    first = run()
    assert_same(first, run())
    assert any(not torch.equal(first[name], value) for name, value in weights(blob_learner()).items())


@pytest.mark.parametrize("inner_state", ["carried", "reset"])
def test_resuming_equals_not_stopping(inner_state, tmp_path):
    def fresh():
        return blob_learner(inner_state=inner_state, outer={"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)})

    whole, part, rest = fresh(), fresh(), fresh()
    trainer(6).fit(whole, datamodule=Blobs())
    first = trainer(6, callbacks=[StopAfter(2)])
    first.fit(part, datamodule=Blobs())
    assert first.global_step == 2
    first.save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    rest.network.load_state_dict({k: torch.zeros_like(v) for k, v in rest.network.state_dict().items()})
    trainer(6).fit(rest, datamodule=Blobs(), ckpt_path=tmp_path / "c.ckpt")
    assert_same(weights(whole), weights(rest))
    if inner_state == "carried":
        for part_name, values in whole.carried.items():
            assert_same(values, rest.carried[part_name])
        assert whole.carried["shared"]["steps"] == 18
    else:
        assert whole.carried is None


def test_a_resumed_run_refuses_another_end_of_its_schedule(tmp_path):
    learner, first = sine_learner(), trainer(3)
    first.fit(learner, datamodule=SinusoidDataModule())
    first.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="max_steps=9, but the checkpoint's run has 3"):
        trainer(9).fit(sine_learner(), datamodule=SinusoidDataModule(), ckpt_path=tmp_path / "c.ckpt")


@pytest.mark.parametrize("make", [(blob_learner, Blobs), (sine_learner, SinusoidDataModule)])
def test_evaluation_leaves_weights_and_carried_state_untouched(make):
    learner, data = make[0](), make[1](test_tasks=9, eval_tasks_per_batch=4)
    run = trainer(3)
    run.fit(learner, datamodule=data)
    before, carried = weights(learner), copy.deepcopy(learner.carried)
    run.test(learner, datamodule=data, verbose=False)
    assert_same(before, weights(learner))
    for part, values in carried.items():
        assert_same(values, learner.carried[part])


def test_evaluation_starts_from_the_carried_state():
    learner, data = blob_learner(), Blobs()
    trainer(3).fit(learner, datamodule=data)
    episode = data.on_after_batch_transfer(data.episodes("test", torch.arange(4)), 0)
    with_state = learner.evaluate(episode).logits
    learner.carried = None
    assert not torch.allclose(learner.evaluate(episode).logits, with_state)


def test_results_do_not_depend_on_how_many_tasks_run_at_once():
    learner = blob_learner()
    found = []
    for at_once in (1, 4, 30):
        run = trainer()
        run.test(learner, datamodule=Blobs(test_tasks=30, eval_tasks_per_batch=at_once), verbose=False)
        found.append(learner.results)
    assert found[0]["tasks"] == 30
    assert {"test/accuracy", "test/accuracy_ci95", "test/accuracy_transductive"} <= set(found[0]["metrics"])
    for other in found[1:]:
        for name, value in found[0]["metrics"].items():  # distances are in 32-bit before they are summed
            assert value == pytest.approx(other["metrics"][name], rel=1e-3 if "distance" in name else 1e-12)


def test_regression_reports_the_loss_after_each_step():
    learner, data = sine_learner(inner=SGD(0.02)), SinusoidDataModule(test_tasks=3, eval_tasks_per_batch=2)
    trainer().test(learner, datamodule=data, verbose=False)
    episode = data.episodes("test", torch.arange(3))
    indices = learner._minibatch_indices(episode, training=False)
    expected = []
    for t in range(3):
        network, curve = learner.network, []
        for k in range(5):
            xs, ys = batches(episode, indices[:k], t)
            adapted, _, _ = adapt_one(network, lambda p: torch.optim.SGD(p, lr=0.02), xs, ys)
            curve.append(nn.functional.mse_loss(adapted(episode.query_x[t]), episode.query_y[t]).item())
        expected.append(curve)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(learner.results["loss_by_step"]).double(), expected.mean(0), rtol=1e-4, atol=1e-6
    )
    metrics = learner.results["metrics"]
    assert metrics["test/loss"] == pytest.approx(expected[:, -1].mean().item(), rel=1e-4)
    assert metrics["test/loss_before_ci95"] == pytest.approx(1.96 * expected[:, 0].std().item() / 3**0.5, rel=1e-4)


def test_training_learns_to_learn():
    data = SinusoidDataModule(train_shots=20, meta_batch_size=5, test_tasks=100)
    learner = sine_learner(inner=SGD(0.02), network=MLP(), train={"steps": 5}, eval={"steps": 16})
    run = trainer(300)
    run.test(learner, datamodule=data, verbose=False)
    untrained = learner.results["metrics"]["test/loss"]
    run.fit(learner, datamodule=data)
    run.test(learner, datamodule=data, verbose=False)
    assert learner.results["metrics"]["test/loss"] < 0.75 * untrained


def test_the_outer_step_size_goes_linearly_to_its_end():
    learner, seen = sine_learner(outer={"final": 0.5}), []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            seen.append(pl_module._optimizer().param_groups[0]["lr"])

    trainer(4, callbacks=[Record()]).fit(learner, datamodule=SinusoidDataModule())
    assert seen == pytest.approx([1.0, 0.875, 0.75, 0.625])


def test_any_torch_schedule_is_stepped_once_a_meta_iteration():
    learner = sine_learner(outer={"schedule": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)})
    trainer(3).fit(learner, datamodule=SinusoidDataModule())
    assert learner._optimizer().param_groups[0]["lr"] == pytest.approx(0.125)
    waits = sine_learner(outer={"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau})
    with pytest.raises(ValueError, match="model.outer.schedule=ReduceLROnPlateau waits for a metric"):
        trainer(3).fit(waits, datamodule=SinusoidDataModule())


def test_a_separate_tail_is_the_last_batch_and_nothing_else():
    learner, data = blob_learner(FOMAML(tail_shots=1)), Blobs()
    data.setup("fit")
    episode = data.episodes("train", torch.arange(4))
    indices = learner._minibatch_indices(episode, training=True)
    assert len(indices) == 3
    labels = gather_examples(episode.support_y, indices[-1])
    assert labels.tolist() == [[0, 1, 2]] * 4
    head = torch.cat(indices[:-1], 1)
    for t in range(4):
        assert not set(head[t].tolist()) & set(indices[-1][t].tolist())
    assert set(head.flatten().tolist()) | set(indices[-1].flatten().tolist()) == set(range(12))


def test_double_precision_is_double_throughout():
    learner = blob_learner()
    trainer(2, precision="64-true").fit(learner, datamodule=Blobs())
    assert all(value.dtype == torch.float64 for value in learner.carried["second_moment"].values())


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_half_precision_is_refused(precision, monkeypatch):
    learner, run = sine_learner(), trainer()
    monkeypatch.setattr(type(run), "precision", property(lambda self: precision))
    with pytest.raises(ValueError, match=f"precision={precision} would need loss scaling"):
        run.fit(learner, datamodule=SinusoidDataModule())


def test_batch_norm_of_torch_is_made_to_use_batch_statistics(caplog):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    with caplog.at_level(logging.INFO):
        learner = blob_learner(network=network)
    assert isinstance(learner.network[1], BatchNorm)
    assert "statistics of the batch at hand, always: 1" in caplog.text
    trainer(2).fit(learner, datamodule=Blobs())
    assert learner.objective.vectorize is True


def test_dropout_is_a_function_of_seed_and_position():
    def run(draws):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(81, 3))
        learner = blob_learner(network=network, inner=SGD(0.1))
        torch.rand(draws)  # whatever else draws random numbers must not matter
        trainer(2).fit(learner, datamodule=Blobs())
        return weights(learner)

    assert_same(run(draws=1), run(draws=2))


def test_a_run_without_a_datamodule_is_vectorised_too():
    learner, data = blob_learner(), Blobs()
    data.setup("fit")
    loader = [data.on_after_batch_transfer(data.episodes("train", torch.arange(4)), 0)] * 2
    trainer(2).fit(learner, torch.utils.data.DataLoader(loader, batch_size=None))
    assert learner.objective.vectorize is True


def test_frozen_parameters_stay(tmp_path):
    learner = blob_learner()
    learner.network.blocks[0].conv.weight.requires_grad_(False)
    before = weights(learner)
    trainer(2).fit(learner, datamodule=Blobs())
    after = weights(learner)
    assert torch.equal(before["blocks.0.conv.weight"], after["blocks.0.conv.weight"])
    assert not torch.equal(before["blocks.1.conv.weight"], after["blocks.1.conv.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"batch_size": 0}}, "model.train or model.eval: batch_size=0 must be at least 1"),
        ({"eval": {"steps": -1}}, "model.train or model.eval: steps=-1 must not be negative"),
        ({"train": {"steps": 0}}, "model.train.steps=0 leaves Reptile nothing"),
        ({"inner_state": "kept"}, "inner_state='kept' is unknown: use one of carried, in_series, reset"),
        ({"rule": MAML(), "inner": Adam()}, "MAML differentiates through Adam"),
    ],
)
def test_bad_settings_are_refused_when_the_learner_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        sine_learner(**settings)


@pytest.mark.parametrize(
    ("learner", "data", "message"),
    [
        (lambda: blob_learner(QueryFOMAML()), Blobs, "QueryFOMAML needs a query set, but data.train_query_shots=0"),
        (
            lambda: blob_learner(network=Conv4(5, image_size=9)),
            Blobs,
            r"network returns \(5,\) per example, but data.ways=3",
        ),
        (lambda: blob_learner(FOMAML(tail_shots=4)), Blobs, "tail_shots=4 does not split a task with 4 support"),
        (
            lambda: blob_learner(train={"batch_size": 13, "replacement": True}),
            Blobs,
            "batch_size=13 exceeds the 12",
        ),
        (
            lambda: MetaLearner(MLP(out_features=2), Reptile(), SGD()),
            SinusoidDataModule,
            r"network returns \(2,\) per example, but the data's targets are \(1,\)",
        ),
        (lambda: blob_learner(), lambda: Blobs(ways=13), "ways=13 exceeds the 12 classes of the val split"),
    ],
)
def test_what_cannot_run_is_refused_before_training(learner, data, message):
    with pytest.raises(ValueError, match=message):
        trainer().fit(learner(), datamodule=data())


def test_a_linear_schedule_needs_an_end():
    with pytest.raises(ValueError, match="max_steps=-1 leaves the linear outer schedule without an end"):
        trainer(-1).fit(sine_learner(), datamodule=SinusoidDataModule())


def test_logged_losses_are_means_over_the_interval_at_their_meta_iteration(tmp_path):
    learner, logged = sine_learner(execution={"tasks_per_chunk": 100}), []

    class Trace(type(learner.rule)):
        def __call__(self, inner, start):
            gradient, trajectory = super().__call__(inner, start)
            logged.append(trajectory.losses[[0, -1]].mean(1))
            return gradient, trajectory

    learner.rule = Trace()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    trainer(4, logger=logger, log_every_n_steps=2).fit(learner, datamodule=SinusoidDataModule())
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    read = [dict(zip(header, row.split(","), strict=True)) for row in rows[1:]]
    assert [row["step"] for row in read] == ["2", "4"]
    for row, chunk in zip(read, (logged[:2], logged[2:]), strict=True):
        first, last = torch.stack(chunk).mean(0)
        assert float(row["train/loss_first_step"]) == pytest.approx(first.item(), rel=1e-5)
        assert float(row["train/loss_last_step"]) == pytest.approx(last.item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_run_on_the_gpu_is_the_run_on_the_cpu(rule):
    """In float64, where two devices differ by the order of summation alone; then evaluation, and bf16 for a step."""
    found = []
    for accelerator in ("cpu", "gpu"):
        learner, data = blob_learner(rule, inner=SGD(0.05)), Blobs(train_query_shots=2, test_tasks=20)
        run = trainer(3, accelerator=accelerator, devices=1, precision="64-true")
        run.fit(learner, datamodule=data)
        run.test(learner, datamodule=data, verbose=False)
        found.append((weights(learner), learner.results["metrics"]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name].cpu(), value, rtol=1e-6, atol=1e-9)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)
    learner = blob_learner(rule, inner=SGD(0.05))
    trainer(1, accelerator="gpu", devices=1, precision="bf16-mixed").fit(learner, datamodule=Blobs(train_query_shots=2))
    assert all(torch.isfinite(value).all() for value in weights(learner).values())


def test_a_network_for_other_images_is_refused_with_both_shapes():
    learner = blob_learner(network=Conv4(3, image_size=28, filters=4))
    with pytest.raises(ValueError, match=r"does not take the data's inputs, \(1, 9, 9\) per example .*its image_size"):
        trainer(max_steps=1).fit(learner, datamodule=Blobs())
