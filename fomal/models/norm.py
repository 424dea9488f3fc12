"""Batch norm by the statistics of the batch at hand, of the support set alone, or of running averages.

Which of them it is belongs to the network: `BatchNorm(statistics=...)`, or `Normalized` around any network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fomal.utils.checks import WIDE, fits_as_weights, nonnegative, one_of, positive

_FIRST: ContextVar[int | None] = ContextVar("_FIRST", default=None)


@contextmanager
def statistics_of_first(examples: int) -> Iterator[None]:
    """Within it, the batch norms that take the statistics of the support set take those of the first examples."""
    token = _FIRST.set(examples)
    try:
        yield
    finally:
        _FIRST.reset(token)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the second, in training and evaluation alike without running averages.

    Computes in float32 at least, so that it is
    right under autocast, and can be vectorised over tasks.

    Args:
        features: channels, the size of the second axis.
        eps: added to the variance; the released code's 1e-3.
        affine: whether to learn a scale and a shift.
        statistics: "batch" normalises with mean and variance of the whole batch, as the released Reptile code; where
            queries are judged, "support" with those of the task's support set alone, so that what is said of a query
            depends on no other one. On a mini-batch of an inner step both are the same.
    """

    def __init__(
        self,
        features: int,
        eps: float = 1e-3,
        affine: bool = True,
        statistics: Literal["batch", "support"] = "batch",
    ) -> None:
        super().__init__()
        one_of(("batch", "support"), statistics=statistics)
        positive(WIDE, features=features)
        nonnegative(eps=eps)
        fits_as_weights("the layer", 2 * features, features=features)
        self.eps = eps
        self.statistics: str = statistics
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if self.statistics == "support" and (first := _FIRST.get()) is not None:
                y = _scaled(_normalized(wide, wide[:first], self.eps), self.weight, self.bias)
            elif self.weight is None and self.bias is None:
                y = nn.functional.batch_norm(wide, None, None, training=True, eps=self.eps)
            else:
                features = x.shape[1]
                weight = wide.new_ones(features) if self.weight is None else self.weight
                bias = wide.new_zeros(features) if self.bias is None else self.bias
                y = batch_norm(wide, weight, bias, self.eps)
        return y.to(x.dtype)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise x (B, C, ...) with its own statistics, then scale by weight (C,) and shift by bias (C,).

    As torch's functions, it can be replaced by a `torch.overrides.TorchFunctionMode`.
    """
    if has_torch_function((x, weight, bias)):
        return handle_torch_function(batch_norm, (x, weight, bias), x, weight, bias, eps)
    # Apart, because torch's batch norm with weights of its own has a wrong second derivative under vmap.
    return _scaled(nn.functional.batch_norm(x, None, None, training=True, eps=eps), weight, bias)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale y (B, C, ...) by weight (C,) and shift it by bias (C,)."""
    channels = (-1,) + (1,) * (y.dim() - 2)
    y = y if weight is None else y * weight.view(channels)
    return y if bias is None else y + bias.view(channels)


def _normalized(x: Tensor, of: Tensor, eps: float) -> Tensor:
    """Normalise x (B, C, ...) by the mean and the standard deviation that each channel has in `of` (n, C, ...)."""
    axes = [0, *range(2, of.dim())]
    variance, mean = torch.var_mean(of, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


class FrozenBatchNorm(nn.Module):
    """Batch norm (B, C, ...) by running averages that stay as they are; scale and shift are parameters as usual.

    Args:
        norm: a batch norm of torch or timm with running averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.eps: float = norm.eps  # type: ignore[assignment]
        self.weight: nn.Parameter | None = norm.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = norm.bias  # type: ignore[assignment]
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, norm.get_buffer(name))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        channels = (-1,) + (1,) * (x.dim() - 2)
        with torch.autocast(x.device.type, enabled=False):
            root = torch.rsqrt(self.running_var.to(wide.dtype) + self.eps)
            y = (wide - self.running_mean.to(wide.dtype).view(channels)) * root.view(channels)
            return _scaled(y, self.weight, self.bias).to(x.dtype)


def set_statistics(network: nn.Module, statistics: str) -> None:
    """Let all batch norms within a network, of torch, timm or fomal, take their statistics from where it is said.

    Args:
        network: changed in place; parameters stay.
        statistics: "batch" or "support", see `BatchNorm`, or "running", the averages that the network has.

    Raises:
        ValueError: there is no batch norm, or one without running averages where these are wanted.
    """
    one_of(("batch", "support", "running"), statistics=statistics)
    own = [module for module in network.modules() if isinstance(module, BatchNorm)]
    known = [module for module in network.modules() if _is_known(module)]
    if not own and not known:
        raise ValueError(f"statistics={statistics!r}, but there is no batch norm in the network.")
    if statistics != "running":
        _replace(network, lambda norm: BatchNorm(norm.num_features, norm.eps, affine=False))  # type: ignore[arg-type]
        for module in network.modules():
            if isinstance(module, BatchNorm):
                module.statistics = statistics
        return
    if own or any(module.running_mean is None for module in known):
        raise ValueError("statistics='running', but a batch norm has no running averages: use 'support' or 'batch'.")
    _replace(network, FrozenBatchNorm)


class Normalized(nn.Module):
    """A network whose batch norms, of torch, timm or fomal, take their statistics from where it is said.

    Args:
        network: any module; its batch norms are replaced in place, their parameters stay.
        statistics: "batch" and "support", see `BatchNorm`; "running" keeps the running averages that the network
            has, e.g. with pretrained weights, and never changes them.

    Raises:
        ValueError: there is no batch norm, or one without running averages where these are wanted.
    """

    def __init__(self, network: nn.Module, statistics: Literal["batch", "support", "running"] = "support") -> None:
        super().__init__()
        self.network = network
        set_statistics(self, statistics)

    def forward(self, x: Any) -> Any:
        """The network's outputs."""
        return self.network(x)


KNOWN = {
    "torch.nn.modules.batchnorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    "timm.layers.norm_act": ("BatchNormAct2d", "SyncBatchNormAct"),
}
"""The batch norms whose forward is known: others may do something else."""


def has_batch_norm(network: nn.Module) -> bool:
    """Tell whether the network says something else of one example where others are in the batch, by a batch norm."""
    return any(isinstance(module, BatchNorm | nn.modules.batchnorm._NormBase) for module in network.modules())


def use_batch_statistics(network: nn.Module) -> list[str]:
    """Replace, in place, every batch norm of torch and timm by one that always uses batch statistics.

    Running averages mean nothing between tasks, and forbid vectorising over them. Others, such as subclasses with a
    forward of their own, are left as they are.

    Returns:
        The names of the modules replaced.

    Raises:
        ValueError: the network is itself such a batch norm.
    """
    if _is_known(network):
        raise ValueError(
            f"the network is a {type(network).__name__} itself, which cannot be replaced in its place: use "
            f"fomal.models.BatchNorm, or put it into a torch.nn.Sequential."
        )
    return _replace(network, lambda norm: BatchNorm(norm.num_features, norm.eps, affine=False))  # type: ignore[arg-type]


def _replace(network: nn.Module, make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """Put what `make` makes of a batch norm of torch or timm in its place, with its parameters; the names."""
    replaced: list[str] = []
    made: dict[int, nn.Module] = {}  # a norm in several places stays one
    for parent_name, parent in list(network.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_known(child):
                if id(child) not in made:
                    made[id(child)] = _in_place_of(child, make(child))
                parent._modules[name] = made[id(child)]
                replaced.append(f"{parent_name}.{name}".lstrip("."))
    return replaced


def uses_support(network: nn.Module) -> bool:
    """True where a batch norm takes the statistics of the support set for queries."""
    return any(isinstance(module, BatchNorm) and module.statistics == "support" for module in network.modules())


def other_norms(network: nn.Module) -> list[str]:
    """The names of modules with running averages that `use_batch_statistics` leaves as they are, with their classes."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    ]


def _is_known(module: nn.Module) -> bool:
    return type(module).__name__ in KNOWN.get(type(module).__module__, ())


def _in_place_of(child: nn.Module, own: nn.Module) -> nn.Module:
    own.weight, own.bias = child.weight, child.bias  # keep the parameters themselves
    norm: nn.Module = own
    if isinstance(act := getattr(child, "act", None), nn.Module):  # timm's norms have one within
        norm = nn.Sequential(own, getattr(child, "drop", nn.Identity()), act)
    for name, value in vars(child).items():
        if "hook" in name and "state_dict" not in name:
            setattr(norm, name, value)
    return norm.train(child.training)
