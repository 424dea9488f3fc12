"""fomal: few-shot learners trained with Reptile, first-order MAML and their family, on Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; `__getattr__` imports the same
    from fomal.adaptation import Adapted, Predictions, adapt
    from fomal.evaluation import ClassificationResult, ExampleMetric, Metric, RegressionResult, TaskMetric
    from fomal.inner import InnerOptimizer, Loss
    from fomal.learner import EvalSchedule, Execution, InnerSchedule, MetaLearner, OuterStep
    from fomal.outer import OuterRule
    from fomal.tasks import Episode, EpisodeDataModule

__version__ = "0.1.0"

_PLACES = {
    "adaptation": ("Adapted", "Predictions", "adapt"),
    "evaluation": ("ClassificationResult", "ExampleMetric", "Metric", "RegressionResult", "TaskMetric"),
    "inner": ("InnerOptimizer", "Loss"),
    "learner": ("EvalSchedule", "Execution", "InnerSchedule", "MetaLearner", "OuterStep"),
    "outer": ("OuterRule",),
    "tasks": ("Episode", "EpisodeDataModule"),
}
_FOLDER_OF = {name: folder for folder, names in _PLACES.items() for name in names}

__all__ = [
    "Adapted",
    "ClassificationResult",
    "Episode",
    "EpisodeDataModule",
    "EvalSchedule",
    "ExampleMetric",
    "Execution",
    "InnerOptimizer",
    "InnerSchedule",
    "Loss",
    "MetaLearner",
    "Metric",
    "OuterRule",
    "OuterStep",
    "Predictions",
    "RegressionResult",
    "TaskMetric",
    "adapt",
]


def __getattr__(name: str) -> Any:
    """Import what users call when they call it, since torch and Lightning take seconds."""
    if name not in _FOLDER_OF:
        raise AttributeError(f"module 'fomal' has no attribute {name!r}")
    return getattr(import_module(f"fomal.{_FOLDER_OF[name]}"), name)


def __dir__() -> list[str]:
    """All public names, whether they are imported already or not."""
    return sorted({*globals(), *__all__})
