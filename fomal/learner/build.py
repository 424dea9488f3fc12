"""Learner and data from a configuration, as the command line and checkpoints have it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from fomal.learner.meta_learner import MetaLearner
from fomal.learner.restoring import misfits
from fomal.learner.shapes import check_shapes
from fomal.run.checkpoints import find, verify
from fomal.run.moved import refusal
from fomal.run.schema import check_checkpoint
from fomal.run.trust import Trust
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.utils.checks import countable
from fomal.utils.files import refuse_unreadable

SEED = ("seed_everything", "data.init_args.seed")
WAYS = ("data.init_args.ways", "model.network.init_args.ways")
_OWN = "config"  # the source of a configuration of the user's own


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


# Torchvision annotates `degrees` so; jsonargparse would take 10 for an object, and write the configuration without it.
register_type(Number, serializer=_number, deserializer=_number)


def stream_seed(seed: bool | int) -> int:
    """The seed of the episode stream; a random one (true) is chosen after parsing and put in its place then."""
    return int(seed) if not isinstance(seed, bool) else 0


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add learner and data to a parser that has `seed_everything`.

    Seed and ways are linked, so that they need not be given twice; a class without one of the two is left as it is.
    """
    parser.add_lightning_class_args(MetaLearner, "model")
    # In this form, so that --model.outer.optimizer.lr alone says which step size is meant.
    parser.set_defaults({"model.outer.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}})
    parser.add_lightning_class_args(EpisodeDataModule, "data", subclass_mode=True)
    parser.link_arguments(*SEED, compute_fn=stream_seed)
    parser.link_arguments(*WAYS)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of fomal, or of the newest in a run's folder, on the CPU; nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        OSError: it is no regular file, has more than 64 GiB, or may not be read.
        ValueError: it is none of fomal's, not whole, or of a newer format.
    """
    path, _ = find(path)
    refuse_unreadable(path)
    verify(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    check_checkpoint(checkpoint, path)
    return checkpoint


def build(
    config: Mapping[str, Any],
    trust: Collection[str] | None = None,
    source: str = _OWN,
    checkpoint: Mapping[str, Any] | None = None,
) -> tuple[MetaLearner, EpisodeDataModule]:
    """Learner, with weights as before training, and data, not loaded yet, of a configuration that may be another's.

    Args:
        config: with the keys seed_everything, model and data, e.g. a checkpoint's.
        trust: names, or packages, that it may use beside those that are always trusted (see `fomal.run.trust`).
        source: where it is from, for messages.
        checkpoint: the content whose weights the network must fit, which is found before memory is taken for it.

    Raises:
        ValueError: it names what is not trusted, or does not fit the classes it names, or the weights.
    """
    trusted = Trust(trust)
    checked = trusted.check(sections(config, source), source)

    def check(parsed: Any) -> None:
        trusted.check_classes(parsed, source)
        if checkpoint is not None:
            check_network(parsed["model"]["network"], checkpoint, source)

    return _built(checked, source, check)


def check_network(parsed: Any, checkpoint: Mapping[str, Any], source: str) -> None:
    """Compare a network of a configuration with a checkpoint's weights, before memory is taken for it.

    Args:
        parsed: its class_path and init_args, checked and parsed.
        checkpoint: the content.
        source: where both are from, for messages.

    Raises:
        ValueError: it cannot be made, or does not fit, naming the tensor and both shapes.
    """
    prefix = "learners.0.network." if "replicas" in checkpoint["fomal"] else "network."
    weights = {name: t for name, t in checkpoint["state_dict"].items() if name.startswith(prefix)}
    with misfits(source):
        check_shapes(lambda: _network(parsed.as_dict(), source), weights, "its state_dict", "the model", prefix)


def build_own(config: Mapping[str, Any]) -> tuple[MetaLearner, EpisodeDataModule]:
    """As `build`, of a configuration that is the user's own, or has been checked."""
    return _built(config, _OWN, None)


def sections(config: Any, source: str) -> dict[str, Any]:
    """The parts of a configuration that a learner and its data are made of.

    Raises:
        ValueError: one is missing or of another kind.
    """
    for key in ("model", "data"):
        if not isinstance(config, Mapping) or not isinstance(config.get(key), Mapping):
            raise ValueError(f"{source}: its configuration has no section {key}: it is not one that fomal wrote.")
    return {key: config.get(key, 0) for key in ("seed_everything", "model", "data")}


def _built(
    config: Mapping[str, Any], source: str, check: Callable[[Any], None] | None
) -> tuple[MetaLearner, EpisodeDataModule]:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    add_arguments(parser)
    made = _instantiated(parser, {key: config[key] for key in ("seed_everything", "model", "data")}, source, check)
    return made["model"], made["data"]


def close(parser: ArgumentParser) -> None:
    """Let a parser take no value for the path or address of a file to read the value from."""
    for action in parser._actions:
        if hasattr(action, "_enable_path"):
            action._enable_path = False
        if hasattr(action, "sub_add_kwargs"):
            action.sub_add_kwargs["sub_configs"] = False


def replica_configs(config: Mapping[str, Any], replicas: int | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The configurations of several runs, from that of all.

    Args:
        config: of all.
        replicas: their number, for the seeds seed_everything, seed_everything + 1, ...; or for each the settings that
            differ, by their names on the command line (see `VARIED`).

    Raises:
        ValueError: naming the setting, for others than seeds and step sizes, and for a seed that is none.
    """
    if isinstance(config["seed_everything"], bool):
        raise ValueError("seed_everything=false leaves the weights to chance: give replicas a seed, or true.")
    if isinstance(replicas, int):
        countable(_MOST, replicas=replicas)
        if replicas < 2:
            raise ValueError(f"replicas={replicas} must be 2 or more, or null for a run alone.")
        replicas = [{"seed_everything": int(config["seed_everything"]) + place} for place in range(replicas)]
    if len(replicas) < 2:
        raise ValueError(f"replicas={replicas} has fewer than 2 entries: give more, or null for a run alone.")
    return [_varied(config, changes) for changes in replicas]


_MOST = 10_000  # replicas

VARIED = ("seed_everything", "model.inner_optimizer.lr", "model.outer.optimizer.lr")
"""What may differ between replicas."""


def _varied(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    varied = {key: deepcopy(value) for key, value in config.items() if key != "replicas"}
    for name, value in changes.items():
        if moved := refusal([name]):
            raise ValueError(f"replicas: {moved}.")
        if name not in VARIED:
            raise ValueError(f"replicas: {name} cannot differ between them: use {', '.join(VARIED)}.")
        kind = int if name == "seed_everything" else float
        if isinstance(value, bool) or not isinstance(value, int | kind) or value < 0:
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"replicas: {name}={value!r} must be {what}, not negative.")
        *sections, setting = name.split(".")
        inside = varied
        for section in sections:
            inside = inside[section]
        if sections and "init_args" not in (inside or {}):
            raise ValueError(f"replicas: {name} needs {'.'.join(sections)} with its class_path in the configuration.")
        inside.get("init_args", inside)[setting] = kind(value)
    varied["data"].get("init_args", {}).pop("seed", None)  # it follows seed_everything
    return varied


def build_network(config: Any, trust: Collection[str] | None = None, source: str = _OWN) -> nn.Module:
    """A network from its class_path and init_args, which may be another's.

    Args:
        config: both.
        trust: names, or packages, that it may use beside those that are always trusted (see `fomal.run.trust`).
        source: where it is from, for messages.

    Raises:
        ValueError: it names what is not trusted, or they do not fit.
    """
    if not isinstance(config, Mapping) or "class_path" not in config:
        raise ValueError(f"{source}: its network has no class_path: it is not one that fomal wrote.")
    trusted = Trust(trust)
    return _network(trusted.check(config, source), source, lambda made: trusted.check_classes(made, source))


def _network(config: Mapping[str, Any], source: str, check: Callable[[Any], None] | None = None) -> nn.Module:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network", required=True)
    network: nn.Module = _instantiated(parser, {"network": config}, source, check)["network"]
    return network


def _instantiated(
    parser: ArgumentParser, config: dict[str, Any], source: str, check: Callable[[Any], None] | None
) -> Any:
    close(parser)
    with _naming(source), torch.device("cpu"):  # a module's own tensors, also while a network is made elsewhere
        parsed = parser.parse_object(config)
    if check is not None:
        check(parsed)
    with _naming(source):
        return parser.instantiate(parsed)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Name the source of a configuration where constructors fail."""
    try:
        yield
    except Exception as error:  # they raise many kinds for values that they do not expect
        text = _gist(error)
        if isinstance(error, OSError | ImportError) and text == str(error):
            raise
        plain = isinstance(error, ValueError) and text == str(error)
        if plain and source == _OWN:
            raise
        raise ValueError(f"{source}: {'' if plain else 'the configuration cannot be used: '}{text}") from error


def _gist(error: Exception) -> str:
    """An error's text in one line, without jsonargparse's account of the other kinds of value that it tried."""
    text = " ".join(str(error).split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", text)
    text = re.split(r" - Expected a <class 'NoneType'>| Given value type:", text)[0]
    return text if isinstance(error, ValueError | ArgumentError) else f"{type(error).__name__}: {text}"
