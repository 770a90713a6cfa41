"""Instructions, as in the paper: Open-Platypus and Dolphin, 1e-4, 2 or (70%) 4 epochs, no teacher."""

from collections.abc import Mapping
from typing import Any

from one_task import main

from gossamer.runs.recipe import Task


def example(row: Mapping[str, Any]) -> Mapping[str, str]:
    """Of a row with instruction, input and output, as both have it; or with prompt and response."""
    answer = row.get("output") or row["response"]
    if "instruction" not in row:
        return {"prompt": row["prompt"], "completion": answer}
    given = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return {
        "prompt": f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n",
        "completion": answer,
    }


TASK = Task(
    name="instruction",
    format="prompt-completion",
    example=example,
    kind="summarization",  # ROUGE of the answers
    also="ifeval",  # whose rules are checked of --ifeval FILE
    question=example,
    learning_rate={0.0: 1e-4, 0.5: 1e-4, 0.7: 1e-4},
    epochs={0.0: 2, 0.5: 2, 0.7: 4},
    distill="none",
)

if __name__ == "__main__":
    main(TASK, __doc__)
