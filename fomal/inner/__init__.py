"""One task's adaptation, vectorised over tasks."""

from fomal.inner.adam import Adam
from fomal.inner.optimizer import InnerOptimizer
from fomal.inner.sgd import SGD

__all__ = ["SGD", "Adam", "InnerOptimizer"]
