"""Selecting the files of a source that are meant: patterns of names, and a line about the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from fomal.data.images.source import Source
from fomal.utils.output import rank_zero_info, rank_zero_warn

_SHOWN = 6  # kinds of files named in a message

PatternsGiven = Sequence[str] | str | None
"""Patterns as the user gives them: one, several or none."""


class Selection(NamedTuple):
    """Patterns as of a shell, in which letters are equal in either case.

    One with a slash is of the whole name in the source, of which * may stand for several folders; another is of the
    file's name alone.

    Attributes:
        include: a file must match one of them; empty: any file.
        exclude: it must match none of these.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, include: PatternsGiven, exclude: PatternsGiven) -> Selection:
        """From the settings of these names.

        Raises:
            TypeError: they are no patterns.
            ValueError: one is empty.
        """
        return cls(_patterns("include", include), _patterns("exclude", exclude))

    def why_not(self, name: str) -> str | None:
        """Say why a file is not meant; None for one that is."""
        if any(_matches(name, pattern) for pattern in self.exclude):
            return "that exclude names"
        if self.include and not any(_matches(name, pattern) for pattern in self.include):
            return "that include does not name"
        return None

    def split(self, source: Source, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
        """The names that are meant, and why the others are not.

        Raises:
            ValueError: there are names, but none is meant.
        """
        names = list(names)
        reasons = {name: self.why_not(name) for name in names}
        meant = [name for name, why in reasons.items() if why is None]
        if names and not meant:
            raise ValueError(
                f"include={list(self.include)} and exclude={list(self.exclude)} leave none of the {len(names)} images "
                f"in {source.label}, e.g. {names[0]!r}: mend the patterns."
            )
        for pattern in self.exclude:
            if names and not any(_matches(name, pattern) for name in names):
                rank_zero_warn(f"exclude: {pattern!r} matches no image in {source.label}, e.g. {names[0]!r}.")
        return meant, {name: why for name, why in reasons.items() if why is not None}


EVERY = Selection()
"""All files are meant."""


def _patterns(setting: str, given: PatternsGiven) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{setting}: {pattern!r} is no pattern: give a text such as '*.jpg', or a list of them.")
        if not pattern.strip():
            raise ValueError(f"{setting}: {pattern!r} is no pattern: give a text such as '*.jpg', or leave it out.")
    return patterns


def _matches(name: str, pattern: str) -> bool:
    name = name if "/" in pattern else name.rpartition("/")[2]
    return fnmatchcase(name.casefold(), pattern.casefold().removeprefix("./"))


def tell_left_out(where: str, left_out: Mapping[str, str]) -> None:
    """Say in one line how many files are not used, and why.

    Args:
        where: what to call their source, e.g. its `label`.
        left_out: what each is, by name: a suffix, or words such as "that exclude names".
    """
    if not left_out:
        return
    example = {kind: name for name, kind in reversed([*left_out.items()])}
    kinds = Counter(left_out.values()).most_common()
    parts = [f"{count} {kind} (e.g. {example[kind]!r})" for kind, count in kinds[:_SHOWN]]
    if rest := sum(count for _, count in kinds[_SHOWN:]):
        parts.append(f"{rest} of {len(kinds) - _SHOWN} other kinds")
    rank_zero_info(f"{where} has files that are left out: {', '.join(parts)}.")
