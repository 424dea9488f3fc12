"""Tasks: episodes, how their examples are sampled, and the stream of them."""

from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode

__all__ = ["Episode", "EpisodeDataModule"]
