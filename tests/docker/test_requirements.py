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


def test_checks_find_mistakes(tmp_path: Path) -> None:
    versions = pins(FOLDER / "requirements.txt")
    assert unmet(["torch>=99", "numpy>=2", "learn2learn", "tensorboard; extra == 'all'"], versions) == [
        "torch>=99",
        "learn2learn",
    ]
    file = tmp_path / "requirements.txt"
    for line in ["numpy>=2", "numpy", "numpy @ https://example.org/numpy.whl", "-r other.txt", "numpy==2 --hash=a:b"]:
        file.write_text(f"{line}\n")
        with pytest.raises(AssertionError):
            pins(file)
