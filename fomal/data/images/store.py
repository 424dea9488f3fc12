"""The pixels of many image files: decoded once into a cache, or anew whenever they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from fomal.data.images.cache import (
    Arrays,
    UnsafeCache,
    cache_folder,
    make_folder,
    open_own,
    read_arrays,
    remove_unfinished,
    replacing,
    unusable,
    write_arrays,
)
from fomal.data.images.image_format import ImageFormat, Remarks
from fomal.data.images.source import Source
from fomal.utils.output import rank_zero_info, rank_zero_warn
from fomal.utils.terminal import PlainConsole

T = TypeVar("T")

_FORMAT = 2  # raise it when what is cached, or how it is made, changes
_UNREAD = "cannot be read: "  # how a problem begins that may pass without a change of the file
_WORTH_THREADS = 16_384  # bytes; of smaller files threads wait for the interpreter rather than decode
_CHUNK = 256  # images decoded between two writes; bounds memory
_IN_MEMORY = 2**28  # bytes of pixels that are read whole; of more, each image is read when it is asked for


class Decoding:
    """Images that are decoded when they are asked for; photographs on as many threads as torch uses.

    Args:
        source: the files.
        names: of the images.
        image_format: what they become.
    """

    def __init__(self, source: Source, names: Sequence[str], image_format: ImageFormat) -> None:
        self.source, self.names, self.image_format = source, list(names), image_format

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self.names), *_shape(self.image_format)))

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Images `index` (M,) int64 as (M, C, H, W) uint8; `dim` is 0, as that of a tensor of images would be.

        Raises:
            ValueError: a file cannot be decoded (any more).
        """
        places = index.tolist()
        pixels = np.empty((len(places), *_shape(self.image_format)), np.uint8)

        def fill(rows: range) -> None:
            for row in rows:
                pixels[row] = self._decoded(places[row])

        first = [self.names[place] for place in places[:8]]
        threads = min(torch.get_num_threads(), len(places)) if _worth_threads(self.source, first) else 1
        with _mapper(threads) as each:
            list(each(fill, [range(first, len(places), threads) for first in range(threads)]))
        return torch.from_numpy(pixels)

    def _decoded(self, place: int) -> NDArray[np.uint8]:
        name = self.names[place]
        try:
            return self.image_format.decode(self.source.read(name), name)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source.where}: {name} has become unreadable ({error}): put it back.") from error


class Cached:
    """Images in a cache file, each read when it is asked for.

    They are not mapped into memory, where a file that is cut short would end the process by a signal.

    Args:
        path: the file; N images one after the other.
        shape: (N, C, H, W).

    Raises:
        OSError: it cannot be read, or others can write it.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.shape = path, torch.Size(shape)
        self._file: int | None = None
        self._state = self._present(self._opened())

    def _opened(self) -> int:
        """The file's descriptor; a process that was given this object opens the file itself."""
        if self._file is None:
            with open_own(self.path) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        return self._file

    def _present(self, file: int) -> tuple[int, int]:
        """Size and time of change; one file of the cache is never written twice."""
        about = os.fstat(file)
        return about.st_size, about.st_mtime_ns

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._state[0]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Images `index` (M,) int64 as (M, C, H, W) uint8; `dim` is 0, as that of a tensor of images would be.

        Raises:
            RuntimeError: the file was changed or cut short meanwhile.
        """
        places, size = index.tolist(), self.shape[1:].numel()
        pixels = np.empty((len(places), *self.shape[1:]), np.uint8)
        return self._read(zip(pixels, (place * size for place in places), strict=True), pixels)

    def all(self) -> Tensor:
        """All images at once, as `index_select` gives some."""
        pixels = np.empty(self.shape, np.uint8)
        return self._read([(pixels, 0)], pixels)

    def _read(self, wanted: Iterable[tuple[Any, int]], pixels: NDArray[np.uint8]) -> Tensor:
        """Fill arrays, which are parts of `pixels`, with what the file has from a byte on."""
        file = self._opened()
        whole = self._present(file) == self._state
        if not (whole and all(os.preadv(file, [part], start) == part.nbytes for part, start in wanted)):
            raise RuntimeError(
                f"The cache file {self.path} was changed or cut short while it was used: start again, which builds it "
                f"again, and set data.cache_dir to a folder that nothing else cleans or writes to."
            )
        return torch.from_numpy(pixels)


class Store(NamedTuple):
    """The images of a source.

    Attributes:
        images: (N, C, H, W) uint8, in memory, or read or decoded when they are asked for.
        digests: (N, 16) uint8, equal for files of equal content.
        problems: what is wrong with images that cannot be read, by name.
    """

    images: Tensor | Cached | Decoding
    digests: NDArray[np.uint8]
    problems: dict[str, str]


def load_images(
    source: Source,
    names: Sequence[str],
    image_format: ImageFormat,
    cache_dir: str | None = None,
    cache_gb: float = 4.0,
    verify: bool = False,
) -> Store:
    """Load images from their cache, which is built first where it is missing or damaged.

    Every file is read and decoded once when the cache is built, so that all that cannot be used is known. Where the
    images need more than `cache_gb`, or the cache cannot be written, only what was found out is cached, and images are
    decoded when they are asked for; they are the same.

    Args:
        source: the files.
        names: those wanted.
        image_format: what they become.
        cache_dir: folder of the cache; see `fomal.data.images.cache.cache_folder`.
        cache_gb: how many 10**9 bytes of pixels may be cached.
        verify: compare the cache's pixels with their checksum, which reads all of them.
    """
    path = cache_folder(cache_dir) / f"images-{fingerprint(source, names, image_format)}.cache"
    fits = len(names) * int(np.prod(_shape(image_format))) <= cache_gb * 1e9
    try:
        make_folder(path.parent)
        cached = _load(path, source, names, image_format, fits, verify)
        if cached is not None:
            return cached
        with FileLock(_lock(path)):  # the second of two processes waits, and finds the cache there
            if (cached := _load(path, source, names, image_format, fits, verify=True)) is not None:
                return cached
            _build(path, source, names, image_format, fits)
            cached = _load(path, source, names, image_format, fits)
            assert cached is not None  # it has just been written, and the lock is held
            return cached
    except OSError as error:
        rank_zero_warn(unusable(path.parent, error, "images are decoded when episodes need them"))
    return Store(Decoding(source, names, image_format), *scan(source, names, image_format))


def _lock(path: Path) -> Path:
    lock = path.with_suffix(".lock")
    if lock.is_symlink():
        raise UnsafeCache(lock, f"{lock.name} is a link")
    return lock


def fingerprint(source: Source, names: Sequence[str], image_format: ImageFormat) -> str:
    """A short hash of names, sizes and times of the files, which are not opened, and of what they become."""
    about = {key: value for key, value in asdict(image_format).items() if key not in ("mean", "std")}
    state = [_FORMAT, about, [(name, *source.stamp(name)) for name in names]]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def _shape(image_format: ImageFormat) -> tuple[int, int, int]:
    return image_format.channels, image_format.height, image_format.width


def _load(
    path: Path, source: Source, names: Sequence[str], image_format: ImageFormat, fits: bool, verify: bool = False
) -> Store | None:
    """What is cached; None where something is missing or damaged."""
    about = read_arrays(path)
    if about is None:
        return None
    problems = dict(zip(about["problem_names"].tolist(), about["problem_texts"].tolist(), strict=True))
    if any(text.startswith(_UNREAD) and _readable(source, name) for name, text in problems.items()):
        return None
    images: Tensor | Cached | Decoding | None = Decoding(source, names, image_format)
    if fits:
        images = _pixels(path.with_suffix(".pixels"), (len(names), *_shape(image_format)), about, verify)
    if images is None:
        return None
    if verify:
        _say(source, about["remarks"].tolist())
    return Store(images, about["digests"], problems)


def _pixels(path: Path, shape: tuple[int, ...], about: Arrays, verify: bool) -> Tensor | Cached | None:
    """The pixels of the cache; None where they are missing, damaged or not to be believed."""
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.uint8)
    try:
        images = Cached(path, shape)
    except FileNotFoundError:
        return None
    except UnsafeCache as error:
        rank_zero_warn(f"The cache file {path} is not believed ({error.strerror}): building it again.")
        return None
    if images.size != math.prod(shape):
        return None
    if verify and _checksum(path) != about["checksum"]:
        rank_zero_warn(f"The cache file {path} is damaged: building it again.")
        return None
    return images.all() if images.size <= _IN_MEMORY else images


def _say(source: Source, remarks: Iterable[str]) -> None:
    for remark in remarks:
        rank_zero_warn(f"{source.label}: {remark}.")


def _readable(source: Source, name: str) -> bool:
    try:
        source.read(name)
    except OSError:
        return False
    return True


def _build(path: Path, source: Source, names: Sequence[str], image_format: ImageFormat, fits: bool) -> None:
    """Write pixels, then what is known of them: whoever finds the second finds the first whole.

    A build that was killed leaves an unfinished file, which the next one, who has the lock, removes.
    """
    pixels = path.with_suffix(".pixels")
    rank_zero_info(
        f"Reading {len(names)} images from {source.where} into {pixels}, once."
        if fits
        else f"Checking {len(names)} images in {source.where}, once; they need more than data.cache_gb, so they are "
        f"decoded when episodes need them."
    )
    remove_unfinished(pixels)
    remarks = Remarks()
    with replacing(pixels) if fits else nullcontext() as file:
        digests, problems = _scan(source, names, image_format, remarks, file)
    lines = remarks.lines(image_format.value_range)
    about = {"digests": digests, "checksum": _checksum(pixels) if fits else 0, "remarks": np.array(lines, "U")}
    about |= {"problem_names": np.array(list(problems), "U"), "problem_texts": np.array(list(problems.values()), "U")}
    try:
        write_arrays(path, about)
    except OSError:
        pixels.unlink(missing_ok=True)  # of no use without it, and the disk may be full
        raise
    _say(source, lines)


def scan(
    source: Source, names: Sequence[str], image_format: ImageFormat, out: BinaryIO | None = None
) -> tuple[NDArray[np.uint8], dict[str, str]]:
    """Read and decode every file once, and warn of what is worth a line about them all.

    Args:
        source: the files.
        names: which.
        image_format: what they become.
        out: where to write the pixels, zeros for what cannot be decoded.

    Returns:
        digests: (N, 16) uint8, equal for files of equal content.
        problems: what is wrong with files that cannot be decoded, by name.
    """
    remarks = Remarks()
    found = _scan(source, names, image_format, remarks, out)
    _say(source, remarks.lines(image_format.value_range))
    return found


def _scan(
    source: Source, names: Sequence[str], image_format: ImageFormat, remarks: Remarks, out: BinaryIO | None
) -> tuple[NDArray[np.uint8], dict[str, str]]:
    blank = np.zeros(_shape(image_format), np.uint8)

    def one(name: str) -> tuple[bytes, NDArray[np.uint8] | str]:
        try:
            content = source.read(name)
        except OSError as error:
            return bytes(16), f"{_UNREAD}{error.strerror or error}"
        digest = hashlib.blake2b(content if isinstance(content, bytes) else content.tobytes(), digest_size=16).digest()
        try:
            return digest, image_format.decode(content, name, remarks)
        except ValueError as error:
            return digest, str(error)

    digests, problems = np.zeros((len(names), 16), np.uint8), dict[str, str]()
    quiet = not sys.stderr.isatty()
    threads = (os.cpu_count() or 1) if _worth_threads(source, names[:8]) else 1
    watched = track(
        _in_order(one, names, threads), "images", len(names), console=PlainConsole(stderr=True), disable=quiet
    )
    for i, (digest, result) in enumerate(watched):
        digests[i] = np.frombuffer(digest, np.uint8)
        if isinstance(result, str):
            problems[names[i]] = result
        if out is not None:
            out.write((blank if isinstance(result, str) else result).tobytes())
    return digests, problems


def _worth_threads(source: Source, names: Sequence[str]) -> bool:
    """Tell whether such files, photographs rather than drawings, are decoded faster on several threads."""
    return sum(source.stamp(name)[0] for name in names) > _WORTH_THREADS * len(names)


def _in_order(fn: Callable[[str], T], names: Sequence[str], threads: int) -> Iterator[T]:
    """`fn` of every name, few at a time so that memory stays bounded."""
    with _mapper(threads) as each:
        for start in range(0, len(names), _CHUNK):
            yield from each(fn, names[start : start + _CHUNK])


@contextmanager
def _mapper(threads: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` on so many threads; Pillow decodes without the interpreter's lock."""
    if threads < 2:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        yield pool.map


def _checksum(path: Path) -> int:
    """CRC-32 of a file, which is enough against accidents and quick."""
    checksum = 0
    with open_own(path) as file:
        while block := file.read(2**22):
            checksum = zlib.crc32(block, checksum)
    return checksum
