"""The version stands in one place, `fomal.__version__`; what else names it says the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from fomal import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_changes_and_citation_name_the_version_and_its_date() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "fomal" / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert headings.index(released[0]) <= 1  # what is unreleased stands above it
    assert released[0] == f"{__version__} ({citation['date-released']})"
    assert citation["version"] == __version__


def test_a_tag_of_this_commit_is_the_version() -> None:
    """Where there is git, and the clone has the tags."""
    if (ROOT / ".git").exists():
        found = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert {tag for tag in found.stdout.split() if re.match(r"v\d", tag)} <= {f"v{__version__}"}
