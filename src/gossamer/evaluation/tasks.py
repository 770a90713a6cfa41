"""The examples of `evaluate`: prompts, and how what follows them is judged or which answer is chosen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.data import doctests
from gossamer.data.tables import TABLES, table_rows, text_of
from gossamer.errors import ConfigError

NUM_DOCTESTS = 500
DOCTESTS = ("doctest", "doctest-unseen")


@dataclass(frozen=True)
class Example:
    """A prompt and how to judge what follows it."""

    prompt: str
    kind: str
    answer: str
    check: Callable[[str], bool] = field(repr=False)


@dataclass(frozen=True)
class Choice:
    """A prompt and the answers that may follow it after a space, of which `choices[answer]` is right."""

    prompt: str
    kind: str
    choices: tuple[str, ...]
    answer: int


def task_examples(task: str, limit: int, seed: int) -> list[Example | Choice]:
    """The examples of a task by name or file; ConfigError for an unknown one."""
    if task in DOCTESTS:
        kinds = doctests.KINDS if task == "doctest" else doctests.UNSEEN_KINDS
        drawn = doctests.generate(kinds, limit or NUM_DOCTESTS, seed, split="test")
        return [
            Example(doctests.prompt(d), d.kind, d.want, lambda got, d=d: doctests.check(d, got))
            for d in drawn
        ]
    if not task.endswith(TABLES):
        known = f"doctest, doctest-unseen or a {', '.join(TABLES)} file"
        raise ConfigError(f"unknown task {task!r}; expected {known}")
    return read_examples(Path(task))[: limit or None]


def read_examples(file: Path) -> list[Example | Choice]:
    """Rows of a file with the fields `prompt`, `answer`, and perhaps `choices` and `kind`.

    `answer` is a text that must follow the prompt, or with `choices`, texts, the index of the right one.
    """
    if not file.is_file():
        raise ConfigError(f"task {str(file)!r}: no such file")
    if examples := [_example(row, where) for where, row in table_rows(file)]:
        return examples
    raise ConfigError(f"task {str(file)!r} has no examples")


def _example(row: dict[str, Any], where: str) -> Example | Choice:
    if "choices" in row:
        return _choice(row, where)
    prompt, answer = text_of(row, where, "prompt"), text_of(row, where, "answer").strip()
    return Example(prompt, str(row.get("kind", "")), answer, lambda got: got.strip() == answer)


def _choice(row: dict[str, Any], where: str) -> Choice:
    prompt, answer, choices = text_of(row, where, "prompt"), row.get("answer"), row["choices"]
    if not isinstance(choices, list) or not all(isinstance(text, str) and text.strip() for text in choices):
        raise ConfigError(f"{where}: expected a list of texts in the field choices; found {choices!r}")
    if len(set(choices)) != len(choices) or len(choices) < 2:
        raise ConfigError(f"{where}: expected at least two choices that differ; found {choices!r}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: beside choices, answer is the index of the right one, 0 to {len(choices) - 1}; "
            f"found {answer!r}"
        )
    return Choice(prompt, str(row.get("kind", "")), tuple(choices), answer)
