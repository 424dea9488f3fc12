"""From a checkpoint and a few labelled images to a model of their classes."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fomal.adaptation.inputs import ImageLike, decode_all
from fomal.adaptation.model import Adapted
from fomal.data.images.image_format import ImageFormat
from fomal.inner.loss import Loss, predicts_classes
from fomal.inner.objective import Objective
from fomal.inner.optimizer import SHARED, InnerOptimizer
from fomal.learner.build import build, read_checkpoint
from fomal.learner.checkpointed import REPLICAS_GIVEN
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.restoring import misfits, take_dtypes
from fomal.learner.settings import InnerSchedule
from fomal.learner.watch import nonfinite, refuse_nonfinite_weights
from fomal.models.classifier import Classifier
from fomal.models.head import find_head, mean_rows, outputs, resize_head
from fomal.run.checkpoints import find
from fomal.run.provenance import versions
from fomal.run.schema import check_tensors
from fomal.run.trust import Trust
from fomal.tasks.datamodule import EpisodeDataModule, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.philox import LARGEST_SEED
from fomal.utils.checks import MANY, countable, positive
from fomal.utils.output import rank_zero_info


def adapt(
    checkpoint: str | Path,
    images: ImageLike | Iterable[ImageLike],
    labels: Sequence[str],
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    optimizer: InnerOptimizer | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    learner: MetaLearner | None = None,
    image_format: ImageFormat | None = None,
    trust: Collection[str] | None = None,
) -> Adapted:
    """Adapt the initialisation in a checkpoint to new classes, by its inner loop.

    Any number of classes and of examples of each. Where the number of classes is not that of training, the head is
    made anew: each of its rows starts as the mean of the trained ones, since nothing tells new classes apart yet.

    Args:
        checkpoint: of `fomal fit`, or of a trainer around a `MetaLearner`; or the folder of a run, for its newest.
        images: the examples: files, images of Pillow's, arrays or tensors, each of any size; or (S, C, H, W) uint8.
        labels: the class of each.
        steps: inner steps; None: as many as in the checkpoint's evaluation.
        batch_size: examples per step, likewise.
        optimizer: inner optimiser; None: the checkpoint's, with its carried state. Another one starts afresh.
        seed: of the choice of mini-batches.
        device: where to compute.
        learner: how the checkpoint's learner is made, where it was made in Python and not from a configuration.
        image_format: what images become; None: as the checkpoint's data module says.
        trust: names of classes, or packages, that the checkpoint may use beside fomal's and torch's, which it is
            otherwise refused for, before they are imported; see `fomal.run.trust`.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        FloatingPointError: the checkpoint's weights, or the adapted ones, are infinite or NaN.
        ValueError: for images or labels that cannot be used, or a checkpoint that does not say what it was trained on.
    """
    checkpoint, _ = find(checkpoint)
    content = read_checkpoint(checkpoint)
    if learner is None:
        learner, data = build(_config(content), trust, str(checkpoint), content)
        image_format = image_format or _image_format(data)
    elif image_format is None:
        raise ValueError("learner= needs image_format=ImageFormat(...) too: how image files become its inputs.")
    steps = learner.eval_schedule.steps if steps is None else steps
    batch_size = learner.eval_schedule.batch_size if batch_size is None else batch_size
    positive(MANY, steps=steps, batch_size=batch_size)
    countable(LARGEST_SEED, seed=seed)
    ways = _give_weights(content, str(checkpoint), learner, takes_state=optimizer is None)
    labels = [str(label) for label in labels]
    classes = sorted(set(labels))
    support = torch.from_numpy(decode_all(images, image_format))  # (S, C, H, W)
    if len(support) != len(labels):
        raise ValueError(f"labels has {len(labels)} entries for {len(support)} images: give one for each.")
    if len(classes) < 2:
        raise ValueError(f"labels has {len(classes)} classes: there must be two at least to tell apart.")
    y = torch.tensor([classes.index(label) for label in labels])
    _refuse_other_losses(learner, y)
    learner.to(device)
    if len(classes) != ways:
        _rebuild_head(learner, ways, len(classes))
    if optimizer is not None:
        learner.inner_optimizer, learner.carried = optimizer, None
    learner.eval_schedule = InnerSchedule(steps, batch_size, learner.eval_schedule.replacement)
    losses = _run(learner, image_format.normalize(support), y, len(classes), seed)
    about = _about(checkpoint, content, learner, ways, Trust(trust))
    about["adaptation"] |= {
        "seed": seed,
        "examples": dict(sorted(Counter(labels).items())),
        "loss_first_step": losses[0].item(),
        "loss_last_step": losses[-1].item(),
    }
    return Adapted(learner.network, classes, image_format, support, y, about)


def _refuse_other_losses(learner: MetaLearner, y: Tensor) -> None:
    """Raise ValueError where the network's outputs are no logits of classes, as an adapted model takes them."""
    loss = learner.objective.loss_of(y)
    if type(loss).predict is not Loss.predict or not predicts_classes(loss, y):
        raise ValueError(
            f"the checkpoint's loss {type(loss).__name__} does not make the network's outputs logits of classes: adapt "
            f"in Python, by MetaLearner.inner_loop or evaluate."
        )


def image_format_of(checkpoint: str | Path, trust: Collection[str] | None = None) -> ImageFormat:
    """The format in which image files become the inputs of a checkpoint's network.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it does not say, or names what is not trusted.
    """
    content = read_checkpoint(checkpoint)
    return _image_format(build(_config(content), trust, str(checkpoint), content)[1])


def _config(content: dict[str, Any]) -> dict[str, Any]:
    if "replicas" in content["fomal"]:
        raise ValueError(REPLICAS_GIVEN)
    config: dict[str, Any] = content["fomal"]["config"]
    if not config:
        raise ValueError("the checkpoint was made in Python and has no configuration: give learner= and image_format=.")
    return config


def _image_format(data: EpisodeDataModule) -> ImageFormat:
    image_format: ImageFormat | None = getattr(data, "image_format", None)
    if image_format is None:
        raise ValueError(
            f"the checkpoint was trained with {type(data).__name__}, which does not say how image files become its "
            f"inputs: adapt it in Python, with image_format=ImageFormat(...)."
        )
    return image_format


def _give_weights(content: dict[str, Any], source: str, learner: MetaLearner, takes_state: bool) -> int:
    """Give a learner the checkpoint's weights and state; the number of its classes."""
    weights = {k.removeprefix("network."): v for k, v in content["state_dict"].items() if k.startswith("network.")}
    with misfits(source):
        check_tensors(weights, learner.network.state_dict(), "its state_dict", "the network")
        if takes_state:
            learner.check_state(content, resuming=False)
    take_dtypes(learner.network, weights)
    learner.network.load_state_dict(weights)
    refuse_nonfinite_weights(learner.network, "adapt")
    learner.carried = content["fomal"]["carried"]
    # There is one task.
    learner.objective = Objective(learner.network, False, loss=learner.loss, query_loss=learner.query_loss)
    return outputs(learner.network.get_submodule(find_head(learner.network)))


def _rebuild_head(learner: MetaLearner, ways: int, classes: int) -> None:
    """Give the head, and the moments that the inner optimiser carries of it, as many rows as there are classes."""
    head = resize_head(learner.network, classes)
    carried = learner.carried or {}
    learner.carried = learner.carried and {
        part: values
        if part == SHARED
        else {name: mean_rows(t, classes) if name.rpartition(".")[0] == head else t for name, t in values.items()}
        for part, values in carried.items()
    }
    rank_zero_info(
        f"There are {classes} classes, and {ways} in training: each of the {classes} rows of {head} starts as the mean "
        f"of the trained ones."
    )


@torch.no_grad()
def _run(learner: MetaLearner, x: Tensor, y: Tensor, ways: int, seed: int) -> Tensor:
    """Adapt the learner's network in place; the loss before each step."""
    like = next(learner.network.parameters())
    task = Episode(x[None], y[None], x[None, :0], y[None, :0], torch.zeros(1, dtype=torch.int64), ways, seed)
    episode = task._replace(split=split_index("test")).to(like.device)
    learner.network.eval()
    inner = learner.inner_loop(episode, training=False)
    trajectory = inner.rollout(learner.initialisation())
    after = learner.objective.losses(trajectory.end, inner.episode.support_x, inner.episode.support_y)
    if nonfinite([*trajectory.end.items(), ("losses", trajectory.losses), ("the last", after)]):
        raise FloatingPointError(
            f"the loss or the weights are not finite within {learner.eval_schedule.steps} steps of adaptation, so "
            f"there is no model: use fewer steps, or an optimizer with a smaller step size."
        )
    for name, value in trajectory.end.items():
        learner.network.get_parameter(name).copy_(value[0])
    return trajectory.losses[:, 0]


def _about(path: Path, content: dict[str, Any], learner: MetaLearner, ways: int, trust: Trust) -> dict[str, Any]:
    """Where a model came from, in plain values."""
    return {
        "network": _network_config(content["fomal"]["config"], ways, learner.network, trust),
        "ways": ways,
        "checkpoint": {
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "meta_iterations": content.get("global_step"),
        },
        "adaptation": {
            "steps": learner.eval_schedule.steps,
            "batch_size": learner.eval_schedule.batch_size,
            "optimizer": f"{type(learner.inner_optimizer).__module__}.{type(learner.inner_optimizer).__qualname__}",
        },
        "versions": versions(),
    }


def _network_config(config: dict[str, Any], ways: int, made: nn.Module, trust: Trust) -> dict[str, Any] | None:
    """How to make the network again, without the configuration that `ways` was linked to; None if nothing says so."""
    network = config.get("model", {}).get("network")
    if network is None:
        return None
    settings = dict(network.get("init_args", {}))
    module, _, name = network["class_path"].rpartition(".")
    # A learner of the user's own says nothing about the names in the file.
    known = trust.allows(network["class_path"])
    kind = getattr(importlib.import_module(module), name) if known else type(made)
    if "ways" in inspect.signature(kind).parameters:
        settings["ways"] = ways
    if kind is Classifier and settings.get("options"):  # its weights are in the folder, and need not be fetched again
        settings["options"] = {k: v for k, v in settings["options"].items() if k not in ("weights", "pretrained")}
    return {"class_path": network["class_path"], "init_args": settings}
