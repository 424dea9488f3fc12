"""One task's adaptation, vectorised over tasks: losses and inner optimisers."""

from fomal.inner.adam import Adam
from fomal.inner.loss import Loss
from fomal.inner.loss_of_labels import BradleyTerry, CrossEntropy
from fomal.inner.loss_of_targets import (
    BinaryCrossEntropy,
    Elementwise,
    GaussianLikelihood,
    Huber,
    Quantile,
    SquaredError,
)
from fomal.inner.optimizer import InnerOptimizer
from fomal.inner.sgd import SGD
from fomal.inner.sgld import SGLD

__all__ = [
    "SGD",
    "SGLD",
    "Adam",
    "BinaryCrossEntropy",
    "BradleyTerry",
    "CrossEntropy",
    "Elementwise",
    "GaussianLikelihood",
    "Huber",
    "InnerOptimizer",
    "Loss",
    "Quantile",
    "SquaredError",
]
