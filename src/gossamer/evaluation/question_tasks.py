"""Questions about texts: exact match and f1 of words, as SQuAD's own program for version 2 counts them."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gossamer.data.questions import Question, read_questions
from gossamer.errors import ConfigError
from gossamer.evaluation.encoders import EncoderBackend
from gossamer.evaluation.scores import Scores, mean

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Questions:
    """Questions with the answers that people gave; those without any have none in their texts."""

    questions: list[Question]

    def measure(self, backend: EncoderBackend) -> Scores:
        """Where every question has an answer, one is always given."""
        if backend.task != "spans":
            raise ConfigError(
                f"--kind qa needs a model with a head for spans; this one's is for {backend.task}"
            )
        may_be_none = not all(it.answers for it in self.questions)
        found = backend.answers([(it.question, it.context) for it in self.questions])
        answers = [
            "" if may_be_none and it["no_answer_score"] > it["score"] else it["answer"] for it in found
        ]
        return answer_scores(answers, [it.answers for it in self.questions])


def answer_scores(answers: Sequence[str], wanted: Sequence[Sequence[str]]) -> Scores:
    """The means of both over questions, and over those that have an answer and those that have none.

    Of several right answers the nearest counts; where none has a word that counts, the right one is "".
    """
    right = [[text for text in texts if words(text)] or [""] for texts in wanted]
    pairs = [*zip(answers, right, strict=True)]
    exact_N = np.array([max(float(words(answer) == words(it)) for it in its) for answer, its in pairs])
    f1_N = np.array([max(overlap(answer, it) for it in its) for answer, its in pairs])
    has_N = np.array([bool(texts) for texts in wanted])
    parts = {"": has_N | True}
    if not has_N.all():
        parts |= {"HasAns_": has_N, "NoAns_": ~has_N}
    figures = [
        mean(f"{part}{name}", values_N[chosen_N].tolist())
        for part, chosen_N in parts.items()
        if chosen_N.any()
        for name, values_N in (("f1", f1_N), ("exact", exact_N))
    ]
    metrics = {name: value for it in figures for name, value in it.metrics.items()}
    errors = {name: error for it in figures for name, error in it.standard_errors.items()}
    return replace(figures[0], metrics=metrics, standard_errors=errors)


def words(text: str) -> list[str]:
    """What of an answer counts: its words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def overlap(answer: str, right: str) -> float:
    """f1 of the answer's words; of nothing it is 1 for nothing, and 0 for anything else."""
    ours, theirs = words(answer), words(right)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def read_question_task(file: Path, limit: int) -> Questions:
    """The first `limit` questions of a file, or all (0)."""
    questions = read_questions(file)[: limit or None]
    if not questions:
        raise ConfigError(f"{file} has no questions")
    return Questions(questions)
