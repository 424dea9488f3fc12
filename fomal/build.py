"""Learner and data from a configuration, as the command line and checkpoints have it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from numbers import Number
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from fomal.checkpoints import verify
from fomal.data.datamodule import EpisodeDataModule
from fomal.learner import MetaLearner

SEED = ("seed_everything", "data.init_args.seed")
WAYS = ("data.init_args.ways", "model.network.init_args.ways")


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    return value


# Torchvision annotates `degrees` so; jsonargparse would take 10 for an object, and write the configuration without it.
register_type(Number, serializer=_number, deserializer=_number)


def stream_seed(seed: bool | int) -> int:
    """The seed of the episode stream; a random one (true) is drawn after parsing and put in its place then."""
    return int(seed) if not isinstance(seed, bool) else 0


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add learner and data to a parser that has `seed_everything`.

    Seed and ways are linked, so that they need not be given twice; a class without one of the two is left as it is.
    """
    parser.add_lightning_class_args(MetaLearner, "model")
    parser.add_lightning_class_args(EpisodeDataModule, "data", subclass_mode=True)
    parser.link_arguments(*SEED, compute_fn=stream_seed)
    parser.link_arguments(*WAYS)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint of fomal, on the CPU; nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of fomal's, or not whole.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    verify(Path(path))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or "fomal" not in checkpoint:
        raise ValueError(
            f"{path} is not a checkpoint of fomal: give one written by `fomal fit`, or by a trainer around fomal's "
            f"MetaLearner."
        )
    return checkpoint


def build(config: Mapping[str, Any]) -> tuple[MetaLearner, EpisodeDataModule]:
    """Learner, with weights as before training, and data, not loaded yet, of a configuration.

    Args:
        config: with the keys seed_everything, model and data, e.g. a checkpoint's.

    Raises:
        ValueError: it does not fit the classes it names.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    add_arguments(parser)
    wanted = {key: config[key] for key in ("seed_everything", "model", "data")}
    made = _instantiated(parser, wanted)
    return made["model"], made["data"]


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
        if replicas < 2:
            raise ValueError(f"replicas={replicas} must be 2 or more, or null for a run alone.")
        replicas = [{"seed_everything": int(config["seed_everything"]) + place} for place in range(replicas)]
    if len(replicas) < 2:
        raise ValueError(f"replicas={replicas} has fewer than 2 entries: give more, or null for a run alone.")
    return [_varied(config, changes) for changes in replicas]


VARIED = ("seed_everything", "model.inner_optimizer.lr", "model.outer_optimizer.lr")
"""What may differ between replicas."""


def _varied(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    varied = {key: deepcopy(value) for key, value in config.items() if key != "replicas"}
    for name, value in changes.items():
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


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """A network from its class_path and init_args.

    Raises:
        ValueError: they do not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network", required=True)
    network: nn.Module = _instantiated(parser, {"network": dict(config)})["network"]
    return network


def _instantiated(parser: ArgumentParser, config: dict[str, Any]) -> Any:
    try:
        return parser.instantiate(parser.parse_object(config))
    except ArgumentError as error:
        raise ValueError(f"the configuration cannot be used: {error}") from error
