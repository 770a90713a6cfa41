"""The examples of `evaluate`: prompts, and how what follows them is judged."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gossamer.data import doctests
from gossamer.errors import ConfigError

NUM_DOCTESTS = 500


@dataclass(frozen=True)
class Example:
    """A prompt and how to judge what follows it."""

    prompt: str
    kind: str
    answer: str
    check: Callable[[str], bool] = field(repr=False)


def task_examples(task: str, limit: int, seed: int) -> list[Example]:
    """The examples of a task by name or file; ConfigError for an unknown one."""
    if task in ("doctest", "doctest-unseen"):
        kinds = doctests.KINDS if task == "doctest" else doctests.UNSEEN_KINDS
        drawn = doctests.generate(kinds, limit or NUM_DOCTESTS, seed, split="test")
        return [
            Example(doctests.prompt(d), d.kind, d.want, lambda got, d=d: doctests.check(d, got))
            for d in drawn
        ]
    if not task.endswith(".jsonl"):
        raise ConfigError(f"unknown task {task!r}; expected doctest, doctest-unseen or a .jsonl file")
    return read_examples(Path(task))[: limit or None]


def read_examples(file: Path) -> list[Example]:
    """Rows of a .jsonl file with text fields `prompt` and `answer`, and perhaps `kind`."""
    if not file.is_file():
        raise ConfigError(f"task {str(file)!r}: no such file")
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [(f"{file}:{n}", _row(line, f"{file}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"task {str(file)!r} has no examples")
    return [_example(row, where) for where, row in rows]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not a line of JSON ({error})") from error
    wanted = ("prompt", "answer")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in wanted):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where}: expected text in the fields prompt and answer; found {found}")
    return row


def _example(row: dict[str, Any], where: str) -> Example:
    answer = row["answer"].strip()
    if not row["prompt"] or not answer:
        raise ConfigError(f"{where}: prompt or answer is empty")
    return Example(row["prompt"], str(row.get("kind", "")), answer, lambda got: got.strip() == answer)
