"""Networks; any other `torch.nn.Module` works as well."""

from fomal.models.classifier import Classifier
from fomal.models.conv4 import Conv4
from fomal.models.head import find_head, mean_rows, resize_head
from fomal.models.mlp import MLP
from fomal.models.norm import BatchNorm, Normalized
from fomal.models.resnet12 import ResNet12

__all__ = ["MLP", "BatchNorm", "Classifier", "Conv4", "Normalized", "ResNet12", "find_head", "mean_rows", "resize_head"]
