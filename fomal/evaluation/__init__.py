"""Judging how well an initialisation learns: protocols, metrics, and means over tasks with their intervals."""

from fomal.evaluation.means import TaskMean
from fomal.evaluation.metrics import ExampleMetric, Metric, QueryLoss, TaskMetric
from fomal.evaluation.metrics_of_labels import Accuracy, NegativeLogLikelihood, TopKAccuracy
from fomal.evaluation.metrics_of_targets import MeanAbsoluteError, MeanSquaredError
from fomal.evaluation.protocols import ClassificationResult, RegressionResult, evaluate
from fomal.evaluation.torch_metric import CalibrationError, MacroF1, MeanIoU, TorchMetric

__all__ = [
    "Accuracy",
    "CalibrationError",
    "ClassificationResult",
    "ExampleMetric",
    "MacroF1",
    "MeanAbsoluteError",
    "MeanIoU",
    "MeanSquaredError",
    "Metric",
    "NegativeLogLikelihood",
    "QueryLoss",
    "RegressionResult",
    "TaskMean",
    "TaskMetric",
    "TopKAccuracy",
    "TorchMetric",
    "evaluate",
]
