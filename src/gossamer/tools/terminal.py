"""Talking to a model in a terminal: lines are read, answers are printed as they come."""

import importlib.util
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol, runtime_checkable

from gossamer.errors import GossamerError

HELP = "/clear forgets the conversation; /quit or Ctrl-D ends it; Ctrl-C stops an answer"
PROMPT = "> "


@runtime_checkable
class Dialogue(Protocol):
    """What can be talked to."""

    def answer(self, text: str) -> Generator[Any, None, None]:
        """Yield pieces, which have a `text`; the last has a `finish_reason`."""
        ...

    def clear(self) -> None:
        """Forget what was said."""
        ...


def converse(dialogue: Dialogue, note: Callable[[str], None]) -> None:
    """Talk until the user ends it. Lines that are not the model's go to `note`."""
    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    note(HELP)
    while (line := _next_line(note)) is not None:
        match line.strip():
            case "":
                pass
            case "/quit" | "/exit":
                return
            case "/help":
                note(HELP)
            case "/clear":
                dialogue.clear()
                note("forgotten")
            case word if word.startswith("/") and len(word.split()) == 1:
                note(f"{word} is no command: {HELP}")
            case _:
                _show_answer(dialogue, line, note)
    print()


def _next_line(note: Callable[[str], None]) -> str | None:
    """What the user typed; None at the end. Ctrl-C only drops the line."""
    while True:
        try:
            return input(PROMPT)
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            note(HELP)


def _show_answer(dialogue: Dialogue, text: str, note: Callable[[str], None]) -> None:
    """Print the answer while it comes; Ctrl-C stops it. Say why it is shorter than one would expect."""
    empty, reason = True, None
    try:
        with closing(dialogue.answer(text)) as pieces:
            for piece in pieces:
                print(piece.text, end="", flush=True)
                empty, reason = empty and not piece.text, piece.finish_reason
    except KeyboardInterrupt:
        reason = "stopped"
    except (GossamerError, MemoryError) as error:
        note(str(error) or "out of memory")
        return
    if not empty or reason == "stopped":
        print()
    if empty and reason == "stop":
        note("the model ended at once, without an answer")
    elif reason == "length":
        note("the answer was cut: --max-tokens, or the context is full")
