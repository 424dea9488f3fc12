"""Arguments of the verbs that are no trainer's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fomal.cli.errors import UsageError, did_you_mean


class Arguments(argparse.ArgumentParser):
    """A parser that reports mistakes as the rest of the command line does."""

    def __init__(self, verb: str, usage: str, description: str) -> None:
        super().__init__(
            f"fomal {verb}",
            usage=f"fomal {verb} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(message)

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Raise UsageError for the first of the arguments that the parser does not know."""
        if unknown:
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            raise UsageError(f"there is no option {unknown[0]}{did_you_mean(unknown[0], known)}")
