"""The help of a verb's options."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter

_CLASSES = re.compile(r"(?<=known subclasses: )[\w.]+\.\w+(?:, [\w.]+\.\w+)*")
_OWN = ("fomal.models.", "fomal.outer.", "fomal.inner.")


class HelpFormatter(DefaultHelpFormatter):
    """Names, of the hundreds of classes an option may take, fomal's own where there are any."""

    def _expand_help(self, action: Action) -> str:
        return _CLASSES.sub(_own, super()._expand_help(action))


def _own(classes: re.Match[str]) -> str:
    own = [path for path in classes[0].split(", ") if path.startswith(_OWN)]
    return f"{', '.join(own)}, ..." if own else classes[0]
