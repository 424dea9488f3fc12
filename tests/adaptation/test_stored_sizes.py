"""Sizes in a stored configuration that its weights do not have: refused before memory is taken for them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fomal.adaptation import Adapted, adapt
from fomal.data.images.image_format import ImageFormat
from fomal.learner.meta_learner import MetaLearner

FILTERS = ("filters", 2_000, r"blocks\.0\.conv\.weight as \(8, 3, 3, 3\) float32, but .* is \(2000, 3, 3, 3\)")
HUGE = ("filters", 10_000_000, r"blocks\.0\.conv\.weight as \(8, 3, 3, 3\) float32, but .* is \(10000000, 3, 3, 3\)")
ABSURD = ("filters", 10**9, "filters=1000000000 must be at most 100000000")
WAYS = ("ways", 10_000_000, r"head\.\w+ as \(3, ?8?\) float32, but .* is \(10000000, ?8?\)")
SIDE = ("image_size", 2**16, r"head\.weight as \(3, 8\) float32, but .* is \(3, 134217728\)")


@pytest.fixture(autouse=True)
def nothing_large() -> Iterator[None]:
    """Fail where a parameter of more than a million numbers is made with values."""

    def look(module: nn.Module, name: str, parameter: torch.Tensor | None) -> None:
        assert parameter is None or parameter.is_meta or parameter.numel() < 1_000_000, "memory was taken"

    handle = register_module_parameter_registration_hook(look)
    yield
    handle.remove()


def changed(checkpoint: Path, tmp_path: Path, name: str, value: int) -> Path:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    config = content["fomal"]["config"]
    (config["data"] if name == "ways" else config["model"]["network"])["init_args"][name] = value
    torch.save(content, tmp_path / "wrong.ckpt")
    return tmp_path / "wrong.ckpt"


@pytest.mark.parametrize(("name", "value", "said"), [FILTERS, HUGE, ABSURD, WAYS, SIDE])
def test_of_a_checkpoint(
    name: str, value: int, said: str, checkpoint: Path, support: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    path = changed(checkpoint, tmp_path, name, value)
    files = sorted(support.rglob("*.png"))
    for use in (
        lambda: MetaLearner.load_from_checkpoint(path),
        lambda: adapt(path, files, [file.parent.name for file in files]),
    ):
        with pytest.raises(ValueError, match=said) as error:
            use()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        verbs = (("fit",), ("test",), ("adapt", "--support", str(support), "--out", "m"))
        messages = [fails(*verb, "--ckpt_path", str(path), code=1) for verb in verbs]
    for message in messages:
        assert str(path) in message
        assert re.search(said, message)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("name", "value", "said"), [FILTERS, HUGE, ABSURD, WAYS, SIDE])
def test_of_an_adapted_model(name: str, value: int, said: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "wrong")
    about = json.loads((folder / "model.json").read_text())
    about["network"]["init_args"][name] = value
    (folder / "model.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=said) as error:
        Adapted.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_a_stored_size_must_fit_the_memory(
    checkpoint: Path, support: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    content["fomal"]["config"]["data"]["init_args"]["image_size"] = 2**13
    torch.save(content, tmp_path / "wrong.ckpt")
    monkeypatch.setattr("fomal.utils.checks.machine_bytes", lambda: 1e9)
    monkeypatch.setattr(ImageFormat, "decode", lambda *args: np.zeros(1))
    files = sorted(support.rglob("*.png"))
    with pytest.raises(ValueError, match=r"height=8192, width=8192: the images would take 1.21 GB, and this mach"):
        adapt(tmp_path / "wrong.ckpt", files, [file.parent.name for file in files])
