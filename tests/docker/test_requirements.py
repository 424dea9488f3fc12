from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docker.files import FOLDER, ROOT

PIN = re.compile(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)")


def pins(path: Path) -> dict[str, str]:
    """Versions by name; AssertionError for a line that is more than both, such as an address."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            assert "://" not in line
            continue
        match = PIN.fullmatch(line)
        assert match, line
        assert match[1] not in found
        found[match[1]] = match[2]
    return found


def unmet(requirements: list[str], versions: dict[str, str]) -> list[str]:
    """The requirements that apply here and that no pin meets."""
    wanted = [Requirement(text) for text in requirements]
    return [
        str(one)
        for one in wanted
        if one.marker is None or one.marker.evaluate({"extra": ""})
        if not one.specifier.contains(versions.get(canonicalize_name(one.name), "0.dev0"), prereleases=True)
        or canonicalize_name(one.name) not in versions
    ]


def test_pins_meet_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert unmet(project["project"]["dependencies"], pins(FOLDER / "requirements.txt")) == []
    assert unmet(project["build-system"]["requires"], pins(FOLDER / "requirements-build.txt")) == []


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-build.txt"])
def test_pins_meet_what_the_pinned_packages_ask_for(file: str) -> None:
    versions = pins(FOLDER / file)
    known = 0
    for name, version in versions.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.version == version:  # of others the requirements are not known here
            known += 1
            assert unmet(installed.requires or [], versions) == [], name
    assert known
