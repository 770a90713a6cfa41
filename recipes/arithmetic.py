"""Arithmetic, as in the paper: GSM8K, 2 to 5 epochs, SquareHead; dense 2 epochs at 3e-5 (35.5%)."""

from collections.abc import Mapping
from typing import Any

from one_task import main

from gossamer.runs.recipe import Task


def question(row: Mapping[str, Any]) -> str:
    return f"Question: {row.get('question') or row['context']}\nAnswer:"


def answer(row: Mapping[str, Any]) -> str:
    """The steps, and the number behind "####"."""
    steps = row.get("chain_of_thought")
    return row["answer"] if steps is None else f"{steps}\n#### {row['answer']}"


TASK = Task(
    name="arithmetic",
    format="prompt-completion",
    example=lambda row: {"prompt": question(row), "completion": f" {answer(row)}"},
    kind="gsm8k",  # the number behind "####" (strict), or the last one (flexible)
    question=dict,
    learning_rate={0.0: 3e-5, 0.5: 5e-5, 0.7: 1e-4},  # the paper swept 1e-5 to 1e-4
    epochs={0.0: 2, 0.5: 3, 0.7: 5},
)

if __name__ == "__main__":
    main(TASK, __doc__)
