"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from fomal.checks import one_of

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
        widths = [in_features, *hidden, out_features]
        if min(widths) < 1:
            raise ValueError(f"in_features, hidden and out_features are {widths}: every width must be at least 1.")
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (width, following) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layers += [_ACTIVATIONS[activation]()] if i else []
            layers.append(nn.Linear(width, following))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *input) to (B, out_features)."""
        return self.layers(x)  # type: ignore[no-any-return]
