"""Lightning callbacks: progress, checkpoints, results and figures of a run."""

from fomal.callbacks.alignment import GradientAlignment
from fomal.callbacks.checkpoint import SaveLast
from fomal.callbacks.episode_grid import EpisodeGrid
from fomal.callbacks.figures import AdaptationFigure, LearningCurve
from fomal.callbacks.progress import MetaProgressBar
from fomal.callbacks.replicas import ReplicaFiles
from fomal.callbacks.results import PredictionsFile, ResultsFile
from fomal.callbacks.signals import ExitOnSigterm

__all__ = [
    "AdaptationFigure",
    "ExitOnSigterm",
    "EpisodeGrid",
    "GradientAlignment",
    "LearningCurve",
    "MetaProgressBar",
    "PredictionsFile",
    "ReplicaFiles",
    "ResultsFile",
    "SaveLast",
]
