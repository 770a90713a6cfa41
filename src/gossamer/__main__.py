"""The entry point: `gossamer`, and `python -m gossamer`. Ctrl-C counts from the first import on."""

import _thread
import sys
import threading
from typing import Any

AFTER_S = 0.02


def main() -> None:
    """Load the command line and run it."""
    sys.unraisablehook = press_again
    try:
        from gossamer.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


def press_again(unraisable: Any) -> None:
    """Interrupt once more, where Python drops a Ctrl-C because it struck while an object was being freed."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(AFTER_S, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    main()
