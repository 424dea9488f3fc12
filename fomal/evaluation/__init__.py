"""How well an initialisation learns: protocols, and means over tasks with their intervals."""

from fomal.evaluation.metrics import TaskMean
from fomal.evaluation.protocols import ClassificationResult, RegressionResult, evaluate

__all__ = ["ClassificationResult", "RegressionResult", "TaskMean", "evaluate"]
