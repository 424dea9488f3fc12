"""Omniglot: hand-drawn characters of 50 alphabets (Lake, Salakhutdinov & Tenenbaum 2015)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Omniglot
from torchvision.datasets.utils import download_url

from fomal.data.images.image_files import ImageFilesDataModule
from fomal.data.images.image_format import ImageFormat, Refused
from fomal.data.images.listing import Listed, Listing, sorted_listing
from fomal.data.images.source import JoinedSource, Source, open_source
from fomal.tasks.philox import LARGEST_SEED
from fomal.tasks.sampler import shuffled
from fomal.utils.checks import countable, one_of, positive

PARTS = ("images_background", "images_evaluation")
SIDE = 105  # pixels of a drawing
_PLACES = ("", Omniglot.folder)  # below root; torchvision puts its copy into the second


class OmniglotDataModule(ImageFilesDataModule):
    """N-way K-shot tasks from Omniglot's 1623 characters with 20 drawings each (Nichol et al. 2018, 6.1).

    Drawings are shrunk by taking the nearest pixel, as in the released code, and are black (0) on white (1).

    After `setup`, `classes` holds each split and `characters` its names "part/alphabet/character"; with
    `rotations`, training classes 4 i .. 4 i + 3 are those of training character i.

    Args:
        root: folder with `images_background` and `images_evaluation`, each as the zip of the original
            distribution or as the folder extracted from it; also `torchvision.datasets.Omniglot`'s root.
        download: fetch what `root` lacks.
        image_size: height and width of the images, in pixels.
        rotations: a training character turned by 0, 90, 180 and 270 degrees makes four classes; validation
            and test characters are never turned.
        partition: "random": `train_classes` random characters of both parts for training, the others for
            testing, as in the paper; "alphabet": the alphabets of `images_background` for training, those of
            `images_evaluation` for testing.
        train_classes: training characters, before rotation, of the random partition.
        val_classes: validation characters, taken out of the training characters; 0 validates on tasks from
            the training characters themselves.
        partition_seed: seed of the random choices of characters; apart from `seed`, so that new tasks never
            turn training characters into test characters.
        kwargs: see `ImageFilesDataModule`.
    """

    division_advice = ", by data.train_classes and data.val_classes"
    partition_settings = frozenset({"partition", "partition_seed", "train_classes", "val_classes", "rotations"})
    one_class_each = False  # used as published

    def __init__(
        self,
        root: str = "data/omniglot",
        download: bool = False,
        image_size: int = 28,
        rotations: bool = True,
        partition: Literal["random", "alphabet"] = "random",
        train_classes: int = 1200,
        val_classes: int = 0,
        partition_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            image_size=image_size,
            rotations=rotations,
            color="binary",
            fit="stretch",
            resample="nearest",
            **kwargs,
        )
        positive(train_classes=train_classes)
        countable(val_classes=val_classes)
        countable(LARGEST_SEED, partition_seed=partition_seed)
        one_of(("random", "alphabet"), partition=partition)
        self.download = download
        self.partition = partition
        self.train_classes = train_classes
        self.val_classes = val_classes
        self.partition_seed = partition_seed

    @property
    def characters(self) -> dict[str, list[str]]:
        """The names of each split's characters, after `setup`; another name of `class_names`."""
        return self.class_names

    @property
    def file_format(self) -> ImageFormat:
        """That of images, but for PNG files of 105 x 105 pixels alone."""
        return DrawingFormat(**asdict(self.image_format))

    def prepare_data(self) -> None:
        """Download what is missing, and build the cache; once per machine."""
        find_parts(self.root, self.download)
        super().prepare_data()

    def find(self) -> tuple[Source, Listing]:
        """The drawings of both parts, and their characters; other files are passed over.

        Raises:
            FileNotFoundError: `root` lacks a part.
            ValueError: a zip is damaged or hostile; a part has no drawing.
        """
        files: dict[str, tuple[Source, str]] = {}
        for part, path in zip(PARTS, find_parts(self.root), strict=True):
            source, above = open_source(str(path)), f"{part}/" if path.is_dir() else ""
            drawings = {above + name: (source, name) for name in source.names if _is_drawing(above + name, part)}
            if not drawings:
                raise ValueError(
                    f"{path} holds no characters, no <alphabet>/<character>/*.png: put a whole copy of Omniglot's "
                    f"{part} there, or set data.root to another folder."
                )
            files |= drawings
        return JoinedSource(self.root, files), sorted_listing(Listed(name, name.rpartition("/")[0]) for name in files)

    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The characters of each split, as `split` chooses them."""
        names = list(dict.fromkeys(file.label for file in files))
        return {split: [names[i] for i in chosen.tolist()] for split, chosen in self.split(names).items()}

    def split(self, names: list[str]) -> dict[str, Tensor]:
        """Choose which of the characters `names` each split has: indices (K,) int64, a pure function of the arguments.

        Raises:
            ValueError: a split would have none.
        """
        if self.partition == "random":
            total = len(names)
            if self.train_classes >= total:
                raise ValueError(
                    f"train_classes={self.train_classes} leaves none of the {total} characters in "
                    f"root={self.root!r} for testing: use data.train_classes < {total}."
                )
            order = shuffled(self.partition_seed, total)
            train, test = order[: self.train_classes], order[self.train_classes :]
        else:
            in_test = torch.tensor([name.startswith(f"{PARTS[1]}/") for name in names])
            train, test = (~in_test).nonzero()[:, 0], in_test.nonzero()[:, 0]
            train = train[shuffled(self.partition_seed, len(train))]
        if self.val_classes >= len(train):
            raise ValueError(
                f"val_classes={self.val_classes} leaves none of the {len(train)} training characters for training: "
                f"use data.val_classes < {len(train)}."
            )
        val = train[: self.val_classes] if self.val_classes else train
        return {"train": train[self.val_classes :], "val": val, "test": test}


class DrawingFormat(ImageFormat):
    """The format of Omniglot's own files, which says of another kind or size of image that it is no drawing."""

    def refuse(self, image: Image.Image) -> None:
        """Raise `Refused` for anything but a PNG of 105 x 105 pixels."""
        super().refuse(image)
        if (image.format, *image.size) != ("PNG", SIDE, SIDE):
            width, height = image.size
            raise Refused(f"a {image.format} of {width} x {height} pixels; a drawing of Omniglot is a PNG of 105 x 105")


def _is_drawing(name: str, part: str) -> bool:
    return name.startswith(f"{part}/") and name.count("/") == 3 and name.lower().endswith(".png")


def find_parts(root: str, download: bool = False) -> list[Path]:
    """Find the zip or folder of each of `PARTS`, in this order.

    Raises:
        FileNotFoundError: a part is missing, and `download` is off.
        RuntimeError: a part is missing, and its download failed.
    """
    folder = Path(root).expanduser()
    found = [_find(folder, part) for part in PARTS]
    lacking = [part for part, path in zip(PARTS, found, strict=True) if path is None]
    if lacking and not download:
        state = "has" if folder.is_dir() else "is not a folder, so it has"
        looked_for = " and ".join(f"neither {part}.zip nor a folder {part}/" for part in lacking)
        raise FileNotFoundError(
            f"root={root!r} {state} {looked_for}, also not below {Omniglot.folder}/: "
            f"set data.root to the folder with both parts of Omniglot, or set data.download: true."
        )
    return [path or _download(folder, part) for part, path in zip(PARTS, found, strict=True)]


def _find(folder: Path, part: str) -> Path | None:
    for place in _PLACES:
        archive, extracted = folder / place / f"{part}.zip", folder / place / part
        if archive.is_file():
            return archive
        if extracted.is_dir():
            return extracted
    return None


def _download(folder: Path, part: str) -> Path:
    """Fetch the zip of a part into `folder`; a download that fails or is cut off leaves nothing there."""
    name = f"{part}.zip"
    url = f"{Omniglot.download_url_prefix}/{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as unfinished:
            download_url(url, unfinished, filename=name, md5=Omniglot.zips_md5[part])
            os.replace(Path(unfinished) / name, folder / name)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong MD5 is a RuntimeError
        raise RuntimeError(
            f"download=True could not fetch {url} ({error}): try again, or put {name} into root={str(folder)!r}."
        ) from error
    return folder / name
