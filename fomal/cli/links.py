"""Settings that follow from others: seed and ways by links of the parser, a network's other sizes from the data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fomal.cli.checkpoint import imported
from fomal.cli.errors import UsageError
from fomal.cli.given import Given, loaded, short_key
from fomal.inner.loss import Loss
from fomal.learner.build import SEED, WAYS
from fomal.models.classifier import ALIASES, Classifier
from fomal.tasks.datamodule import EpisodeDataModule

NETWORK = "model.network"
# Settings of data that decide no size of a network, beside those of every data module.
_NO_SIZES = {*inspect.signature(EpisodeDataModule).parameters, "root", "cache_dir", "cache_gb", "download", "on_error"}

# Of what is not the number of channels, the setting of the data that it follows.
_SOURCES = {"image_size": "image_size", "img_size": "image_size", "in_features": "image_size", "out_features": "ways"}


def refuse_contradictions(config: Namespace, given: Given) -> None:
    """Raise UsageError where a linked setting was given another value than its source: it would be ignored.

    A value from an earlier config file than the source's does not count: the user has changed the source since.
    """
    for source, target in (SEED, WAYS):
        key = short_key(target)
        if key in given.values and source in config and target in config:
            expected, value = config[source], loaded(given.values[key], key)
            differs = value != expected or isinstance(value, bool) != isinstance(expected, bool)
            if differs and given.place(key) >= given.place(short_key(source)):
                raise _contradiction(key, value, f"{short_key(source)}={expected}", short_key(source))


def follow_data(config: Namespace, given: Given) -> None:
    """Give the network the sizes that follow from the data, in place: channels and size of images, inputs and outputs.

    The network's own sizes, given before the data were changed, give way; those of a network of the user's own that
    were given with the data or later stay.

    Raises:
        UsageError: a size of a network of fomal's was given that contradicts the data.
    """
    network = config.model.network
    if not isinstance(network, Namespace) or not (sizes := _sizes(config)):
        return
    kind = imported(network.class_path)
    if "init_args" not in network:
        network.init_args = Namespace()  # type: ignore[no-untyped-call]
    arguments = network.init_args
    ours = kind.__module__.startswith("fomal.")
    named = _parameters(kind) & sizes.keys() - {"ways"}
    for name in named - (set() if ours else {"in_features", "out_features"}):  # which may be of a layer elsewhere
        if _gives_way(f"{NETWORK}.{name}", sizes[name], config, given, ours):
            arguments[name] = sizes[name]
    if kind is Classifier and (options := arguments.get("options")):
        for alias, name in ALIASES.items():
            key = f"{NETWORK}.options.{alias}"
            if alias in options and name in sizes and _gives_way(key, sizes[name], config, given, ours):
                options[alias] = sizes[name]


def _gives_way(key: str, size: Any, config: Namespace, given: Given, ours: bool) -> bool:
    """Tell whether what was given as `key`, if anything, makes room for the data's size; see `follow_data`."""
    if key not in given.values or _same(value := loaded(given.values[key], key), size):
        return True
    decides = [name for name in given.values if name.partition(".")[0] == "data" and name[5:] not in _NO_SIZES]
    if given.place(key) < max(map(given.place, decides), default=0):
        return True
    if not ours:
        return False
    name = _SOURCES.get(key.split(".")[-1], "color")
    settings = config.data.get("init_args") or {}
    source = f"data.{name}" if name in settings else "data"
    raise _contradiction(key, value, f"{source}={settings.get(name, config.data.class_path)}", source)


def _contradiction(key: str, value: Any, follows: str, source: str) -> UsageError:
    return UsageError(f"{key}={value} was given, but it follows {follows}: leave it out, or change {source}.")


def _sizes(config: Namespace) -> Mapping[str, Any]:
    """The sizes that the data and the loss say; none where they cannot be built, which is told when they are."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(EpisodeDataModule, "data", subclass_mode=True)
    try:
        data: EpisodeDataModule = parser.instantiate(Namespace(data=config.data.clone())).data  # type: ignore[no-untyped-call]
    except Exception:
        return {}
    sizes, loss = dict(data.network_sizes()), _loss(config)
    if loss is not None and "out_features" in sizes:
        sizes["out_features"] = loss.outputs(sizes["out_features"])
    return sizes


def _loss(config: Namespace) -> Loss | None:
    """The loss of the configuration; None where there is none, or where it cannot be built."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Loss, "loss", required=False)
    given = config.model.get("loss") or config.model.get("query_loss")
    try:
        return parser.instantiate(Namespace(loss=given.clone())).loss if given else None  # type: ignore[no-untyped-call]
    except Exception:
        return None


def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _same(a: Any, b: Any) -> bool:
    square = {tuple(x) if isinstance(x, list | tuple) else (x, x) for x in (a, b)}
    return len(square) == 1 and not isinstance(a, bool)
