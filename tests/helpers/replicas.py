"""Runs side by side, and the same runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fomal.data import SinusoidDataModule
from fomal.learner.meta_learner import MetaLearner
from fomal.models import MLP, Conv4
from tests.helpers.groups import merged
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer

SEEDS = (3, 5)


STEPS = 4


def close(a: Any, b: Any, tolerance: float, where: str = "") -> None:
    """Compare nested values; floating-point ones relative to the largest of each tensor."""
    if isinstance(a, torch.Tensor | float):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if tolerance and a.is_floating_point() and a.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{where}: off by {(a - b).abs().max():.1e}"
        else:
            assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, tolerance, f"{where}[{place}]")
    else:
        assert a == b, where


def outer(lr: float = 0.3) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5)


def sine(seed: int, rule: Any = None, inner: Any = None, **settings: Any) -> MetaLearner:
    torch.manual_seed(seed)
    return sine_learner(rule, inner, MLP(hidden=(8,)), **merged({"outer": {"optimizer": outer()}}, settings))


def plain(seed: int, **settings: Any) -> MetaLearner:
    return sine(seed, **merged({"execution": {"traced": False}}, settings))


def sines(**settings: Any) -> SinusoidDataModule:
    defaults = {"train_shots": 10, "train_query_shots": 3, "meta_batch_size": 4, "val_tasks": 3, "test_tasks": 3}
    return SinusoidDataModule(**{**defaults, **settings})


def blobs(**settings: Any) -> Blobs:
    return Blobs(**{"train_query_shots": 2, "val_tasks": 3, "test_tasks": 3, **settings})


def fitted(model: Any, data: Any, folder: Path, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """The checkpoint of a run."""
    defaults = {"precision": "64-true", "val_check_interval": 2, "log_every_n_steps": 2}
    run = trainer(steps, **{**defaults, **settings})
    run.fit(model, datamodule=data)
    run.save_checkpoint(folder / "c.ckpt")
    content: dict[str, Any] = torch.load(folder / "c.ckpt", weights_only=True)
    return content


def conv(seed: int, rule: Any, inner: Any, **settings: Any) -> MetaLearner:
    torch.manual_seed(seed)
    network = Conv4(3, image_size=9, filters=4)
    return blob_learner(rule, inner, network, **merged({"outer": {"optimizer": outer()}}, settings))
