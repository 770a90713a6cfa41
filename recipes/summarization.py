"""Summaries, as in the paper: CNN/DailyMail 3.0.0 behind "Article: ... Summarization:", SquareHead; ROUGE."""

from collections.abc import Mapping
from typing import Any

from one_task import main

from gossamer.runs.recipe import Task


def example(row: Mapping[str, Any]) -> Mapping[str, str]:
    """Of CNN/DailyMail's fields, or SciTLDR's (lists of sentences, of which summaries the first counts)."""
    article = row.get("article") or row["source"]
    summary = row.get("highlights") or row["target"]
    text = article if isinstance(article, str) else " ".join(article)
    return {
        "prompt": f"Article: {text}\nSummarization:",
        "completion": f" {summary if isinstance(summary, str) else summary[0]}",
    }


TASK = Task(
    name="summarization",
    format="prompt-completion",
    example=example,
    kind="summarization",
    question=example,
    learning_rate={0.0: 2e-5, 0.5: 1e-4, 0.7: 1e-4},  # the table names none: ours
    epochs={0.0: 2, 0.5: 2, 0.7: 2},
)

if __name__ == "__main__":
    main(TASK, __doc__)
