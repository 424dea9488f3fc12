"""The help of a verb's options."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter

_CLASSES = re.compile(r"(?<=known subclasses: )[\w.]+\.\w+(?:, [\w.]+\.\w+)*")
_CLASS = re.compile(r"<class '([\w.]+)'>")
_OWN = ("fomal.models.", "fomal.outer.", "fomal.inner.")

HELP = {
    "ckpt_path": "a checkpoint, or the folder of a run, for its newest; brings its configuration along. With `fit` the "
    "run goes on, `last` being the newest checkpoint of the run that is configured, if there is one",
    "seed_everything": "seed of weights and tasks; true chooses one at random",
    "config": "a config file, or the name of a shipped one, e.g. sinusoid/reptile; of several, later ones go first",
}
"""Help of options that Lightning adds."""


class HelpFormatter(DefaultHelpFormatter):
    """Names, of the hundreds of classes an option may take, fomal's own where there are any."""

    def _expand_help(self, action: Action) -> str:
        return _CLASS.sub(r"\1", _CLASSES.sub(_own, super()._expand_help(action)))


def _own(classes: re.Match[str]) -> str:
    own = [path for path in classes[0].split(", ") if path.startswith(_OWN)]
    return f"{', '.join(own)}, ..." if own else classes[0]
