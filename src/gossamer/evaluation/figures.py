"""The figures of one model: perplexity of a text, accuracy in tasks, and their share of a baseline's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gossamer.evaluation.backends import BATCH_ROWS, Backend
from gossamer.evaluation.tasks import Example
from gossamer.job.report import Event, Progress

BATCH_TOKENS = 4096  # whose logits are in memory at once
SLACK_TOKENS = 8  # beyond the answer's own tokens, for a model that spells it in more


@dataclass
class Figures:
    """What was measured of one model: `accuracy` of each task, `by_kind` of each kind of its examples."""

    perplexity: float | None = None
    num_tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)


def measure_text(
    figures: Figures, backend: Backend, text: str, rows_BT: NDArray[np.int64], progress: Progress
) -> None:
    """Add the perplexity of rows of tokens, the first of each not counted; `text` names them."""
    total, figures.num_tokens = 0.0, rows_BT[:, 1:].size
    num_rows = min(BATCH_ROWS, max(1, BATCH_TOKENS // rows_BT.shape[1]))
    for first in range(0, len(rows_BT), num_rows):
        total += backend.log_likelihood(rows_BT[first : first + num_rows])
        progress(Event("evaluate", text, min(first + num_rows, len(rows_BT)), len(rows_BT)))
    figures.perplexity = float(np.exp(-total / figures.num_tokens))


def measure_tasks(
    figures: Figures, backend: Backend, tasks: Mapping[str, Sequence[Example]], progress: Progress
) -> None:
    """Add the share of examples that the model completes rightly, for each task and kind of example."""
    for task, examples in tasks.items():
        passed = judge(backend, task, examples, progress)
        kinds = sorted({example.kind for example in examples})
        figures.accuracy[task] = float(np.mean(passed))
        figures.by_kind[task] = {
            kind: float(np.mean([ok for ok, e in zip(passed, examples, strict=True) if e.kind == kind]))
            for kind in kinds
        }


def judge(backend: Backend, task: str, examples: Sequence[Example], progress: Progress) -> list[bool]:
    """Whether the greedy completion of each example is right; one line where the answer is one line."""
    passed: list[bool] = []
    lengths = [len(backend.tokenizer.encode(example.answer, bos=False)) for example in examples]
    stop = "" if any("\n" in example.answer for example in examples) else "\n"
    for first in range(0, len(examples), BATCH_ROWS):
        batch = slice(first, first + BATCH_ROWS)
        prompts = [example.prompt for example in examples[batch]]
        texts = backend.complete(prompts, stop, max(lengths[batch]) + SLACK_TOKENS)
        passed += [example.check(text) for example, text in zip(examples[batch], texts, strict=True)]
        progress(Event("evaluate", task, len(passed), len(examples), {"accuracy": float(np.mean(passed))}))
    return passed


def recovery(ours: Figures, base: Figures) -> dict[str, float]:
    """Share of the baseline's figures; a task that the baseline fails wholly has none."""
    shares = {task: ours.accuracy[task] / value for task, value in base.accuracy.items() if value > 0}
    if ours.perplexity is not None and base.perplexity is not None:
        shares = {"perplexity": base.perplexity / ours.perplexity} | shares
    return shares
