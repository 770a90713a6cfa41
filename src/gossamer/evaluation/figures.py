"""The figures of one model: perplexity of a text, accuracy in tasks, and their share of a baseline's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gossamer.evaluation.backends import BATCH_ROWS, Backend
from gossamer.evaluation.harness import Scores
from gossamer.evaluation.tasks import Choice, Example
from gossamer.job.report import Event, Progress

BATCH_TOKENS = 4096  # whose logits are in memory at once
SLACK_TOKENS = 8  # beyond the answer's own tokens, for a model that spells it in more


@dataclass
class Figures:
    """What was measured of one model: `accuracy` of each task, `by_kind` of each kind of its examples.

    `scores`: of the tasks that the harness ran, whose primary metric is in `accuracy` too.
    """

    perplexity: float | None = None
    num_tokens: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Perplexity, if there is one, and accuracies, by name."""
        text = {} if self.perplexity is None else {"perplexity": self.perplexity}
        return {**text, **self.accuracy}


def measure_text(
    figures: Figures, backend: Backend, text: str, rows_BT: NDArray[np.int64], progress: Progress
) -> None:
    """Add the perplexity of rows of tokens, the first of each not counted; `text` names them."""
    total, figures.num_tokens = 0.0, rows_BT[:, 1:].size
    num_rows = min(BATCH_ROWS, max(1, BATCH_TOKENS // rows_BT.shape[1]))
    for first in range(0, len(rows_BT), num_rows):
        total += float(backend.log_probs(rows_BT[first : first + num_rows]).sum())
        progress(Event("evaluate", text, min(first + num_rows, len(rows_BT)), len(rows_BT)))
    figures.perplexity = float(np.exp(-total / figures.num_tokens))


def measure_tasks(
    figures: Figures, backend: Backend, tasks: Mapping[str, Sequence[Example | Choice]], progress: Progress
) -> None:
    """Add the share of examples that the model gets right, for each task and kind of example."""
    for task, examples in tasks.items():
        passed = judge(backend, task, examples, progress)
        kinds = sorted({example.kind for example in examples})
        figures.accuracy[task] = float(np.mean(passed))
        figures.by_kind[task] = {
            kind: float(np.mean([ok for ok, e in zip(passed, examples, strict=True) if e.kind == kind]))
            for kind in kinds
        }


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


def recovery(ours: Figures, base: Figures) -> dict[str, float]:
    """Share of the baseline's figures; a task that the baseline fails wholly has none."""
    shares = {task: ours.accuracy[task] / value for task, value in base.accuracy.items() if value > 0}
    for task, scores in ours.scores.items():
        if task in shares and scores.lower_is_better:
            shares[task] = 1 / shares[task]
    if ours.perplexity is not None and base.perplexity is not None:
        shares = {"perplexity": base.perplexity / ours.perplexity} | shares
    return shares


def recovery_errors(ours: Figures, base: Figures) -> dict[str, float]:
    """The standard error of the recovery of each task that the harness ran, paired by example.

    It is the delta method's: of mean(x) / mean(y), by the spread of x - r y.
    """
    errors: dict[str, float] = {}
    for task in base.scores:
        scores = ours.scores[task]
        x, y = np.array(scores.samples), np.array(base.scores[task].samples)
        if len(x) == len(y) > 1 and base.accuracy[task] > 0:
            rest = x - ours.accuracy[task] / base.accuracy[task] * y
            errors[task] = float(rest.std(ddof=1) / np.sqrt(len(rest)) / base.accuracy[task])
    return errors
