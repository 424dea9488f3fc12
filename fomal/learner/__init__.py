"""The meta-learner as a LightningModule, its settings and its checks."""

from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import EvalSchedule, Execution, InnerSchedule, OuterStep

__all__ = ["EvalSchedule", "Execution", "InnerSchedule", "MetaLearner", "OuterStep"]
