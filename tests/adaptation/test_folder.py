"""Whole but wrong folders of adapted models: each is named in one line, and none is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fomal.adaptation import Adapted
from fomal.data.images.image_format import ImageFormat
from fomal.models import Conv4

SETTINGS = {"ways": 3, "in_channels": 1, "image_size": 8, "filters": 4, "downsample": "stride"}
NETWORK = {"class_path": "fomal.models.Conv4", "init_args": SETTINGS}
IMAGES, LABELS = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 2, 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a small model of three classes."""
    torch.manual_seed(0)
    about = {"network": NETWORK, "ways": 3}
    Adapted(Conv4(**SETTINGS), ["a", "b", "c"], ImageFormat(8, 8, "gray"), IMAGES, LABELS, about).save(tmp_path / "m")
    return tmp_path / "m"


def about(**changes: Any) -> Callable[[Path], None]:
    """Damage that changes entries of `model.json`; None takes one away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text()) | changes
        kept = {name: value for name, value in content.items() if value is not None}
        (folder / "model.json").write_text(json.dumps(kept))

    return damage


def text(content: bytes) -> Callable[[Path], None]:
    """Damage that writes another `model.json`."""
    return lambda folder: (folder / "model.json").write_bytes(content) and None


def image_format(**changes: Any) -> Callable[[Path], None]:
    """Damage that changes the format of images."""
    return about(image_format={"height": 8, "width": 8, "color": "gray", **changes})


def network(**changes: Any) -> Callable[[Path], None]:
    """Damage that changes arguments of the network."""
    return about(network={**NETWORK, "init_args": {**SETTINGS, **changes}})


def tensors(name: str, **changes: Tensor | None) -> Callable[[Path], None]:
    """Damage that changes tensors of a file, `__` in their names for a dot; None takes one away."""

    def damage(folder: Path) -> None:
        found = load_file(folder / name)
        content = {key: t.clone() for key, t in found.items()}
        content |= {key.replace("__", "."): t for key, t in changes.items()}
        save_file({key: t for key, t in content.items() if t is not None}, folder / name)

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    """Damage that leaves a share of a file."""
    return lambda folder: os.truncate(folder / name, int(share * (folder / name).stat().st_size))


def enlarge(name: str) -> Callable[[Path], None]:
    """Damage that gives a file a hole, of no bytes on disk, at its end."""
    return lambda folder: os.truncate(folder / name, 10**11)


def fifo(name: str) -> Callable[[Path], None]:
    """Damage that puts a fifo in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


WEIGHTS, SUPPORT = "model.safetensors", "support.safetensors"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (text(b"{"), "model.json is no JSON"),
    (text(b"\xff\xfe"), "model.json is no JSON"),
    (text(b"[" * 100_000), "model.json is no JSON"),
    (text(b'{"format": ' + 10_000 * b"9" + b"}"), "model.json is no JSON"),
    (text(b"[]"), "its content is a list, not a mapping"),
    (text(b"3"), "its content is 3, not a mapping"),
    (text(b'{"a": ' + 60 * b"[" + 60 * b"]" + b"}"), "is nested without end"),
    (lambda folder: os.truncate(folder / "model.json", 2**30), "has 1073741824 bytes, more than the 67108864 allowed"),
    (about(format=2), "has format 2, and this version of fomal, .* reads formats up to 1: install a newer fomal"),
    (about(format="1"), "its format is 1, not an integer"),
    (about(format=None), "it has no entry format"),
    (about(classes=None), "it has no entry classes"),
    (about(classes={"a": 1}), "its classes is a mapping, not a list"),
    (about(classes=["a", 3, "c"]), "its classes.1 is 3, not a text"),
    (about(classes=["a", "b", "a"]), "its classes have a 2 times"),
    (about(classes=["a"]), "its classes has 1 entries, not 2 at least"),
    (about(classes=["a", "b"]), r"labels from 0 to 2, but model.json has 2 classes, 0 to 1"),
    (
        about(classes=[*"abcd"]),
        r"has head.weight as \(3, 4\) float32, but that of the network in model.json is \(4, 4\)",
    ),
    (about(classes=[*"abcd"], ways=4), r"its network has outputs \(3,\) for 4 classes"),
    (about(ways=None), "it has no entry ways"),
    (about(ways=10**30), "its ways is 1000000000000000000000000000000, not an integer of at least 1"),
    (about(ways=True), "its ways is true, not an integer"),
    (about(image_format=None), "it has no entry image_format"),
    (image_format(height=10**9), "its image_format.height is 1000000000, not an integer"),
    (image_format(height="8"), "its image_format.height is 8, not an integer"),
    (image_format(height=9), r"has images as \(4, 1, 8, 8\) uint8, but that of .* is \(4, 1, 9, 8\) uint8"),
    (image_format(color="rgb"), r"has images as \(4, 1, 8, 8\) uint8, but that of .* is \(4, 3, 8, 8\) uint8"),
    (image_format(color="sepia"), "color='sepia' is unknown"),
    (image_format(color=[1]), "its image_format.color is a list, not a text"),
    (image_format(mean=[float("nan")]), "its image_format.mean.0 is nan, not a finite number"),
    (image_format(std=0.5), "its image_format.std is 0.5, not a list"),
    (image_format(std=[0.0]), "must be positive"),
    (image_format(value_range={"a": 1}), "is no range of values"),
    (image_format(sharpen=1), "image_format.sharpen is unknown"),
    (about(network=None), "it has no entry network"),
    (about(network="Conv4"), "its network is Conv4, not a mapping"),
    (about(network={"class_path": 3}), "its network.class_path is 3, not a text"),
    (network(filters="many"), 'Parser key "filters": Expected a <class .int.>. Got value: many$'),
    (network(filters=-1), "filters=-1 must be at least 1"),
    (network(filters=None), "filters=None must be a whole number"),
    (
        network(filters=8),
        r"has blocks.0.conv.weight as \(4, 1, 3, 3\) float32, but that of the network in model.json is",
    ),
    (network(bogus=8), "Option 'bogus' is not accepted$"),
    (tensors(WEIGHTS, head__bias=None), "model.safetensors has no head.bias, which the network in model.json has"),
    (tensors(WEIGHTS, more=torch.ones(1)), "model.safetensors has more, which the network in model.json has not"),
    (tensors(WEIGHTS, head__bias=torch.ones(3).int()), r"has head.bias as \(3,\) int32, but that of the network"),
    (tensors(WEIGHTS, head__bias=torch.ones(3, 1)), r"has head.bias as \(3, 1\) float32, but that of the network"),
    (tensors(SUPPORT, images=None), "support.safetensors has no images"),
    (tensors(SUPPORT, images=IMAGES.float()), r"has images as \(4, 1, 8, 8\) float32, but that of"),
    (tensors(SUPPORT, images=IMAGES[:3]), r"has labels as \(4,\) int64, but that of .* is \(3,\) int64"),
    (tensors(SUPPORT, images=torch.tensor(3).byte()), r"has images as \(\) uint8, but that of"),
    (tensors(SUPPORT, labels=None), "support.safetensors has no labels"),
    (tensors(SUPPORT, labels=LABELS.int()), r"has labels as \(4,\) int32, but that of"),
    (tensors(SUPPORT, labels=LABELS + 1), "has labels from 1 to 3, but model.json has 3 classes, 0 to 2"),
    (tensors(SUPPORT, labels=LABELS - 1), "has labels from -1 to 1, but model.json has 3 classes"),
    (tensors(SUPPORT, images=IMAGES[:0], labels=LABELS[:0]), "has labels without entries"),
    (cut(WEIGHTS, 0.9), "model.safetensors is cut short or damaged"),
    (cut(WEIGHTS, 0), "model.safetensors is cut short or damaged"),
    (cut(SUPPORT, 0.5), "support.safetensors is cut short or damaged"),
    *((enlarge(name), f"{name} is not read: it has 100000000000 bytes") for name in ("model.json", WEIGHTS, SUPPORT)),
    *((fifo(name), f"{name} is not read: it is a fifo") for name in ("model.json", WEIGHTS, SUPPORT)),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=range(len(DAMAGES)))
def test_wrong_folders_are_named(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    with pytest.raises((ValueError, OSError), match=said) as error:
        Adapted.load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", ["classify", "export"])
def test_the_verbs_say_it_in_one_line(verb: str, folder: Path, fails: Callable[..., str]) -> None:
    more = ["--format", "onnx"] if verb == "export" else ["--images", str(folder), "--out", str(folder / "t.csv")]
    good = (folder / "model.json").read_bytes()
    for damage, said in (DAMAGES[0], DAMAGES[8], (cut(WEIGHTS, 0.5), "cut short or damaged")):
        damage(folder)
        assert re.search(said, fails(verb, "--adapted", str(folder), *more, code=1))
        text(good)(folder)
