"""An adapted model: predictions, and a folder that is all there is to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fomal.adaptation import Adapted, adapt
from fomal.adaptation.inputs import decode_all
from fomal.data.images.image_format import ImageFormat
from tests.helpers.pictures import zipped


@pytest.fixture(scope="module")
def adapted(checkpoint: Path, support: Path) -> Adapted:
    files = sorted(support.rglob("*.png"))
    return adapt(checkpoint, files, [path.parent.name for path in files])


@pytest.fixture
def folder(adapted: Adapted, tmp_path: Path) -> Path:
    adapted.save(tmp_path / "model")
    return tmp_path / "model"


def test_an_image_is_seen_with_the_support_set_and_nothing_else(adapted: Adapted, queries: Path) -> None:
    files = sorted(queries.rglob("*.png"))[:5]
    together = adapted.predict(files).probabilities
    support = adapted.image_format.normalize(adapted.support)
    for file, row in zip(files, together, strict=True):
        x = adapted.image_format.normalize(torch.from_numpy(adapted.image_format.decode(file.read_bytes())))
        with torch.no_grad():
            logits = adapted.network(torch.cat([support, x[None]]))[-1]
        torch.testing.assert_close(row, logits.softmax(-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(row, adapted.predict([file]).probabilities[0], rtol=1e-4, atol=1e-6)
    x = adapted.image_format.normalize(torch.from_numpy(decode_all(files, adapted.image_format)))
    with torch.no_grad():
        expected = adapted.network(x).softmax(-1)
    torch.testing.assert_close(adapted.predict(files, transductive=True).probabilities, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="transductive=True of one image leaves batch norm nothing"):
        adapted.predict(files[:1], transductive=True)


def test_more_images_than_are_predicted_at_once(adapted: Adapted) -> None:
    images = torch.randint(0, 256, (70, 3, 10, 10), dtype=torch.uint8)
    found = adapted.predict(images)
    assert found.probabilities.shape == (70, 3)
    assert len(found.labels) == 70
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(70))
    torch.testing.assert_close(
        found.probabilities[66:], adapted.predict(images[66:]).probabilities, rtol=1e-4, atol=1e-6
    )
    assert adapted.predict([]).probabilities.shape == (0, 3)


def test_images_come_as_files_pictures_arrays_or_tensors(adapted: Adapted, queries: Path) -> None:
    file = sorted(queries.rglob("*.png"))[0]
    picture = Image.open(file)
    array = np.asarray(picture)
    forms = [file, str(file), picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    probabilities = adapted.predict(forms).probabilities
    torch.testing.assert_close(probabilities, probabilities[:1].expand(5, -1), rtol=1e-5, atol=1e-7)


def test_one_image_and_a_folder_are_taken_as_such(adapted: Adapted, queries: Path, tmp_path: Path) -> None:
    files = sorted(queries.rglob("*.png"))[:4]
    (tmp_path / "few").mkdir()
    for place, file in enumerate(files):
        shutil.copy(file, tmp_path / "few" / f"{place}.png")
    (tmp_path / "few" / "notes.txt").write_text("no image")
    expected = adapted.predict(files).probabilities
    for folder in (tmp_path / "few", str(tmp_path / "few"), zipped(tmp_path / "few", tmp_path / "few.zip")):
        torch.testing.assert_close(adapted.predict(folder).probabilities, expected, rtol=1e-5, atol=1e-7)
    picture = Image.open(files[0])
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for one in (files[0], str(files[0]), picture, array, tensor):
        torch.testing.assert_close(adapted.predict(one).probabilities, expected[:1], rtol=1e-5, atol=1e-7)
    many = np.stack([np.asarray(Image.open(file)) for file in files])
    for every in (many, torch.from_numpy(many).permute(0, 3, 1, 2), iter(files)):
        torch.testing.assert_close(adapted.predict(every).probabilities, expected, rtol=1e-5, atol=1e-7)
    grey = adapted.predict(many[..., 0]).probabilities  # (N, H, W)
    torch.testing.assert_close(grey[:1], adapted.predict(many[0, ..., 0]).probabilities, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("gone", FileNotFoundError, "^images='gone' does not exist: give a file, or a folder or zip of images"),
        (b"bytes", TypeError, "^images is bytes: give files, images of Pillow's"),
        ({"a": 1}, TypeError, "^images is dict: give files"),
        (None, TypeError, "^images is NoneType: give files"),
        ([None, 3], ValueError, r"^2 images cannot be used: image 0 \(NoneType: give files.*; image 1 \(int: give"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, r"^images has shape \(1, 1, 3, 8, 8\): give files"),
        (np.zeros(4, np.uint8), ValueError, r"^images has shape \(4,\): give files"),
    ],
)
def test_what_is_no_image_is_named(adapted: Adapted, images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adapted.predict(images)  # type: ignore[arg-type]


def test_a_folder_without_images_is_named(adapted: Adapted, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^images='{tmp_path}' has no image"):
        adapted.predict(tmp_path)


def test_a_folder_says_the_same(adapted: Adapted, folder: Path, queries: Path) -> None:
    files = sorted(queries.rglob("*.png"))
    loaded = Adapted.load(folder)
    assert loaded.classes == adapted.classes
    assert loaded.about == adapted.about
    assert loaded.image_format == adapted.image_format
    assert torch.equal(loaded.predict(files).probabilities, adapted.predict(files).probabilities)
    about = json.loads((folder / "model.json").read_text())
    assert about["adaptation"]["examples"] == {"new20": 3, "new21": 4, "new22": 2}
    assert set(about["versions"]) >= {"fomal", "torch", "python"}
    assert len(about["checkpoint"]["sha256"]) == 64
    assert about["checkpoint"]["meta_iterations"] == 60


def test_it_needs_nothing_but_its_folder(folder: Path, queries: Path, tmp_path: Path) -> None:
    """In a new process, elsewhere, without checkpoint or training images."""
    moved = tmp_path / "elsewhere" / "m"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    about = json.loads((moved / "model.json").read_text())
    about["checkpoint"]["path"] = "gone.ckpt"
    (moved / "model.json").write_text(json.dumps(about))
    code = "import sys, fomal; m = fomal.Adapted.load(sys.argv[1]); print(','.join(m.predict(sys.argv[2:]).labels))"
    files = [str(path) for path in sorted(queries.rglob("*.png"))[::10]]
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved), *files], capture_output=True, text=True, check=True, cwd=moved.parent
    )
    assert done.stdout.strip() == ",".join(Adapted.load(moved).predict(files).labels)


def test_it_is_never_written_over(adapted: Adapted, folder: Path) -> None:
    before = (folder / "model.json").read_bytes()
    with pytest.raises(FileExistsError, match="model exists already: give another folder, or remove it"):
        adapted.save(folder)
    assert (folder / "model.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_nothing(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        adapted.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "support.safetensors"])
def test_damaged_folders_are_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="(model|model.json) (cannot be used|is no JSON)"):
        Adapted.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"it has no {name}; make one by `fomal adapt`"):
        Adapted.load(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    about = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(
        ValueError, match="has format 99, and this version of fomal, .* reads formats up to 1: install a newer fomal"
    ):
        Adapted.load(folder)


def test_a_network_that_cannot_be_vectorised_is_looped_over() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(1)
            return self.head(flat if float(flat.sum()) > 0 else -flat)

    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    network = Branching()
    model = Adapted(network, ["a", "b"], ImageFormat(2, 2, "gray"), images[:2], torch.tensor([0, 1]), {})
    with torch.no_grad():
        expected = network(images.float() / 255).softmax(-1)
    torch.testing.assert_close(model.predict(images).probabilities, expected)


def test_files_that_are_not_what_they_seem(adapted: Adapted, tmp_path: Path) -> None:
    """One line of warning for all with another kind's name; a fifo is not waited for."""
    images = [Image.new("RGB", (10, 10), (50 * i, 90, 20)) for i in range(3)]
    for number, kind in enumerate(("JPEG", "BMP", "PNG")):
        images[number].save(tmp_path / f"{number}.png", kind)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    with pytest.warns(UserWarning, match="another kind than their names say .*0.png .JPEG.*1.png .BMP") as said:
        found = adapted.predict(paths)
    assert len(said) == 1
    pixels = decode_all([Image.open(path) for path in paths], adapted.image_format)
    assert torch.equal(found.probabilities, adapted.predict(torch.from_numpy(pixels)).probabilities)
    os.mkfifo(tmp_path / "3.png")
    with pytest.raises(ValueError, match=r"3.png is not read: it is a fifo, and no regular file"):
        adapted.predict([*paths, tmp_path / "3.png"])


class Tied(nn.Module):
    """A weight in two places, a layer by two names, and integers among its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.body = nn.Sequential(self.first, nn.Tanh(), self.second, nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.flatten(1)[:, self.places]))  # type: ignore[no-any-return]


def test_tied_weights_are_saved_and_tied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fomal.adaptation.folder.build_network", lambda *args, **settings: Tied())
    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    about = {"network": {"class_path": "torch.nn.Linear", "init_args": {}}, "ways": 2}
    model = Adapted(Tied(), ["a", "b"], ImageFormat(2, 2, "gray"), images[:2], torch.tensor([0, 1]), about)
    expected = model.predict(images).probabilities
    with torch.no_grad():
        torch.testing.assert_close(expected, model.network(images.float() / 255).softmax(-1))
    model.save(tmp_path / "model")
    loaded = Adapted.load(tmp_path / "model")
    assert loaded.network.first.weight is loaded.network.second.weight
    torch.testing.assert_close(loaded.predict(images).probabilities, expected)
    loaded.network.body[1] = nn.ReLU()  # what was found of the network before is found again
    with torch.no_grad():
        now = loaded.network(images.float() / 255).softmax(-1)
    torch.testing.assert_close(loaded.predict(images).probabilities, now)
