"""The meta-learner as a LightningModule, its settings and its checks."""

from fomal.learner.meta_learner import MetaLearner

__all__ = ["MetaLearner"]
