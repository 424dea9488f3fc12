"""Batch norm that always normalises with the statistics of the batch at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function


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
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            if self.weight is not None and self.bias is not None:
                y = batch_norm(wide, self.weight, self.bias, self.eps)
            else:
                y = nn.functional.batch_norm(wide, None, None, training=True, eps=self.eps)
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


def has_batch_norm(network: nn.Module) -> bool:
    """Whether what the network says of one example depends on the others in the batch, by a `BatchNorm`."""
    return any(isinstance(module, BatchNorm) for module in network.modules())


def use_batch_statistics(network: nn.Module) -> list[str]:
    """Replace, in place, every batch norm of torch by one that always uses batch statistics.

    Running averages mean nothing between tasks, and forbid vectorising over them.

    Returns:
        The names of the modules replaced.
    """
    replaced = []
    for parent_name, parent in list(network.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                own = BatchNorm(child.num_features, child.eps, affine=False)
                own.weight, own.bias = child.weight, child.bias  # keep the parameters themselves
                norm: nn.Module = own
                if isinstance(act := getattr(child, "act", None), nn.Module):  # timm's norms have one within
                    norm = nn.Sequential(own, getattr(child, "drop", nn.Identity()), act)
                setattr(parent, name, norm)
                replaced.append(f"{parent_name}.{name}".lstrip("."))
    return replaced
