"""Batch norm that always normalises with the statistics of the batch at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fomal.utils.checks import WIDE, fits_as_weights, nonnegative, positive


class BatchNorm(nn.Module):
    """Batch norm over all axes but the second, with batch statistics in training and evaluation alike.

    There are no running averages, as in the released Reptile code. Computes in float32 at least, so that it is
    right under autocast, and can be vectorised over tasks.

    Args:
        features: channels, the size of the second axis.
        eps: added to the variance; the released code's 1e-3.
        affine: whether to learn a scale and a shift.
    """

    def __init__(self, features: int, eps: float = 1e-3, affine: bool = True) -> None:
        super().__init__()
        positive(WIDE, features=features)
        nonnegative(eps=eps)
        fits_as_weights("the layer", 2 * features, features=features)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if self.weight is None and self.bias is None:
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
    channels = (-1,) + (1,) * (x.dim() - 2)
    y = nn.functional.batch_norm(x, None, None, training=True, eps=eps)
    return y * weight.view(channels) + bias.view(channels)


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
    replaced: list[str] = []
    made: dict[int, nn.Module] = {}  # a norm in several places stays one
    for parent_name, parent in list(network.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_known(child):
                if id(child) not in made:
                    made[id(child)] = _with_batch_statistics(child)
                parent._modules[name] = made[id(child)]
                replaced.append(f"{parent_name}.{name}".lstrip("."))
    return replaced


def other_norms(network: nn.Module) -> list[str]:
    """The names of modules with running averages that `use_batch_statistics` leaves as they are, with their classes."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
    ]


def _is_known(module: nn.Module) -> bool:
    return type(module).__name__ in KNOWN.get(type(module).__module__, ())


def _with_batch_statistics(child: nn.Module) -> nn.Module:
    own = BatchNorm(child.num_features, child.eps, affine=False)  # type: ignore[arg-type]
    own.weight, own.bias = child.weight, child.bias  # type: ignore[assignment] # keep the parameters themselves
    norm: nn.Module = own
    if isinstance(act := getattr(child, "act", None), nn.Module):  # timm's norms have one within
        norm = nn.Sequential(own, getattr(child, "drop", nn.Identity()), act)
    for name, value in vars(child).items():
        if "hook" in name and "state_dict" not in name:
            setattr(norm, name, value)
    return norm.train(child.training)
