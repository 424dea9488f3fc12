"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from fomal.utils.checks import WIDE, fits_as_weights, numbers, one_of, positive

_ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class MLP(nn.Module):
    """Linear layers with an activation between them; the defaults are the paper's sine-wave network, 1-64-64-1 tanh.

    Args:
        in_features: inputs; inputs of more than one axis are flattened.
        out_features: outputs.
        hidden: widths of the hidden layers.
        activation: what stands between the layers.
    """

    def __init__(
        self,
        in_features: int = 1,
        out_features: int = 1,
        hidden: Sequence[int] = (64, 64),
        activation: Literal["tanh", "relu", "gelu"] = "tanh",
    ) -> None:
        super().__init__()
        one_of(_ACTIVATIONS, activation=activation)
        positive(WIDE, in_features=in_features, out_features=out_features)
        numbers(hidden=hidden)
        for width in hidden:
            positive(WIDE, hidden=width)
        widths = [in_features, *hidden, out_features]
        weights = sum(width * following for width, following in pairwise(widths))
        fits_as_weights("the network", weights, in_features=in_features, hidden=list(hidden), out_features=out_features)
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (width, following) in enumerate(pairwise(widths)):
            layers += [_ACTIVATIONS[activation]()] if i else []
            layers.append(nn.Linear(width, following))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *input) to (B, out_features)."""
        return self.layers(x)  # type: ignore[no-any-return]
