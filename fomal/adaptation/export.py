"""An adapted model for other runtimes, checked against the original before it is kept."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fomal.adaptation.model import Adapted
from fomal.models.norm import has_batch_norm, statistics_of_first, uses_support
from fomal.utils.checks import first_line, one_of
from fomal.utils.files import naming

Format = Literal["onnx", "torch-export"]
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}
_TOLERANCE = 1e-4  # on probabilities; the runtimes sum in other orders


class Exported(nn.Module):
    """The module that is exported: images (B, C, H, W) uint8 of the model's size to probabilities (B, N) float32.

    Where an image's answer depends on the others in the batch, by batch norm say, it is seen together with the support
    set, which is a part of the module; B is 1 then, and the file refuses more, unless batch norms take the statistics
    of the support set alone. `transductive` leaves the support set out: all images of a batch are seen together.
    """

    support: Tensor

    def __init__(self, model: Adapted, transductive: bool) -> None:
        super().__init__()
        self.network = model.network
        self.image_format = model.image_format
        self.dtype = next(p.dtype for p in model.network.parameters() if p.is_floating_point())
        self.register_buffer("support", self._inputs(model.support.to(model.device)))
        self.behind_support = uses_support(model.network)
        inductive = not self.behind_support and not transductive
        self.one_at_a_time = inductive and (has_batch_norm(model.network) or self._looks_at_batch())

    def _inputs(self, images: Tensor) -> Tensor:
        return self.image_format.normalize(images).to(self.dtype)

    @torch.no_grad()
    def _looks_at_batch(self) -> bool:
        """Tell whether the network answers differently for a half of the support set than for all of it."""
        half = self.support[: (len(self.support) + 1) // 2]
        beside, by_itself = (self.network(x)[: len(half)].double() for x in (self.support, half))
        return not torch.allclose(beside, by_itself, rtol=1e-3, atol=1e-3 * float(beside.abs().max()))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to (B, N)."""
        x = self._inputs(images)
        probabilities: Tensor = self._logits(x).float().softmax(-1)
        return probabilities

    def _logits(self, x: Tensor) -> Tensor:
        if not self.one_at_a_time and not self.behind_support:
            return self.network(x)  # type: ignore[no-any-return]
        with statistics_of_first(len(self.support)):
            return self.network(torch.cat([self.support, x]))[len(self.support) :]  # type: ignore[no-any-return]


def export(model: Adapted, path: Path, kind: Format, transductive: bool = False) -> Exported:
    """Write a model in another format, after comparing what is written with the original on random images.

    Args:
        model: an adapted model; exported from where it is, best the CPU.
        path: file to write.
        kind: "onnx" needs `fomal[onnx]`.
        transductive: see `Exported`.

    Raises:
        FileExistsError: there is such a file already.
        ModuleNotFoundError: a package for the format is missing.
        ValueError: the network cannot be exported, or what was written says something else.
    """
    one_of(SUFFIXES, format=kind)
    if path.exists():
        raise FileExistsError(f"{path} exists already: give another name, or remove it.")
    module = Exported(model, transductive).eval()
    write, read = (_write_onnx, _read_onnx) if kind == "onnx" else (_write_export, _read_export)
    folder = path.parent / f".{secrets.token_hex(8)}.unfinished"  # ONNX may write weights beside the file
    with naming(path):
        folder.mkdir(parents=True)
    unfinished = folder / path.name
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            try:
                write(module, _random(module, model, 1 if module.one_at_a_time else 2), unfinished)
            except ModuleNotFoundError:
                raise
            except Exception as error:  # the exporters raise many kinds
                reason = first_line(error)
                raise ValueError(f"the network cannot be exported as {kind}: {reason}") from error
            _compare(module, model, read(unfinished), kind)
        for file in folder.iterdir():
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return module


def _random(module: Exported, model: Adapted, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, *model.support.shape[1:]), dtype=torch.uint8, generator=generator)


def _compare(module: Exported, model: Adapted, run: Callable[[Tensor], Tensor], kind: str) -> None:
    """Raise ValueError unless `run` says what the model's own `predict_pixels` says."""
    for seed, batch in enumerate((1, 1) if module.one_at_a_time else (2, 3), 1):  # not only what was traced
        images = _random(module, model, batch, seed)
        expected = model.predict_pixels(images, transductive=not module.one_at_a_time).probabilities
        error = float((run(images).cpu() - expected).abs().max())
        if not error <= _TOLERANCE:
            raise ValueError(
                f"the {kind} file says something else than the model: probabilities differ by {error:.1e} on random "
                f"images; it was not kept."
            )


def _batch(module: Exported) -> dict[str, Any] | None:
    """Which axes may change."""
    return None if module.one_at_a_time else {"images": {0: torch.export.Dim("batch")}}


def _write_onnx(module: Exported, example: Tensor, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"format='onnx' needs the package {package}: pip install fomal[onnx].")
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    torch.onnx.export(
        module,
        (example,),
        path,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=_batch(module),
        dynamo=True,
        verbose=False,
        external_data=False,
    )


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def _write_export(module: Exported, example: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=_batch(module)), path)


def _read_export(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()
