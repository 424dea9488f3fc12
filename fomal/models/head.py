"""The layer that makes a network's outputs, and the same for another number of classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fomal.models.parameters import other_places
from fomal.utils.checks import WIDE, fits_as_weights, one_of, positive


def find_head(network: nn.Module, ways: int | None = None) -> str:
    """The name of the layer that makes the outputs: the `nn.Linear` or 1x1 `nn.Conv2d` that was registered last.

    Args:
        network: any module.
        ways: the outputs of the network, where known: layers with another number are passed over.

    Returns:
        A name as in `named_modules`, e.g. "head" of a `Conv4`; empty where `network` is such a layer itself.

    Raises:
        ValueError: there is no such layer.
    """
    heads: list[str] = [
        name for name, module in network.named_modules() if _is_layer(module) and ways in (None, outputs(module))
    ]
    if not heads:
        wanted = "" if ways is None else f" with {ways} outputs"
        raise ValueError(
            f"{type(network).__name__} has no head, no torch.nn.Linear or 1x1 torch.nn.Conv2d{wanted}: end it with one."
        )
    return heads[-1]


def resize_head(network: nn.Module, ways: int, init: Literal["mean", "new"] = "mean", name: str | None = None) -> str:
    """Give the head `ways` outputs, in place; its class, dtype, device and `requires_grad` stay.

    Optimisers made before still hold the old parameters.

    Args:
        network: any module.
        ways: classes.
        init: "mean" makes every row the mean of the old ones, which is what a meta-learnt head says of a class it
            has not met; "new" is the layer's own initialisation, with torch's generator.
        name: of the head; None finds it.

    Returns:
        The name of the head.

    Raises:
        ValueError: there is no head, or it cannot be resized.
    """
    positive(WIDE, ways=ways)
    one_of(("mean", "new"), init=init)
    name = find_head(network) if name is None else name
    head = network.get_submodule(name)
    if not _is_layer(head):
        raise ValueError(f"name={name!r} is a {type(head).__name__}: name a torch.nn.Linear or 1x1 torch.nn.Conv2d.")
    if not isinstance(head.weight, nn.Parameter):
        raise ValueError(f"the weight of {name!r} is computed from others (parametrised): take that off first.")
    if elsewhere := other_places(network, name):
        raise ValueError(
            f"the weight of {name!r} is also that of {elsewhere[0]!r} (tied), which cannot get other rows: give the "
            f"network a head of its own."
        )
    fits_as_weights("the head", ways * head.weight[0].numel(), ways=ways)
    for key in ("weight", "bias"):
        if isinstance(parameter := getattr(head, key), nn.Parameter):
            setattr(head, key, nn.Parameter(mean_rows(parameter.detach(), ways), parameter.requires_grad))
    if isinstance(head, nn.Linear):
        head.out_features = ways
    elif isinstance(head, nn.Conv2d):
        head.out_channels = ways
    if init == "new":
        head.reset_parameters()  # type: ignore[operator]
    return name


def mean_rows(tensor: Tensor, ways: int) -> Tensor:
    """`ways` times the mean row: (R, ...) -> (ways, ...).

    For the weight and the bias of a head, and for an inner optimiser's moments of them.
    """
    return tensor.mean(0, keepdim=True).repeat(ways, *[1] * (tensor.dim() - 1))


def outputs(layer: nn.Module) -> int:
    """The outputs of a linear layer or convolution."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _is_layer(module: nn.Module) -> bool:
    """Tell whether `module` can be a head."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)
