"""Talking to a model in a terminal: lines are read, answers are printed as they come."""

import importlib.util
from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

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


def converse(dialogue: Dialogue, notes: Console) -> int:
    """Talk until the user ends it, and return the exit code. What is not the model's goes to `notes`."""
    if importlib.util.find_spec("readline"):
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    notes.print(HELP, style="dim", soft_wrap=True)
    while (line := _next_line(notes)) is not None:
        match line.strip():
            case "":
                pass
            case "/quit" | "/exit":
                return 0
            case "/help":
                notes.print(HELP, style="dim", soft_wrap=True)
            case "/clear":
                dialogue.clear()
                notes.print("forgotten", style="dim")
            case word if word.startswith("/") and len(word.split()) == 1:
                notes.print(f"{word} is no command: {HELP}", style="dim", soft_wrap=True, markup=False)
            case _:
                _show_answer(dialogue, line, notes)
    print()
    return 0


def _next_line(notes: Console) -> str | None:
    """What the user typed; None at the end. Ctrl-C only drops the line."""
    while True:
        try:
            return input(PROMPT)
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            notes.print(HELP, style="dim", soft_wrap=True)


def _show_answer(dialogue: Dialogue, text: str, notes: Console) -> None:
    """Print the answer while it comes; Ctrl-C stops it. Say why it is shorter than one would expect."""
    empty, reason = True, None
    try:
        with closing(dialogue.answer(text)) as pieces:
            for piece in pieces:
                print(piece.text, end="", flush=True)
                empty, reason = empty and not piece.text, piece.finish_reason
    except KeyboardInterrupt:
        reason = "stopped"
    except GossamerError as error:
        notes.print(str(error), soft_wrap=True, markup=False)
        return
    if not empty or reason == "stopped":
        print()
    if empty and reason == "stop":
        notes.print("the model ended at once, without an answer", style="dim")
    elif reason == "length":
        notes.print("the answer was cut: --max-tokens, or the context is full", style="dim")
