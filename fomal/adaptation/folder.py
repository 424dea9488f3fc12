"""The folder of an adapted model: its three files, read with all that can be wrong with them named."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fomal.data.images.image_format import ImageFormat
from fomal.learner.build import build_network
from fomal.learner.restoring import take_dtypes
from fomal.learner.shapes import check_shapes
from fomal.models.head import resize_head
from fomal.models.norm import use_batch_statistics
from fomal.run.schema import Mismatch, check_model, check_tensors
from fomal.utils.checks import first_line
from fomal.utils.files import UnreadableFile, read_regular, refuse_unreadable

ABOUT, WEIGHTS, SUPPORT = "model.json", "model.safetensors", "support.safetensors"
_LARGEST = 2**26  # bytes of the JSON
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_about(folder: Path) -> dict[str, Any]:
    """The checked content of a folder's `model.json`.

    Raises:
        FileNotFoundError: the folder lacks a file.
        OSError: one is no regular file, is too large, or may not be read.
        ValueError: it is no JSON, not what it should be, or of a newer format.
    """
    for name in (ABOUT, WEIGHTS, SUPPORT):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is no adapted model: it has no {name}; make one by `fomal adapt`.")
        refuse_unreadable(folder / name)
    path = folder / ABOUT
    try:
        about = json.loads(read_regular(path, _LARGEST).decode())
    except UnreadableFile:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is no JSON ({first_line(error)}). {AGAIN}") from error
    check_model(about, path)
    return dict(about)


AGAIN = "Make the model again by `fomal adapt`."


def image_format_of(about: Mapping[str, Any]) -> ImageFormat:
    """The format of a model's images.

    Raises:
        Mismatch: it has an unknown entry.
        ValueError: it has an unknown value.
    """
    given = about["image_format"]
    unknown = sorted(given.keys() - {field.name for field in fields(ImageFormat)})
    if unknown:
        raise Mismatch(f"image_format.{unknown[0]} is unknown")
    return ImageFormat(**given)


def read_support(folder: Path, image_format: ImageFormat, classes: int) -> tuple[Tensor, Tensor]:
    """The examples (S, C, H, W) uint8 and their classes (S,) int64.

    Raises:
        Mismatch: they do not fit the format or the number of classes, or the file is damaged.
    """
    found = _tensors(folder / SUPPORT)
    size = image_format.channels, image_format.height, image_format.width
    examples = found["images"].shape[:1] if "images" in found else (0,)
    wanted = {"images": ((*examples, *size), torch.uint8), "labels": (examples, torch.int64)}
    expected = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in wanted.items()}
    check_tensors(found, expected, SUPPORT, f"the images and classes in {ABOUT}", exact=True)
    images, labels = found["images"].clone(), found["labels"].clone()  # else the file would be read when they are used
    if not labels.numel() or labels.min() < 0 or labels.max() >= classes:
        values = f"from {labels.min()} to {labels.max()}" if labels.numel() else "without entries"
        raise Mismatch(f"{SUPPORT} has labels {values}, but {ABOUT} has {classes} classes, 0 to {classes - 1}")
    return images, labels


def make_network(folder: Path, about: Mapping[str, Any], trust: Collection[str] | None) -> nn.Module:
    """The network with its adapted weights.

    Args:
        folder: of the model.
        about: the content of its `model.json`.
        trust: names that it may use, see `fomal.run.trust`.

    Raises:
        Mismatch: the weights do not fit the network, or their file is damaged.
        ValueError: the network names what is not trusted, or cannot be made.
    """
    weights = _tensors(folder / WEIGHTS)
    for dtype in {t.dtype for t in weights.values() if t.is_floating_point()}.difference(_DTYPES):
        raise Mismatch(f"{WEIGHTS} has weights of {dtype}, not of {', '.join(map(str, _DTYPES))}")

    def make() -> nn.Module:
        network = build_network(about["network"], trust, str(folder / ABOUT))
        use_batch_statistics(network)
        if about["ways"] != len(about["classes"]):
            resize_head(network, len(about["classes"]))
        return network

    described = WEIGHTS, f"the network in {ABOUT}"
    check_shapes(make, weights, *described)
    network = make()
    check_tensors(weights, network.state_dict(), *described)
    take_dtypes(network, weights)
    network.load_state_dict(weights)
    return network


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Mismatch(f"{path.name} is cut short or damaged ({first_line(error)})") from error
