"""The meta-learner as a LightningModule, its settings and its checks."""

from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule, OuterStep

__all__ = ["Execution", "InnerSchedule", "MetaLearner", "OuterStep"]
