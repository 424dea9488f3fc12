"""What a task is, and where it comes from."""

from fomal.data.datamodule import EpisodeDataModule
from fomal.data.episode import Episode
from fomal.data.omniglot import OmniglotDataModule
from fomal.data.sinusoid import SinusoidDataModule

__all__ = ["Episode", "EpisodeDataModule", "OmniglotDataModule", "SinusoidDataModule"]
