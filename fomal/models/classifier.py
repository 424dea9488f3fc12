"""Any classifier of torchvision, timm or one's own, with a head for the classes of a task."""

from __future__ import annotations

import inspect
import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fomal.models.head import find_head, outputs, resize_head
from fomal.models.norm import set_statistics
from fomal.utils.checks import positive

ALIASES = {
    "in_channels": "in_channels",
    "in_chans": "in_channels",
    "image_size": "image_size",
    "img_size": "image_size",
}
"""Names that factories have for the sizes of images."""


class Classifier(nn.Module):
    """The network of `factory(**options)`, its head (last linear layer or 1x1 convolution) resized to `ways` classes.

    The head is initialised anew, as torch does; all else is as the factory makes it, pretrained or not:

        {factory: torchvision.models.resnet18, options: {weights: DEFAULT}}
        {factory: timm.create_model, options: {model_name: resnet18, pretrained: true}}

    Batch norm will use the statistics of the batch at hand, unless `statistics` says otherwise: `MetaLearner` replaces
    torch's, since running averages mean nothing between tasks, so those of pretrained weights are not used. Images go
    to the network as the data module makes them: those of ImageNet's mean and standard deviation are not applied here.

    Args:
        factory: import path of a function or class that makes a module from images (B, C, H, W) to logits.
        ways: classes, the size of the output.
        options: keyword arguments for it.
        in_channels: channels of the images, for a factory that names them so, or `in_chans`, where options do not.
        image_size: height and width of the images, or both, for a factory that names it so, or `img_size`, likewise.
        statistics: of the batch norms, "support" or "running", see `Normalized`; null: those of the batch.

    Raises:
        ValueError: there is nothing to import at `factory`, nothing says that it makes a network (then it is not
            called), it fails, or what it makes is no classifier with one head.
    """

    def __init__(
        self,
        factory: str,
        ways: int = 5,
        options: dict[str, Any] | None = None,
        in_channels: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        statistics: Literal["batch", "support", "running"] | None = None,
    ) -> None:
        super().__init__()
        positive(ways=ways)
        network = _make(factory, options or {}, {"in_channels": in_channels, "image_size": image_size})
        if getattr(network, "aux_logits", False):
            raise ValueError(
                f"factory={factory!r} made a network with auxiliary outputs, which have no place in the inner loop: "
                f"set options: {{aux_logits: false}}."
            )
        resize_head(network, ways, "new", _only_head(network, factory))
        _adjust(network)
        self.factory = factory
        self.network = network
        if statistics is not None:
            set_statistics(self, statistics)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, ways).

        Raises:
            ValueError: the network returns something else than a tensor.
        """
        logits = self.network(x)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"the network of factory={self.factory!r} returns a {type(logits).__name__} rather than logits: "
                f"choose one, or options, without further outputs."
            )
        return logits


def _make(factory: str, options: dict[str, Any], sizes: dict[str, Any]) -> nn.Module:
    make = _imported(factory)
    if not callable(make):
        raise ValueError(f"factory={factory!r} is a {type(make).__name__}: name a function or class in it.")
    if not _makes_networks(make, factory):
        raise ValueError(
            f"factory={factory!r} is not called, since nothing says that it makes a network: name a subclass of "
            f"torch.nn.Module, or a function of a package of your own or annotated to return one."
        )
    options = {name: sizes[ALIASES[name]] for name in ALIASES if _takes(make, name, sizes)} | options
    try:
        network = make(**options)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"factory={factory!r} with options={options} fails: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"factory={factory!r} made a {type(network).__name__}, not a torch.nn.Module.")
    return network


def _makes_networks(make: Any, path: str) -> bool:
    """Tell whether a class or function makes modules; a function of Python's or torch's own must be annotated.

    A function without annotation counts if it is defined in the package that `path` names.
    """
    if inspect.isclass(make):
        return issubclass(make, nn.Module)
    if not inspect.isfunction(make):
        return False
    try:
        returned = get_type_hints(make).get("return")
    except Exception:  # annotations may name anything
        returned = None
    if inspect.isclass(returned):
        return issubclass(returned, nn.Module)
    package = make.__module__.partition(".")[0]
    known = {*sys.stdlib_module_names, "torch", "numpy", "fomal", "lightning", "jsonargparse", "PIL"}
    return package not in known - {"__main__"} and package == path.partition(".")[0]


def _takes(make: Any, name: str, sizes: dict[str, Any]) -> bool:
    try:
        return sizes[ALIASES[name]] is not None and name in inspect.signature(make).parameters
    except (TypeError, ValueError):  # there is no signature to look at
        return False


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(path.split(".")):
        raise ValueError(f"factory={path!r} is no import path: write e.g. torchvision.models.resnet18.")
    try:
        with torch.device("cpu"):  # a module's own tensors, wherever the network is made
            module = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        remedy = "pip install timm" if missing == "timm" else "check its spelling, and that Python finds it from here"
        raise ValueError(f"factory={path!r} cannot be imported, there is no module {missing!r}: {remedy}.") from error
    if not hasattr(module, name):
        near = get_close_matches(name, [known for known in dir(module) if not known.startswith("_")])
        hint = f" - did you mean {' or '.join(f'{module_name}.{known}' for known in near)}?" if near else "."
        raise ValueError(f"factory={path!r} cannot be imported: {module_name} has no {name!r}{hint}")
    return getattr(module, name)


def _only_head(network: nn.Module, factory: str) -> str:
    """The name of the head; refuses a network with several, or without: there many layers have as many outputs."""
    name = find_head(network)
    head = network.get_submodule(name)
    kind = nn.Linear if isinstance(head, nn.Linear) else nn.Conv2d
    alike = [n for n, m in network.named_modules() if isinstance(m, kind) and outputs(m) == outputs(head)]
    if len(alike) > 1:
        raise ValueError(
            f"factory={factory!r} made a {type(network).__name__} without a single head: {len(alike)} layers have "
            f"{outputs(head)} outputs, {', '.join(alike[-2:])} among them. Choose a classifier with one head, or give "
            f"it, in options, a number of classes that no other layer has."
        )
    return name


def _adjust(network: nn.Module) -> None:
    """Replace, in place, what could not be vectorised over tasks, by the same in another form."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, StochasticDepth):
                setattr(parent, name, _StochasticDepth(child.p, child.mode))


class _StochasticDepth(nn.Module):
    """torchvision's `StochasticDepth`, which fills a new tensor in place: vmap refuses that."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.by_batch = mode == "batch"

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same: in training, residual branches zeroed at random, the others scaled up."""
        if not self.training or self.p == 0:
            return x
        draws = 1 if self.by_batch else len(x)
        kept = torch.rand(draws, *[1] * (x.dim() - 1), dtype=torch.float32, device=x.device) >= self.p
        return x * kept / (1 - self.p if self.p < 1 else 1)
