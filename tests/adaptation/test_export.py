"""Exported models say what the original says, or are not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fomal.adaptation import Adapted, adapt
from fomal.adaptation import export as module
from fomal.adaptation.export import SUFFIXES, export
from fomal.data.images.image_format import ImageFormat
from fomal.models import MLP

FORMATS = list(SUFFIXES)


@pytest.fixture(scope="module")
def adapted(checkpoint: Path, support: Path) -> Adapted:
    files = sorted(support.rglob("*.png"))
    return adapt(checkpoint, files, [path.parent.name for path in files], steps=3)


def skip_without(kind: str) -> None:
    if kind == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def run(kind: str, path: Path, images: torch.Tensor) -> torch.Tensor:
    """As a user of the file would, without fomal."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    return torch.export.load(path).module()(images)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("transductive", [False, True])
def test_it_says_what_the_model_says(adapted: Adapted, kind: str, transductive: bool, tmp_path: Path) -> None:
    skip_without(kind)
    path = tmp_path / f"model{SUFFIXES[kind]}"
    exported = export(adapted, path, kind, transductive)
    assert exported.one_at_a_time is not transductive
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    images = torch.randint(0, 256, (5, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    expected = adapted.predict(images, transductive).probabilities
    batches = [images] if transductive else images.split(1)  # batch norm sees each with the support set
    found = torch.cat([run(kind, path, batch) for batch in batches])
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    if exported.one_at_a_time:  # the file itself refuses several images, rather than answer for the last
        with pytest.raises(Exception, match="Got: 5 Expected: 1|Guard failed"):
            run(kind, path, images)
    with pytest.raises(FileExistsError, match="exists already: give another name"):
        export(adapted, path, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_batch_norm_any_batch_goes(kind: str, tmp_path: Path) -> None:
    skip_without(kind)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    model = Adapted(MLP(16, 3), ["a", "b", "c"], ImageFormat(4, 4, "gray"), images[:3], torch.arange(3), {})
    exported = export(model, tmp_path / "m", kind)
    assert not exported.one_at_a_time
    for count in (6, 2, 1):
        expected = model.predict(images[:count]).probabilities
        torch.testing.assert_close(run(kind, tmp_path / "m", images[:count]).detach(), expected)


def test_a_file_that_says_something_else_is_not_kept(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module._write_export

    def spoilt(exported: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
        weight = exported.network.head.weight
        kept = weight.clone()
        with torch.no_grad():
            weight.mul_(-1)
            original(exported, example, path)
            weight.copy_(kept)

    monkeypatch.setattr(module, "_write_export", spoilt)
    with pytest.raises(ValueError, match="the torch-export file says something else than the model: prob"):
        export(adapted, tmp_path / "m", "torch-export")
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    class Branching(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if float(x.sum()) > 1 else -x)

    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    model = Adapted(Branching(16, 3), ["a", "b", "c"], ImageFormat(4, 4, "gray"), images, torch.arange(3), {})
    with pytest.raises(ValueError, match="the network cannot be exported as torch-export: "):
        export(model, tmp_path / "m", "torch-export")
    assert not list(tmp_path.iterdir())


def test_mistakes(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="format='tflite' is unknown: use one of onnx, torch-export"):
        export(adapted, tmp_path / "m", "tflite")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package onnx: pip install fomal\[onnx\]"):
        export(adapted, tmp_path / "m", "onnx")
    assert not list(tmp_path.iterdir())


class OwnNorm(torch.nn.Module):
    """Statistics of the batch, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head((x - x.mean(0)) / (1 + x.var(0, unbiased=False)).sqrt())  # type: ignore[no-any-return]


def test_any_network_that_looks_at_the_batch_is_exported_with_the_support_set(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model = Adapted(OwnNorm(), ["a", "b", "c"], ImageFormat(4, 4, "gray"), images[:3], torch.arange(3), {})
    exported = export(model, tmp_path / "m", "torch-export")
    assert exported.one_at_a_time
    found = torch.cat([run("torch-export", tmp_path / "m", image) for image in images[3:].split(1)])
    torch.testing.assert_close(found.detach(), model.predict(images[3:]).probabilities)
