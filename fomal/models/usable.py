"""Networks that an inner loop cannot work with, refused before work starts, by one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fomal.utils.checks import first_line
from fomal.utils.fingerprint import changes
from fomal.utils.pytree import Data, described, is_data, leaves


def refuse_unusable(network: nn.Module) -> None:
    """Check a network by itself.

    Raises:
        ValueError: it is compiled, scripted or in a wrapper for several devices, has parameters without values, or none
            to adapt.
    """
    name = type(network).__name__
    if not isinstance(network, nn.Module):
        raise ValueError(f"model.network is a {name}, not a torch.nn.Module: give a network.")
    for place, module in network.named_modules():
        where = (
            f"model.network is a {name}" if not place else f"{place!r} in model.network is a {type(module).__name__}"
        )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{where}, scripted or traced by torch.jit, which cannot be vectorised or given other parameters: give "
                f"the module that it was made of."
            )
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{where}, compiled by torch.compile already, which does not see the inner loop: give the module "
                f"itself, and model.execution.compiled: true."
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise ValueError(f"{where}: give the module within, and trainer.devices with trainer.strategy: ddp.")
    if lazy := [key for key, t in [*network.named_parameters(), *network.named_buffers()] if is_lazy(t)]:
        raise ValueError(
            f"{lazy[0]!r} of model.network has no shape yet (a lazy module): call the network on an example first, or "
            f"give its sizes."
        )
    if not any(True for _ in network.parameters()):
        raise ValueError(f"model.network, a {name}, has no parameters: there is nothing to learn.")
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(
            f"all parameters of model.network, a {name}, are frozen: there is nothing to learn; set requires_grad of "
            f"some."
        )
    for key, p in network.named_parameters():
        if p.requires_grad and not p.is_floating_point():
            raise ValueError(f"{key!r} of model.network has dtype {p.dtype}: use floating-point parameters.")


def checked(network: nn.Module, y: Data) -> Callable[[Data], Data]:
    """The network as a function of inputs (B, *input) that refuses outputs no loss can do with.

    Args:
        network: any module.
        y: what its outputs are compared with, for the messages.

    Returns:
        A function that raises ValueError where the network fails, changes a buffer, or returns something else than a
        floating-point tensor, or nested dicts of tensors with one of these at least.
    """
    wanted = "logits" if isinstance(y, Tensor) and not y.is_floating_point() else "targets"

    def forward(x: Data) -> Data:
        output = _run(network, x)
        if not is_data(output):
            raise ValueError(
                f"model.network returns {described(output, 1)} rather than a tensor of {wanted}: let its forward "
                f"return these alone, or nested dicts of tensors alone."
            )
        if not any(t.is_floating_point() for t in leaves(output)):
            kind = output.dtype if isinstance(output, Tensor) else described(output)
            raise ValueError(f"model.network returns {kind}: let its forward return floating-point {wanted}.")
        return output

    return forward


def _run(network: nn.Module, x: Data) -> Any:
    before = {name: changes(t) for name, t in network.named_buffers()}
    try:
        output = network(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of users' modules: many kinds
        one = isinstance(x, Tensor)
        shapes = f"{tuple(x.shape[1:])} per example of {x.dtype}" if one else f"{described(x, 1)} per example"
        raise ValueError(
            f"model.network does not take the data's inputs, {shapes} ({first_line(error)}): give the network their "
            f"size, e.g. its image_size and in_channels, and its dtype."
        ) from error
    if changed := [name for name, t in network.named_buffers() if changes(t) != before.get(name, 0)]:
        raise ValueError(
            f"the forward of model.network changes its buffer {changed[0]!r} in place, as running averages do, "
            f"which the inner loop cannot, and which mean nothing between tasks: use track_running_stats=False, or "
            f"fomal.models.BatchNorm."
        )
    return output
