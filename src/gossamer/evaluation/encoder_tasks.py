"""Tasks of encoders from local files: similarity of sentences, retrieval, classes of texts.

sts             a file of pairs with people's score, or a folder of them: Spearman's rank correlation of
                the vectors' cosine with it, as STS Benchmark has it
retrieval       a folder as BEIR has it (corpus.jsonl, queries.jsonl, qrels/test.tsv): nDCG of the first
                ten documents by cosine
classification  a file of texts (or pairs) with labels: accuracy of a head for whole texts
tokens          a file of words with labels: f1 of spans (entity_tasks.py)
qa              a file of questions about texts: f1 of their answers' words, exact match (question_tasks.py)
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from gossamer.data.columns import endings, example_rows
from gossamer.data.labelled import Label, class_number, read_pair, read_text
from gossamer.data.questions import NESTED
from gossamer.data.tables import TABLES, table_rows, text_of
from gossamer.errors import ConfigError
from gossamer.evaluation.encoders import EncoderBackend
from gossamer.evaluation.entity_tasks import read_labelled_words
from gossamer.evaluation.question_tasks import read_question_task
from gossamer.evaluation.scores import Scores, accuracy, mean
from gossamer.tokens.texts import Text

EncoderKind = Literal["sts", "retrieval", "classification", "tokens", "qa"]
ENCODER_KINDS: tuple[EncoderKind, ...] = get_args(EncoderKind)
DEPTH = 10


class EncoderTask(Protocol):
    """Examples that were read."""

    def measure(self, backend: EncoderBackend) -> Scores: ...


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts and how alike people found them."""

    texts: list[tuple[str, str]]
    scores: list[float]

    def measure(self, backend: EncoderBackend) -> Scores:
        first_ND, second_ND = (backend.vectors(side) for side in zip(*self.texts, strict=True))
        return correlation((first_ND * second_ND).sum(1), np.array(self.scores))


@dataclass(frozen=True)
class Retrieval:
    """Documents, queries, and how relevant which document is to a query: by their places in the lists."""

    documents: list[str]
    queries: list[str]
    relevant: list[dict[int, int]]

    def measure(self, backend: EncoderBackend) -> Scores:
        documents_ND = backend.vectors(self.documents, "document")
        queries_MD = backend.vectors(self.queries, "query")
        return mean(
            "ndcg_at_10", [ndcg(*it) for it in zip(queries_MD @ documents_ND.T, self.relevant, strict=True)]
        )


@dataclass(frozen=True)
class Labelled:
    """Texts, or pairs, and the label of each by name or number, with `file:line` for messages."""

    texts: list[Text]
    labels: list[tuple[Label, str]]

    def measure(self, backend: EncoderBackend) -> Scores:
        if backend.task != "sequence":
            raise ConfigError(
                f"--kind classification needs a model with a head for whole texts; this one's is for "
                f"{backend.task}"
            )
        wanted_N = np.array([class_number(label, backend.labels, where) for label, where in self.labels])
        return accuracy((backend.label_scores(self.texts).argmax(1) == wanted_N).tolist())


def read_encoder_tasks(path: Path, kind: EncoderKind, limit: int) -> dict[str, EncoderTask]:
    """The tasks by their names, at least one; ConfigError for what is not of this kind.

    `limit`: rows, or queries, at most; 0: all.
    """
    if kind == "retrieval":
        return {path.name: _retrieval(path, limit)}
    known = (*TABLES, NESTED) if kind == "qa" else endings(kind)
    files = sorted(it for it in path.iterdir() if it.name.endswith(known)) if path.is_dir() else [path]
    if not files or not all(it.is_file() and it.name.endswith(known) for it in files):
        found = "a folder without them" if path.is_dir() else "another kind of file"
        raise ConfigError(
            f"{path}, for --kind {kind}: found {found if path.exists() else 'no such file'}; "
            f"expected a file of {', '.join(known)}, or a folder of them"
        )
    read: dict[str, Callable[[Path, int], EncoderTask]] = {
        "sts": _pairs,
        "classification": _labelled,
        "tokens": read_labelled_words,
        "qa": read_question_task,
    }
    return {it.name: read[kind](it, limit) for it in files}


def _pairs(file: Path, limit: int) -> Pairs:
    rows = [read_pair(row, where) for where, row in _few(example_rows(file, "sts"), limit)]
    if len({score for _, _, score in rows}) < 2:
        raise ConfigError(
            f"{file}: {len(rows)} pairs with one score in all; expected pairs whose scores differ"
        )
    return Pairs([(first, second) for first, second, _ in rows], [score for *_, score in rows])


def _labelled(file: Path, limit: int) -> Labelled:
    rows = [
        (where, *read_text(row, where)) for where, row in _few(example_rows(file, "classification"), limit)
    ]
    if not rows:
        raise ConfigError(f"{file} has no examples")
    return Labelled([text for _, text, _ in rows], [(label, where) for where, _, label in rows])


def _retrieval(folder: Path, limit: int) -> Retrieval:
    files = [folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"]
    if lacking := [str(it) for it in files if not it.is_file()]:
        raise ConfigError(
            f"{', '.join(lacking)}: found nothing; expected a folder as BEIR has it: corpus.jsonl "
            "(_id, title, text), queries.jsonl (_id, text), qrels/test.tsv (query-id, corpus-id, score)"
        )
    documents = {_id(row, where): _document(row, where) for where, row in table_rows(files[0])}
    texts = {_id(row, where): text_of(row, where, "text") for where, row in table_rows(files[1])}
    place = {name: index for index, name in enumerate(documents)}
    judged: dict[str, dict[int, int]] = {}
    for number, line in enumerate(files[2].read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split("\t")
        if number == 1 and columns[-1] == "score":
            continue
        try:
            query, document, relevance = columns[0], place[columns[1]], int(columns[2])
            texts[query]
        except (IndexError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{files[2]}:{number}: found {line[:60]!r}; expected the ids of a query and of a document "
                "that are there, and a whole number"
            ) from error
        if relevance > 0:
            judged.setdefault(query, {})[document] = relevance
    queries = list(_few(judged, limit))
    if not queries:
        raise ConfigError(f"{files[2]}: says of no document that it is relevant")
    return Retrieval([*documents.values()], [texts[it] for it in queries], [judged[it] for it in queries])


def _id(row: Mapping[str, Any], where: str) -> str:
    if not isinstance(found := row.get("_id"), int | str):
        raise ConfigError(f"{where}: _id is {found!r:.40}; expected the name of a document or query")
    return str(found)


def _document(row: Mapping[str, Any], where: str) -> str:
    title = row.get("title") or ""
    return f"{title} {text_of(row, where, 'text', blank=True)}".strip()


def _few(rows: Any, limit: int) -> Iterator[Any]:
    for number, row in enumerate(rows):
        if limit and number == limit:
            return
        yield row


def correlation(found_N: NDArray[Any], wanted_N: NDArray[Any]) -> Scores:
    """Spearman's: Pearson's of the ranks.

    A sample is rho and what the example adds to it in first order, z w - rho (z^2 + w^2) / 2 of standardized
    ranks z and w (the influence function), so that their spread is the error of rho.
    """
    z_N, w_N = (_standardized(_ranks(it)) for it in (found_N, wanted_N))
    rho = float((z_N * w_N).mean())
    return mean("spearman", (rho + z_N * w_N - rho * (z_N**2 + w_N**2) / 2).tolist())


def _ranks(numbers_N: NDArray[Any]) -> NDArray[Any]:
    """From 1 on; equal numbers share the mean of their ranks."""
    _, place_N, count = np.unique(numbers_N, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place_N]


def _standardized(ranks_N: NDArray[Any]) -> NDArray[Any]:
    spread = ranks_N.std()
    return (ranks_N - ranks_N.mean()) / (spread if spread > 0 else 1.0)


def ndcg(similarity_N: NDArray[Any], relevant: Mapping[int, int]) -> float:
    """Of one query: gains of the first DEPTH documents, discounted by their places, over the best order's."""
    order = np.argsort(-similarity_N, kind="stable")[:DEPTH]
    discounts = 1 / np.log2(np.arange(2, DEPTH + 2))
    gains = np.array([relevant.get(int(index), 0) for index in order], dtype=float)
    best = np.array(sorted(relevant.values(), reverse=True)[:DEPTH], dtype=float)
    return float((gains * discounts[: len(gains)]).sum() / (best * discounts[: len(best)]).sum())
