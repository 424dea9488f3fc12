"""Networks; any other `torch.nn.Module` works as well."""

from fomal.models.conv4 import Conv4
from fomal.models.mlp import MLP
from fomal.models.norm import BatchNorm

__all__ = ["MLP", "BatchNorm", "Conv4"]
