"""The figures of one model: perplexity of a text, and accuracy in tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gossamer.evaluation.backends import BATCH_ROWS, Backend
from gossamer.evaluation.scores import Scores, accuracy, perplexity
from gossamer.evaluation.tasks import Choice, Example
from gossamer.job.report import Event, Progress

BATCH_TOKENS = 4096  # whose logits are in memory at once
SLACK_TOKENS = 8  # beyond the answer's own tokens, for a model that spells it in more


@dataclass
class Figures:
    """What was measured of one model: its scores of a text and of each task, `by_kind` of its examples."""

    text: Scores | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Scores]:
        """All scores; those of the text are named "perplexity"."""
        text = {} if self.text is None else {"perplexity": self.text}
        return {**text, **self.scores}

    def values(self) -> dict[str, float]:
        """Perplexity, if there is one, and accuracies, by name."""
        return {name: scores.value for name, scores in self.named.items()}


def measure_text(backend: Backend, text: str, rows_BT: NDArray[np.int64], progress: Progress) -> Scores:
    """The perplexity of rows of tokens, the first of each not counted; `text` names them."""
    num_rows = min(BATCH_ROWS, max(1, BATCH_TOKENS // rows_BT.shape[1]))
    totals: list[float] = []
    for first in range(0, len(rows_BT), num_rows):
        totals += backend.log_probs(rows_BT[first : first + num_rows]).sum(1).tolist()
        progress(Event("evaluate", text, min(first + num_rows, len(rows_BT)), len(rows_BT)))
    return perplexity(totals, [rows_BT.shape[1] - 1] * len(rows_BT))


def measure_task(
    backend: Backend, task: str, examples: Sequence[Example | Choice], progress: Progress
) -> tuple[Scores, dict[str, float]]:
    """The share of examples that the model gets right, and that of each kind of example."""
    passed = judge(backend, task, examples, progress)
    kinds = sorted({example.kind for example in examples})
    by_kind = {
        kind: float(np.mean([ok for ok, e in zip(passed, examples, strict=True) if e.kind == kind]))
        for kind in kinds
    }
    return accuracy(passed), by_kind


def judge(
    backend: Backend, task: str, examples: Sequence[Example | Choice], progress: Progress
) -> list[bool]:
    """Whether the model gets each example right, batch by batch, in their order."""
    passed: list[bool] = []
    for first in range(0, len(examples), BATCH_ROWS):
        batch = examples[first : first + BATCH_ROWS]
        texts = iter(complete(backend, [example for example in batch if isinstance(example, Example)]))
        for example in batch:
            if isinstance(example, Choice):
                passed.append(choose(backend, example) == example.answer)
            else:
                passed.append(example.check(next(texts)))
        progress(Event("evaluate", task, len(passed), len(examples), {"accuracy": float(np.mean(passed))}))
    return passed


def complete(backend: Backend, examples: Sequence[Example]) -> list[str]:
    """Greedy completions, as long as the longest answer needs; one line where all answers are one line."""
    if not examples:
        return []
    answers = [example.answer for example in examples]
    longest = max(len(backend.tokenizer.encode(answer, bos=False)) for answer in answers)
    stop = "" if any("\n" in answer for answer in answers) else "\n"
    return backend.complete([example.prompt for example in examples], stop, longest + SLACK_TOKENS)


def choose(backend: Backend, example: Choice) -> int:
    """The index of the choice with the highest mean log probability a character after the prompt.

    lm-eval's `acc_norm`: each choice is scored with a space before it, which is not counted as a character.
    """
    prompt, scores = backend.tokenizer.prompt(example.prompt), []
    for choice in example.choices:
        ids = backend.tokenizer.prompt(f"{example.prompt} {choice}")
        first = min(len(prompt), len(ids) - 1)  # what joins the prompt's last token changes the length
        log_probs = backend.log_probs(np.array([ids]))[0, first - 1 :]
        scores.append(float(log_probs.sum()) / len(choice))
    return int(np.argmax(scores))
