"""The entry point: `gossamer`, and `python -m gossamer`. Ctrl-C counts from the first import on."""

import sys


def main() -> None:
    """Load the command line and run it."""
    try:
        from gossamer.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()


if __name__ == "__main__":
    main()
