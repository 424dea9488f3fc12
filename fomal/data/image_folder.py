"""Tasks from a user's own images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fomal.data.images.columns import TableSettings
from fomal.data.images.image_files import ImageFilesDataModule
from fomal.data.images.listing import Listed, Listing
from fomal.data.images.manifest import list_images
from fomal.data.images.partition import How, partition
from fomal.data.images.selection import Selection
from fomal.data.images.source import Source, open_source
from fomal.tasks.philox import LARGEST_SEED
from fomal.utils.checks import countable, nonnegative, one_of


class ImageFolderDataModule(ImageFilesDataModule):
    """N-way K-shot tasks from a folder or zip of images, one folder for each class or a CSV file with their classes.

    Args:
        root: folder or zip with the images; folders that hold nothing but one other folder are passed over.
        labels: CSV file, JSON lines or JSON with a column of files, one of classes and, if wanted, one of splits; or
            one for each split, as {"train": "a.csv", ...} or as ["train.csv", ...]. None: Hugging Face's metadata.csv
            or metadata.jsonl if there are such files, else the folder of an image is its class.
        file_column: name of the column with the files; None: filename, file_name, path, image or the like.
        label_column: likewise, with the classes; None: label, class, category, target or the like.
        split_column: likewise, with the splits; None: split, set or partition.
        separator: of the table's cells; None: the comma, semicolon, tab or bar that its first line has.
        encoding: of the table, e.g. "cp1252" or "latin-1"; None: UTF-8, or UTF-16 where its beginning says so.
        include: patterns of file names, e.g. "*.jpg", or of paths if they have a slash; only images that match one are
            used. Capitals are as small letters.
        exclude: likewise, e.g. "*_mask.*"; images that match one are left out.
        split: which classes are trained on, validated on and tested on. "given": as the folders train/, val/ and
            test/ or the column split say, also as training, valid, validation, dev, testing, eval or evaluation, in
            small letters or capitals; "lists": the three lists below, of which others are left out; "share": a random
            choice among all classes; "auto": lists if there are any, else as given, else by share. Without validation
            classes, validation has tasks from the training classes.
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

    division_advice = ", by data.val_share and data.test_share or by lists of classes, e.g. data.test_classes"
    partition_settings = frozenset(
        {
            *("labels", "file_column", "label_column", "split_column", "separator", "encoding", "include", "exclude"),
            *("split", "train_classes", "val_classes", "test_classes", "val_share", "test_share"),
            *("partition_seed", "rotations", "new_classes"),
        }
    )

    def __init__(
        self,
        root: str,
        labels: dict[str, str] | list[str] | str | None = None,
        file_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        separator: str | None = None,
        encoding: str | None = None,
        include: list[str] | str | None = None,
        exclude: list[str] | str | None = None,
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
        nonnegative(val_share=val_share, test_share=test_share)
        countable(LARGEST_SEED, partition_seed=partition_seed)
        self.labels = labels
        self.table = TableSettings(file_column, label_column, split_column, separator, encoding)
        self.selection = Selection.of(include, exclude)
        self.split = split
        self.lists = {"train": train_classes, "val": val_classes, "test": test_classes}
        self.shares = val_share, test_share
        self.partition_seed = partition_seed

    def find(self) -> tuple[Source, Listing]:
        """The files, and their classes."""
        source = open_source(self.root, cache_gb=self.cache_gb)
        return source, list_images(source, self.labels, self.table, self.selection, self.on_error)

    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The classes of each split."""
        return partition(files, self.split, self.lists, self.shares, self.partition_seed)
