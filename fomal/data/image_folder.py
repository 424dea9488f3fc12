"""Tasks from a user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fomal.checks import nonnegative, one_of
from fomal.data.image_files import ImageFilesDataModule
from fomal.data.listing import Listed, Listing, by_csv, by_folders
from fomal.data.partition import How, partition
from fomal.data.source import Source, open_source


class ImageFolderDataModule(ImageFilesDataModule):
    """N-way K-shot tasks from a folder or zip of images, one folder for each class or a CSV file with their classes.

    Args:
        root: folder or zip with the images; folders that hold nothing but one other folder are passed over.
        labels: CSV file with the columns filename, label and, if wanted, split; None: the folder of an image is its
            class.
        split: which classes are trained on, validated on and tested on. "given": as the folders train/, val/ and
            test/ or the column split say; "lists": the three lists below, of which others are left out; "share": a
            random choice among all classes; "auto": lists if there are any, else as given, else by share. Without
            validation classes, validation has tasks from the training classes.
        train_classes: names of classes, or a file with one on each line.
        val_classes: likewise.
        test_classes: likewise.
        val_share: share of the classes that "share" takes for validation.
        test_share: likewise, for testing.
        partition_seed: seed of "share"; apart from `seed`, so that new tasks never turn training classes into test
            classes.
        kwargs: see `ImageFilesDataModule`: image size, colours, normalisation, cache and what to do about damaged
            files.
    """

    partition_settings = frozenset(
        {
            *("labels", "split", "train_classes", "val_classes", "test_classes", "val_share", "test_share"),
            *("partition_seed", "rotations", "new_classes"),
        }
    )

    def __init__(
        self,
        root: str,
        labels: str | None = None,
        split: How = "auto",
        train_classes: list[str] | str | None = None,
        val_classes: list[str] | str | None = None,
        test_classes: list[str] | str | None = None,
        val_share: float = 0.2,
        test_share: float = 0.2,
        partition_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        one_of(("auto", "given", "lists", "share"), split=split)
        nonnegative(val_share=val_share, test_share=test_share, partition_seed=partition_seed)
        self.labels = labels
        self.split = split
        self.lists = {"train": train_classes, "val": val_classes, "test": test_classes}
        self.shares = val_share, test_share
        self.partition_seed = partition_seed

    def find(self) -> tuple[Source, Listing]:
        """The files, and their classes."""
        source = open_source(self.root, cache_gb=self.cache_gb)
        return source, by_folders(source) if self.labels is None else by_csv(source, self.labels)

    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The classes of each split."""
        return partition(files, self.split, self.lists, self.shares, self.partition_seed)
