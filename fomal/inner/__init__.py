"""One task's adaptation, vectorised over tasks."""

from fomal.inner.adam import Adam
from fomal.inner.optimizer import InnerOptimizer
from fomal.inner.sgd import SGD
from fomal.inner.sgld import SGLD

__all__ = ["SGD", "SGLD", "Adam", "InnerOptimizer"]
