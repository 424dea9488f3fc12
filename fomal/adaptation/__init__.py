"""From a checkpoint to answers about a user's own images."""

from fomal.adaptation.from_checkpoint import adapt
from fomal.adaptation.model import Adapted, Predictions

__all__ = ["Adapted", "Predictions", "adapt"]
