"""The fixtures of a checkpoint and images of colours."""

from __future__ import annotations

from tests.helpers.colours import checkpoint, colours, model, queries, support

__all__ = ["checkpoint", "colours", "model", "queries", "support"]
