"""Chat, as in the paper: UltraChat 200k, 2 epochs at 2e-4 (50%) or 3e-4 (70%), clipped at 2, SquareHead."""

from collections.abc import Mapping
from typing import Any

from one_task import main

from gossamer.runs.recipe import Task


def first_turn(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first question of a conversation and its answer."""
    turns = [message for message in row["messages"] if message["role"] != "system"]
    if [message["role"] for message in turns[:2]] != ["user", "assistant"]:
        return None
    return {"prompt": turns[0]["content"], "completion": turns[1]["content"]}


TASK = Task(
    name="chat",
    format="chat",
    example=lambda row: {"messages": row["messages"]},
    kind="summarization",  # ROUGE of first answers
    also="chat",  # which --judge compares
    question=first_turn,
    learning_rate={0.0: 2e-5, 0.5: 2e-4, 0.7: 3e-4},  # the table has none for the dense model: ours
    epochs={0.0: 2, 0.5: 2, 0.7: 2},
    max_grad_norm=2.0,
)

if __name__ == "__main__":
    main(TASK, __doc__)
