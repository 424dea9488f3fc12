"""Fixtures of several files."""

from tests.helpers.launch import launch  # noqa: F401
from tests.helpers.resume import whole  # noqa: F401
