"""Arguments of the verbs that are no trainer's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from fomal.cli.errors import UsageError, did_you_mean


class Arguments(argparse.ArgumentParser):
    """A parser that reports mistakes as the rest of the command line does."""

    def __init__(self, verb: str, usage: str, description: str) -> None:
        super().__init__(
            f"fomal {verb}",
            usage=f"fomal {verb} {usage}",
            description=about(verb, description),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message)

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse; raise UsageError for an option that there is not, with the nearest names."""
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        for arg in args:  # before the parser takes its value for something else
            name = arg.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise UsageError(f"there is no option {name}{did_you_mean(name, known)}")
        return self.parse_args(list(args))


def about(verb: str, docstring: str | None) -> str:
    """The docstring of a verb's module without the verb's name, which the usage has."""
    text = str(docstring).removeprefix(f"The verb {verb}: ")
    return text[:1].upper() + text[1:]
