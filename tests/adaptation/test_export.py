"""Exported models say what the original says, or are not kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fomal.adaptation import Adapted, adapt
from fomal.adaptation import export as module
from fomal.adaptation.export import SUFFIXES, export
from fomal.data.image_format import ImageFormat
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
    return torch.jit.load(path)(images) if kind == "torchscript" else torch.export.load(path).module()(images)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("transductive", [False, True])
def test_it_says_what_the_model_says(adapted: Adapted, kind: str, transductive: bool, tmp_path: Path) -> None:
    skip_without(kind)
    path = tmp_path / f"model{SUFFIXES[kind]}"
    exported = export(adapted, path, kind, transductive)
    assert exported.alone is not transductive
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    images = torch.randint(0, 256, (5, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    expected = adapted.predict(images, transductive).probabilities
    batches = [images] if transductive else images.split(1)  # batch norm sees each with the support set
    found = torch.cat([run(kind, path, batch) for batch in batches])
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileExistsError, match="exists already: give another name"):
        export(adapted, path, kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_batch_norm_any_batch_goes(kind: str, tmp_path: Path) -> None:
    skip_without(kind)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    model = Adapted(MLP(16, 3), ["a", "b", "c"], ImageFormat(4, 4, "gray"), images[:3], torch.arange(3), {})
    exported = export(model, tmp_path / "m", kind)
    assert not exported.alone
    torch.testing.assert_close(run(kind, tmp_path / "m", images).detach(), model.predict(images).probabilities)


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_a_file_that_says_something_else_is_not_kept(
    adapted: Adapted, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"torchscript": "_write_script", "torch-export": "_write_export"}[kind]
    original = getattr(module, write)

    def spoilt(exported: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
        weight = exported.network.head.weight
        kept = weight.clone()
        with torch.no_grad():
            weight.mul_(-1)
            original(exported, example, path)
            weight.copy_(kept)

    monkeypatch.setattr(module, write, spoilt)
    with pytest.raises(ValueError, match=f"the {kind} file says something else than the model: probabilities differ"):
        export(adapted, tmp_path / "m", kind)
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
    with pytest.raises(ValueError, match="format='tflite' is unknown: use one of onnx, torchscript, torch-export"):
        export(adapted, tmp_path / "m", "tflite")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package onnx: pip install fomal\[onnx\]"):
        export(adapted, tmp_path / "m", "onnx")
    assert not list(tmp_path.iterdir())
