"""The command line: `fomal VERB ...`, also callable from Python.

Lightning takes seconds to import, so nothing here imports it: help, version and mistyped verbs answer at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from fomal import __version__
from fomal.cli.configs import DEFAULT, configs_dir
from fomal.cli.errors import UsageError, did_you_mean
from fomal.run.stop_signals import in_order, listen
from fomal.utils.files import is_full, unwritten
from fomal.utils.output import one_line

__all__ = ["VERBS", "Verb", "configs_dir", "main"]


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        summary: its line in `fomal --help`.
        module: where its `run(verb, args)` is; imported only when it runs.
    """

    summary: str
    module: str


VERBS = {
    "fit": Verb(f"learn an initialisation (without --config: {DEFAULT})", "fomal.cli.run"),
    "validate": Verb("adapt to the validation tasks and report", "fomal.cli.run"),
    "test": Verb("adapt to the test tasks and report", "fomal.cli.run"),
    "predict": Verb("adapt to the test tasks and write each prediction", "fomal.cli.run"),
    "adapt": Verb("learn the classes of a folder of images", "fomal.cli.adapt"),
    "classify": Verb("classify images with an adapted model", "fomal.cli.classify"),
    "export": Verb("write an adapted model as ONNX or torch.export", "fomal.cli.export"),
    "compare": Verb("draw and tabulate several runs", "fomal.cli.compare"),
    "experiment": Verb("run the experiments of a file, and draw them", "fomal.cli.experiment"),
    "analyze": Verb("measure what the outer gradients are made of", "fomal.cli.analyze"),
}


def main(args: Sequence[str] | None = None) -> Any:
    """Run the command line.

    Args:
        args: verb and options; None means those of the process, `sys.argv[1:]`.

    Returns:
        What the verb made, for callers in Python: for fit, validate, test and predict an object with `trainer`,
        `model` and `datamodule`. None where `args` is None, since a script's result is its exit code.

    Raises:
        SystemExit: after help (0), a mistake in use (2), an error in a setting (1), Ctrl-C (130) or SIGTERM (143);
            the error itself is its `__cause__`.
    """
    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0 if given else 2)
    if given[0] == "--version":
        print(f"fomal {__version__}")
        raise SystemExit(0)
    verb, *rest = given
    try:
        if verb not in VERBS:
            hint = did_you_mean(verb, VERBS) or f"; verbs: {', '.join(VERBS)}"
            raise UsageError(f"{verb!r} is not a verb of fomal{hint}")
        _refuse_empty(rest)
        if args is None and "" not in sys.path:
            sys.path.append("")  # so that configs can name classes in the current folder, as with `python -m fomal`
        run = importlib.import_module(VERBS[verb].module).run
        if args is None:
            importlib.import_module("fomal.utils.terminal").own()
            listen(in_order)  # from here on there may be files to finish or to remove
        made = run(verb, rest)
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    except BrokenPipeError as error:  # the reader of a pipe has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from error
    except UsageError as error:
        _fail(error, 2)
    except RecursionError:
        _fail(UsageError("a setting, or a file that was read, is nested too deeply to be one of fomal's."), 2)
    except Exception as error:
        if not _is_setting_error(error):
            raise
        _fail(error, 1)
    return None if args is None else made


def help_text() -> str:
    """The text that `fomal --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: fomal VERB [--config FILE_OR_NAME] [--KEY VALUE ...]\n\n"
        f"Few-shot learners trained with Reptile, first-order MAML and their family.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"options:\n  --help     show this; `fomal VERB --help` shows the options of a verb\n"
        f"  --version  show the version\n\n"
        f"Shipped configs, for --config, are in {configs_dir()}.\n"
        f"With the environment variable FOMAL_TRACEBACK=1 errors come with their traceback."
    )


def _refuse_empty(args: Sequence[str]) -> None:
    """Raise UsageError for an argument that is empty; a setting of the configuration may be."""
    for before, arg in zip(["", *args], args, strict=False):
        name, equals, value = arg.partition("=")
        option = name if equals else before
        if (value if equals and arg.startswith("--") else arg) == "" and not (
            option.startswith("--") and "." in option
        ):
            what = option if option.startswith("-") else "an argument"
            raise UsageError(f"{what} is empty: give a value, or leave it out.")


def _is_setting_error(error: Exception) -> bool:
    """Tell whether the text of `error` tells the user enough; other errors keep their traceback."""
    # Lightning's own error is known by its name: importing it here would make `fomal --help` slow.
    return (
        isinstance(error, ValueError | OSError | ModuleNotFoundError | FloatingPointError)
        or (isinstance(error, RuntimeError) and _is_from_fomal(error))  # e.g. a failed download
        or type(error).__name__ == "MisconfigurationException"
    )


def _fail(error: Exception, code: int) -> NoReturn:
    hint = ""
    if os.environ.get("FOMAL_TRACEBACK") == "1":
        traceback.print_exception(error)
    elif not isinstance(error, UsageError) and not _is_from_fomal(error):
        hint = " (FOMAL_TRACEBACK=1 shows where)"
    text = unwritten(error.filename, error) if isinstance(error, OSError) and is_full(error) else error
    print(f"fomal: error: {one_line(text)}{hint}", file=sys.stderr)
    raise SystemExit(code) from error


def _is_from_fomal(error: Exception) -> bool:
    """Tell whether fomal itself raised `error`, so that its text names setting and remedy."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return str(frame.f_globals.get("__name__", "")).startswith("fomal.")
