"""CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018): the classes of CIFAR-100, divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import CIFAR100

from fomal.data.images.image_files import ImageFilesDataModule
from fomal.data.images.listing import Listed, Listing, by_folders, enumerated, sorted_listing
from fomal.data.images.partition import partition
from fomal.data.images.source import ArraySource, Source, open_source
from fomal.utils.files import open_regular
from fomal.utils.output import rank_zero_info

IMAGES = 600  # of each class


def _words(text: str) -> list[str]:
    return text.split()


CIFAR_FS = {
    "train": _words(
        "apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud cockroach "
        "couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard "
        "lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum "
        "rabbit raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger "
        "train trout tulip turtle willow_tree wolf"
    ),
    "val": _words(
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark "
        "television tractor"
    ),
    "test": _words(
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table "
        "telephone wardrobe whale woman worm"
    ),
}

# Superclasses 8, 11, 13, 16 of CIFAR-100 (large carnivores, large omnivores and herbivores, non-insect invertebrates,
# small mammals) and 0, 7, 12, 14 (aquatic mammals, insects, medium mammals, people); training has the other twelve.
_FC100_VAL = _words(
    "bear leopard lion tiger wolf camel cattle chimpanzee elephant kangaroo crab lobster snail spider worm "
    "hamster mouse rabbit shrew squirrel"
)
_FC100_TEST = _words(
    "beaver dolphin otter seal whale bee beetle butterfly caterpillar cockroach fox porcupine possum raccoon "
    "skunk baby boy girl man woman"
)
_ALL = sorted(name for names in CIFAR_FS.values() for name in names)
FC100 = {
    "train": [name for name in _ALL if name not in {*_FC100_VAL, *_FC100_TEST}],
    "val": sorted(_FC100_VAL),
    "test": sorted(_FC100_TEST),
}


class CIFARFSDataModule(ImageFilesDataModule):
    """N-way K-shot tasks from CIFAR-FS: 64, 16 and 20 classes of 600 images, 32 x 32, chosen at random.

    Args:
        root: folder with `cifar-100-python`, where torchvision keeps CIFAR-100; or a folder or zip with a folder for
            each class, below train/, val/ and test/ or not: the published division counts.
        download: let torchvision fetch CIFAR-100 into `root`.
        image_size: see `ImageFilesDataModule`.
        kwargs: likewise.
    """

    one_class_each = False  # used as published; CIFAR-100 has pictures more than once
    published: ClassVar[Mapping[str, Sequence[str]]] = CIFAR_FS

    def __init__(
        self, root: str = "data/cifar-100", download: bool = False, image_size: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(root, image_size=image_size, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, and build the cache; once per machine."""
        path = Path(self.root).expanduser()
        if self.download and not (path.exists() and open_source(self.root).images):
            download_cifar(path)
        super().prepare_data()

    def find(self) -> tuple[Source, Listing]:
        """The files, and their classes.

        Raises:
            FileNotFoundError: there is neither CIFAR-100 nor a folder for each class.
            ValueError: CIFAR-100 is damaged, or there is no folder for some class.
        """
        path = Path(self.root).expanduser()
        if (path / CIFAR100.base_folder).is_dir():
            source, listing = read_cifar(path)
        elif not path.exists() or not (source := open_source(self.root)).images:
            state = "has neither" if path.exists() else "does not exist, so it has neither"
            raise FileNotFoundError(
                f"root={self.root!r} {state} torchvision's {CIFAR100.base_folder} nor folders of images: put one "
                f"there, or set data.download: true."
            )
        else:
            listing = by_folders(source)
        images = Counter(file.label for file in listing.files)
        missing = [label for labels in self.published.values() for label in labels if label not in images]
        if missing:
            raise ValueError(f"root={self.root!r} lacks classes of CIFAR-100: {enumerated(missing)}; add them.")
        smallest = min(images.values())
        if smallest < IMAGES:
            rank_zero_info(f"{self.root} has classes of {smallest} images; as published, each has {IMAGES}.")
        return source, listing

    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The classes of each split, as published."""
        return partition(files, "lists", self.published)


class FC100DataModule(CIFARFSDataModule):
    """N-way K-shot tasks from FC100: 60, 20 and 20 classes of 600 images, 32 x 32; the splits share no superclass.

    Args: see `CIFARFSDataModule`.
    """

    published = FC100


def download_cifar(root: Path) -> None:
    """Let torchvision fetch CIFAR-100 into `root`, if it is not there.

    Raises:
        RuntimeError: it could not.
    """
    try:
        CIFAR100(root, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"download=True could not fetch CIFAR-100 ({error}): try again, or put {CIFAR100.filename}, extracted, "
            f"into root={str(root)!r}."
        ) from error


def read_cifar(root: Path) -> tuple[Source, Listing]:
    """The 60,000 images of torchvision's CIFAR-100, checked against their MD5 by it.

    Raises:
        ValueError: a file is missing or damaged.
    """
    try:
        for name, _ in (*CIFAR100.train_list, *CIFAR100.test_list):
            open_regular(root / CIFAR100.base_folder / name).close()  # torchvision would wait for a fifo
        parts = [CIFAR100(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"root={str(root)!r} has a damaged {CIFAR100.base_folder} ({error}): remove it and set download: true."
        ) from error
    labels = [part.classes[target] for part in parts for target in part.targets]
    names = [f"{label}/{number:05}" for number, label in enumerate(labels)]
    images: NDArray[np.uint8] = np.concatenate([part.data for part in parts])
    source = ArraySource(str(root / CIFAR100.base_folder), names, lambda: list(images), _stamp())
    files = [Listed(name, label) for name, label in zip(names, labels, strict=True)]
    return source, sorted_listing(files)


def _stamp() -> tuple[int, int]:
    """The MD5 that torchvision has checked."""
    train, test = (int(files[0][1][:15], 16) for files in (CIFAR100.train_list, CIFAR100.test_list))
    return train, test
