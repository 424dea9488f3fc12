"""Write files without losing earlier ones."""

from __future__ import annotations

from pathlib import Path


def keep_earlier(path: Path) -> Path | None:
    """Rename an existing file `name.ext` to the first free `name_1.ext`, `name_2.ext`, ...

    Returns:
        The new path; None where there was no file.
    """
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept
