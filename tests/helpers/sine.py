"""A tiny sine-wave model for runs from the command line, as its config."""

from __future__ import annotations

from typing import Any


def tiny_model(inner: str = "SGD", lr: float = 0.02) -> dict[str, Any]:
    """The `model` section of a config."""
    return {
        "network": {"class_path": "fomal.models.MLP", "init_args": {"hidden": [4]}},
        "rule": {"class_path": "fomal.outer.Reptile"},
        "inner_optimizer": {"class_path": f"fomal.inner.{inner}", "init_args": {"lr": lr}},
        "train": {"steps": 2},
        "eval": {"steps": 2},
    }
