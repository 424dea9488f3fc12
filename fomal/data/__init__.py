"""Data sets: where tasks come from, one file for each."""

from fomal.data.cifar_fs import CIFARFSDataModule, FC100DataModule
from fomal.data.glyphs import GlyphDataModule
from fomal.data.image_folder import ImageFolderDataModule
from fomal.data.mini_imagenet import MiniImageNetDataModule
from fomal.data.omniglot import OmniglotDataModule
from fomal.data.sinusoid import SinusoidDataModule
from fomal.data.taskset import TasksetDataModule
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode

__all__ = [
    "CIFARFSDataModule",
    "Episode",
    "EpisodeDataModule",
    "FC100DataModule",
    "GlyphDataModule",
    "ImageFolderDataModule",
    "MiniImageNetDataModule",
    "OmniglotDataModule",
    "SinusoidDataModule",
    "TasksetDataModule",
]
