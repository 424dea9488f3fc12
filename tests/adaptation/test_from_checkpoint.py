"""Adapting a checkpoint: the evaluation's own inner loop, for any classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fomal
from fomal.adaptation import adapt
from fomal.data.images.image_format import ImageFormat
from fomal.inner import SGD, Adam
from fomal.inner.objective import Objective
from fomal.learner.build import build, read_checkpoint
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import Conv4
from fomal.outer import Reptile
from tests.helpers.oracle import loss_of


def examples(support: Path) -> tuple[list[Path], list[str]]:
    files = sorted(support.rglob("*.png"))
    return files, [path.parent.name for path in files]


def test_it_is_what_the_evaluation_does(checkpoint: Path) -> None:
    content = read_checkpoint(checkpoint)
    learner, data = build(content["fomal"]["config"])
    learner.load_state_dict(content["state_dict"])
    learner.carried = content["fomal"]["carried"]
    learner.objective = Objective(learner.network, vectorize=False)
    learner.network.eval()
    data.prepare_data()
    data.setup()
    raw = data.episodes("test", torch.tensor([0]))
    expected = learner.evaluate(data.on_after_batch_transfer(raw, 0))
    assert learner.carried is not None

    labels = [f"class{label}" for label in raw.support_y[0].tolist()]
    adapted = adapt(checkpoint, raw.support_x[0], labels, seed=data.seed)
    for transductive, logits in ((False, expected.logits), (True, expected.logits_transductive)):
        predictions = adapted.predict(raw.query_x[0], transductive)
        torch.testing.assert_close(predictions.probabilities, logits[0].softmax(-1), rtol=1e-5, atol=1e-6)
        assert predictions.labels == [f"class{i}" for i in logits[0].argmax(-1).tolist()]
    assert adapted.classes == ["class0", "class1", "class2"]


def test_sgd_is_torch_optim_over_written_out_steps(checkpoint: Path, support: Path) -> None:
    """All examples in every step, so that no choice of mini-batches is in it."""
    files, labels = examples(support)
    adapted = adapt(checkpoint, files, labels, steps=5, batch_size=len(files), optimizer=SGD(0.02))
    content = read_checkpoint(checkpoint)
    network = build(content["fomal"]["config"])[0].network.double()
    weights = {k.removeprefix("network."): v for k, v in content["state_dict"].items() if k.startswith("network.")}
    network.load_state_dict(weights)
    x = adapted.image_format.normalize(adapted.support).double()
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(network, x, adapted.labels).backward()
        optimizer.step()
    for name, value in adapted.network.state_dict().items():
        torch.testing.assert_close(value.double(), network.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_weights_and_state_in_64_bits_stay_so(checkpoint: Path, support: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    exact = {k: t.double() * (1 + 2**-40) for k, t in content["state_dict"].items() if k.startswith("network.")}
    content["state_dict"].update(exact)
    moments = content["fomal"]["carried"]["second_moment"]
    content["fomal"]["carried"]["second_moment"] = {k: t.double() for k, t in moments.items()}
    torch.save(content, tmp_path / "c.ckpt")
    assert adapt(tmp_path / "c.ckpt", *examples(support), steps=1).device.type == "cpu"
    adapted = adapt(tmp_path / "c.ckpt", *examples(support), steps=1, optimizer=SGD(0.0))
    adapted.save(tmp_path / "model")
    for model in (adapted, fomal.Adapted.load(tmp_path / "model")):
        found = model.network.state_dict()
        assert all(torch.equal(found[k.removeprefix("network.")], t) for k, t in exact.items())


def test_weights_that_are_or_become_infinite_make_no_model(
    checkpoint: Path, support: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    with pytest.raises(FloatingPointError, match="not finite within 3 steps of adaptation, so there is no model"):
        adapt(checkpoint, *examples(support), steps=3, optimizer=SGD(1e30))
    content = read_checkpoint(checkpoint)
    content["state_dict"]["network.head.bias"] = torch.tensor([0.0, torch.inf, 0.0])
    torch.save(content, tmp_path / "c.ckpt")
    with pytest.raises(FloatingPointError, match=r"head\.bias"):
        adapt(tmp_path / "c.ckpt", *examples(support))
    out = tmp_path / "model"
    args = "--ckpt_path", str(tmp_path / "c.ckpt"), "--support", str(support), "--out", str(out)
    assert "head.bias" in fails("adapt", *args, code=1)
    assert not out.exists()


def test_settings_default_to_the_checkpoints_evaluation(checkpoint: Path, support: Path) -> None:
    about = adapt(checkpoint, *examples(support)).about["adaptation"]
    assert (about["steps"], about["batch_size"], about["optimizer"]) == (12, 4, "fomal.inner.adam.Adam")
    assert about["examples"] == {"new20": 3, "new21": 4, "new22": 2}
    assert about["loss_last_step"] < about["loss_first_step"]


def test_it_learns_the_new_classes(checkpoint: Path, support: Path, queries: Path) -> None:
    files, labels = examples(support)
    adapted = fomal.adapt(checkpoint, files, labels)  # the public name
    assert isinstance(adapted, fomal.Adapted)
    images, truth = examples(queries)
    right = [found == label for found, label in zip(adapted.predict(images).labels, truth, strict=True)]
    assert sum(right) >= 24, sum(right)  # of 30; chance is 10


@pytest.mark.parametrize("classes", [2, 5])
def test_another_number_of_classes_starts_from_the_mean_row(
    checkpoint: Path, classes: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pixels = torch.randint(0, 256, (2 * classes, 3, 10, 10), dtype=torch.uint8)
    labels = [f"c{i // 2}" for i in range(2 * classes)]
    with caplog.at_level("INFO"):
        adapted = adapt(checkpoint, pixels, labels, steps=1, optimizer=SGD(1e-12))
    said = caplog.text + capsys.readouterr().err
    assert f"There are {classes} classes, and 3 in training: each of the {classes} rows of head starts as" in said
    trained = read_checkpoint(checkpoint)["state_dict"]["network.head.weight"]
    weight = adapted.network.get_parameter("head.weight")
    assert weight.shape[0] == classes
    torch.testing.assert_close(weight, trained.mean(0).expand(classes, -1))
    # Nothing tells the classes apart yet.
    torch.testing.assert_close(
        adapted.predict(pixels).probabilities, torch.full((2 * classes, classes), 1 / classes), rtol=1e-5, atol=0
    )


def test_the_carried_moments_of_the_head_follow_it(checkpoint: Path, support: Path) -> None:
    """Were they left with three rows, or reset, the first step would fail, or go elsewhere."""
    files, labels = examples(support)
    labels = [f"{label}{i % 2}" for i, label in enumerate(labels)]  # six classes
    content = read_checkpoint(checkpoint)
    before = content["state_dict"]["network.head.weight"].mean(0)
    adapted = adapt(checkpoint, files, labels, steps=1, batch_size=len(files))
    moved = adapted.network.get_parameter("head.weight").detach() - before
    # Adam's step is at most lr / sqrt(1 - beta2) over the square root of a moment that has only the new gradient in it;
    # with carried moments it is smaller.
    afresh = adapt(checkpoint, files, labels, steps=1, batch_size=len(files), optimizer=Adam(0.003, beta1=0.0))
    assert 0 < float(moved.abs().mean()) < float((afresh.network.get_parameter("head.weight") - before).abs().mean())


def test_the_seed_decides_the_minibatches_alone(checkpoint: Path, support: Path) -> None:
    files, labels = examples(support)
    first, again, other = (
        adapt(checkpoint, files, labels, seed=seed).network.get_parameter("head.weight") for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_learner_made_in_python(checkpoint: Path, support: Path, tmp_path: Path) -> None:
    content = read_checkpoint(checkpoint)
    content["fomal"]["config"] = {}
    bare = tmp_path / "bare.ckpt"
    torch.save(content, bare)
    files, labels = examples(support)
    with pytest.raises(ValueError, match="made in Python and has no configuration: give learner= and image_format="):
        adapt(bare, files, labels)
    settings = {"eval": InnerSchedule(12, 4)}
    network = Conv4(3, in_channels=3, image_size=10, filters=8)
    with pytest.raises(ValueError, match="learner= needs image_format="):
        adapt(bare, files, labels, learner=MetaLearner(network, Reptile(), SGD(0.1), **settings))
    with_config = adapt(checkpoint, files, labels, optimizer=SGD(0.1))
    adapted = adapt(
        bare,
        files,
        labels,
        learner=MetaLearner(network, Reptile(), SGD(0.1), **settings),
        optimizer=SGD(0.1),
        image_format=ImageFormat(10, 10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
    )
    assert torch.equal(adapted.network.head.weight, with_config.network.head.weight)
    with pytest.raises(ValueError, match="was not made from a configuration"):
        adapted.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["a"]}, "labels has 1 entries for 9 images: give one for each"),
        ({"labels": ["a"] * 9}, "labels has 1 classes: there must be two at least"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
    ],
)
def test_mistakes(checkpoint: Path, support: Path, change: dict[str, object], message: str) -> None:
    files, labels = examples(support)
    with pytest.raises(ValueError, match=message):
        adapt(checkpoint, files, **{"labels": labels, **change})


def test_unusable_images_are_named_together(checkpoint: Path, support: Path, tmp_path: Path) -> None:
    files, labels = examples(support)
    wrong = tmp_path / "text.png"
    wrong.write_text("no image")
    images = [wrong, *files[1:], torch.zeros(3, 4, 4)]
    with pytest.raises(
        ValueError, match=r"2 images cannot be used: .*text.png \(no image .*; image 9 \(floating-point pixels"
    ):
        adapt(checkpoint, images, [*labels, "x"])


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        adapt(tmp_path / "no.ckpt", [], [])
    (tmp_path / "some.ckpt").write_text("text")
    with pytest.raises(ValueError, match="some.ckpt cannot be read as a checkpoint"):
        adapt(tmp_path / "some.ckpt", [], [])
