"""The command `fomal`, also as `python -m fomal`.

Ctrl-C and SIGTERM end it without a traceback from its first line to its last.
"""

import signal
import sys

from fomal.run.stop_signals import at_once, listen


def main() -> None:
    """Run the command line of this process."""
    listen(at_once)  # nothing is lost while it starts
    sys.unraisablehook = _unraisable
    try:
        from fomal.cli import main as run

        run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        listen(at_once)  # nor when all is done


def _unraisable(about: "sys.UnraisableHookArgs") -> None:
    """End the process where a signal came in a moment that raises nothing, as when an object is destroyed."""
    if issubclass(about.exc_type, KeyboardInterrupt):
        at_once(signal.SIGINT, None)
    if issubclass(about.exc_type, SystemExit):
        at_once(signal.SIGTERM, None)
    sys.__unraisablehook__(about)


if __name__ == "__main__":
    main()
