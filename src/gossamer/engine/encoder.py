"""The engine for vectors of texts: encoders, without padding."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gossamer import _native
from gossamer.engine.answers import MAX_ANSWER_LEN, STRIDE, Answer, Windows
from gossamer.engine.entities import Entity, Words
from gossamer.engine.heads import OF_VECTORS, Label, SequenceHead, TokenHead, cannot, sigmoid
from gossamer.engine.model import num_threads_of, tokenizer_of
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.report import Event, Progress, quiet
from gossamer.packed.cache import open_packed
from gossamer.tokens.pooling import PoolingMode
from gossamer.tokens.texts import Text, Texts

_OF_DOCUMENTS = ("document", "passage", "corpus")  # names of prompts, as sentence-transformers looks for them
_CALL_TOKENS = 16384  # that one native call gets, between which Ctrl-C is heard

Floats = NDArray[np.float32]
Given = TypeVar("Given")


@dataclass(frozen=True)
class TokenIds:
    """What the engine is given of a text or of a pair; `is_cut`: the text was longer than this."""

    ids: Sequence[int]
    type_ids: Sequence[int]
    is_cut: bool = False


class Encoder:
    """A packed encoder that makes vectors of texts.

    encoder = Encoder("model.goss")
    vectors_ND = encoder.encode(["How big is London?", "London has nine million people."])

    Each text is computed by itself, without padding, so that what comes out depends on no other text.
    """

    def __init__(
        self,
        path: str | Path,
        num_threads: int | None = None,
        *,
        offline: bool = False,
        progress: Progress = quiet,
    ) -> None:
        """Open a .goss file, or a directory or `org/name[@revision]` of the hub, packed once into the cache.

        `num_threads` None takes GOSSAMER_THREADS or the physical cores. UnsupportedError for a decoder.
        """
        threads = num_threads_of(num_threads)
        packed = open_packed(path, progress, offline=offline)
        config = packed.native_encoder_config()
        self.path, self.architecture, self.pooling = packed.path, packed.architecture, packed.pooling
        self.tokenizer = tokenizer_of(packed)
        self.head, self.token_head = SequenceHead.open(packed), TokenHead.open(packed)
        self._texts, self._progress = Texts(self.tokenizer, self.pooling.max_length), progress
        self._native = _native.Encoder(packed.buffer, packed.native_tensors(), config, threads)

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | Sequence[str] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        truncate: bool = True,
    ) -> Floats | list[Floats]:
        """float32 [N, D], a vector of each text, or [D] of a single one; as sentence-transformers' `encode`.

        `prompt`, or the model's own of the name `prompt_name`, goes before each text. What is longer than
        the model's `max_length` is cut, or a ConfigError without `truncate`. At most `batch_size` texts are
        given to the engine at once: this changes no vector. The model's files, or `normalize_embeddings`, say
        whether vectors have length 1; `truncate_dim` keeps their first numbers. Without `convert_to_numpy`
        they come as a list. `show_progress_bar` tells the encoder's `progress` how many texts are done.
        UnsupportedError of a model whose head makes of texts something else, and of other options'
        values that mean anything but float32 vectors of texts, in NumPy, by the CPU.
        """
        self._refuse_options(output_value, precision, convert_to_tensor, device)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dimension:
            raise ConfigError(f"truncate_dim is {truncate_dim}; expected 1 to {self.dimension}")
        before = self.prompt_of(prompt_name) if prompt is None else prompt
        texts = (
            [sentences] if isinstance(sentences, str) else _listed(sentences, "a text, or a list of texts")
        )
        _refuse_what_is_no_text([before, *texts])
        rows = self.token_ids([before + text for text in texts], truncate=truncate)
        progress = self._progress if show_progress_bar else quiet
        vectors_ND = self.vectors(
            rows, normalize=normalize_embeddings, batch_size=batch_size, progress=progress
        )
        if truncate_dim is not None:
            vectors_ND = vectors_ND[:, :truncate_dim]
            vectors_ND = of_length_1(vectors_ND) if normalize_embeddings else vectors_ND
        if isinstance(sentences, str):
            return vectors_ND[0]
        return vectors_ND if convert_to_numpy else list(vectors_ND)

    def classify(self, texts: Sequence[Text], *, truncate: bool = True) -> list[list[Label]]:
        """Of each text, or pair of texts, all labels with their probabilities, the likeliest first.

        What is longer than the model's `max_length` is cut, of a pair the longer text first, or a ConfigError
        without `truncate`. UnsupportedError of a model without a head for whole texts.
        """
        head = self.classifier()
        texts = _listed(texts, "a list of texts or of pairs")
        _refuse_what_is_no_pair([it for it in texts if not isinstance(it, str)])
        scores_NL = head.scores(self.pooled(self.token_ids(texts, truncate=truncate)))
        return head.named(head.probabilities(scores_NL))

    def tag(self, texts: Sequence[str | Sequence[str]], *, truncate: bool = True) -> list[list[Entity]]:
        """The entities of each text, in order, as transformers' pipeline finds them by "first".

        A word has its first token's label, and words are grouped by their labels as `spans` says. Words are
        the tokenizer's, of byte-level ones too, where transformers takes what stands between spaces. A text
        may be a list of words: then these are labelled, and `start` and `end` count in the text that they
        make with a space between each two. What is longer than the model's `max_length` is cut, or a
        ConfigError without `truncate`. UnsupportedError of a model without a head for tokens.
        """
        self.tagger()
        found = [self._words(text) for text in _listed(texts, "a list of texts, or of lists of words")]
        if not truncate:
            self._refuse_cut([it.is_cut for it in found])
        return [it.entities(labels) for it, labels in zip(found, self._labels(found), strict=True)]

    def label_words(self, texts: Sequence[Sequence[str]]) -> list[list[Label | None]]:
        """Of texts that are lists of words the label of each word, which is that of its first token.

        None where the model sees nothing of a word, as behind its `max_length`. UnsupportedError as of `tag`.
        """
        self.tagger()
        listed = [_listed(words, "a list of words") for words in _listed(texts, "a list of lists of words")]
        return self._labels([self._words(words) for words in listed])

    def answer(
        self, question: str, context: str, *, max_answer_len: int = MAX_ANSWER_LEN, stride: int = STRIDE
    ) -> Answer:
        """The likeliest answer of at most `max_answer_len` tokens that stands in the context.

        It is always one: where the model was trained to say that there is none (as by SQuAD 2), it says so by
        a `no_answer_score` above the `score`. A context beyond the model's `max_length` is read in windows,
        two of which share `stride` tokens. UnsupportedError of a model without such a head.
        """
        [found] = self.answers([(question, context)], max_answer_len=max_answer_len, stride=stride)
        return found

    def answers(
        self,
        asked: Sequence[tuple[str, str]],
        *,
        max_answer_len: int = MAX_ANSWER_LEN,
        stride: int = STRIDE,
    ) -> list[Answer]:
        """The same of several questions, each with its context."""
        if self.architecture.task != "spans":
            raise cannot("answer", self.architecture, self.path)
        if max_answer_len < 1 or stride < 0:
            raise ConfigError(
                f"max_answer_len is {max_answer_len} and stride {stride}; expected at least 1, and 0"
            )
        asked = _listed(asked, "a list of pairs, each a question and its context")
        _refuse_what_is_no_pair(asked)
        found = [Windows.of(*pair, self._texts, stride) for pair in asked]
        scores = self._token_scores([self._row(window) for it in found for window in it.encoded])
        return [it.best([next(scores) for _ in it.encoded], max_answer_len) for it in found]

    def rerank(
        self, query: str, documents: Sequence[str], *, raw_scores: bool = False, truncate: bool = True
    ) -> list[float]:
        """How well each document answers the query, in their order.

        A head of one label is given both as a pair, and its score becomes one of 0 to 1, unless `raw_scores`.
        A model that makes vectors compares them: cosines, with its prompts "query", and "document" or
        "passage", where it has them. What is longer than the model's `max_length` is cut, or a ConfigError
        without `truncate`. UnsupportedError of other models.
        """
        vectors_ND = self.pooled(self.rerank_rows(query, documents, truncate=truncate))
        return self.pair_scores(vectors_ND, raw_scores=raw_scores)

    def rerank_rows(self, query: str, documents: Sequence[str], *, truncate: bool = True) -> list[TokenIds]:
        """What `pooled` takes for `pair_scores` of one query: the pairs, or the query and the documents."""
        documents = _listed(documents, "a list of documents")
        _refuse_what_is_no_text([query, *documents])
        if self.head is None:
            self.check_vectors("rerank")
            prompts = self.pooling.prompts
            query = self.prompt_of("query" if "query" in prompts else None) + query
            before = self.prompt_of(next((name for name in _OF_DOCUMENTS if name in prompts), None))
            documents = [before + document for document in documents]
        return self.pair_rows([query], documents, truncate=truncate)

    def pair_rows(
        self, first: Sequence[str], second: Sequence[str], *, truncate: bool = True
    ) -> list[TokenIds]:
        """What `pooled` takes for `pair_scores`: pairs, or the first texts and then the second ones.

        There are as many of both, or one first text for all. UnsupportedError of models that rank nothing.
        """
        if self.head is None:
            self.check_vectors("rerank")
            return self.token_ids([*first, *second], truncate=truncate)
        if len(self.head.labels) != 1:
            what = f"rerank, which takes one label: it has {len(self.head.labels)}; use classify"
            raise cannot(what, self.architecture, self.path)
        whole = [*first] * len(second) if len(first) == 1 else first
        return self.token_ids([*zip(whole, second, strict=True)], truncate=truncate)

    def pair_scores(self, vectors_ND: Floats, num_first: int = 1, *, raw_scores: bool = False) -> list[float]:
        """The pairs' scores, from what `pooled` made of `pair_rows` that had so many first texts."""
        if self.head is not None:
            scores_N = self.head.scores(vectors_ND)[:, 0]
            return (scores_N if raw_scores else sigmoid(scores_N)).tolist()
        vectors_ND = of_length_1(vectors_ND)
        return (vectors_ND[num_first:] * vectors_ND[:num_first]).sum(axis=1).tolist()

    def check_vectors(self, method: str) -> None:
        """UnsupportedError of a model whose vectors, trained for its head, are none of texts' meanings."""
        if self.architecture.task not in OF_VECTORS:
            raise cannot(method, self.architecture, self.path)

    def classifier(self) -> SequenceHead:
        """The head for whole texts; UnsupportedError of a model that has none."""
        if self.head is None:
            raise cannot("classify", self.architecture, self.path)
        return self.head

    def tagger(self) -> TokenHead:
        """The head for tokens; UnsupportedError of a model that has none."""
        if self.token_head is None or self.architecture.task != "tokens":
            raise cannot("tag", self.architecture, self.path)
        return self.token_head

    def _refuse_options(self, value: str | None, precision: str, tensor: bool, device: Any) -> None:
        """UnsupportedError for what sentence-transformers' `encode` takes and this one does not."""
        problems = {
            f"output_value={value!r} (hidden_states has those of tokens)": value != "sentence_embedding",
            f"precision={precision!r} (vectors are float32)": precision != "float32",
            "convert_to_tensor=True (torch.from_numpy makes a tensor of what comes)": tensor,
            f"device={device!r} (this engine runs on CPUs)": device not in (None, "cpu"),
        }
        if found := [name for name, is_there in problems.items() if is_there]:
            raise UnsupportedError(f"{self.path}: encode has no {', '.join(found)}; leave it out")

    def _words(self, text: str | Sequence[str]) -> Words:
        if isinstance(text, str):
            [encoded] = self._texts.encode([text])
            return Words.seen_in(text, encoded)
        words = _listed(text, "a text, or a list of words")
        _refuse_what_is_no_text(words)
        return Words.given(words, self._texts.encode_words(words))

    def _labels(self, texts: Sequence[Words]) -> list[list[Label | None]]:
        """The likeliest label of each word's first token."""
        head, found = self.tagger(), list[list[Label | None]]()
        scores = self._token_scores([TokenIds(it.ids, [0] * len(it.ids)) for it in texts])
        for words, scores_TL in zip(texts, scores, strict=True):
            seen = [it for it in words.firsts if it is not None]
            label_of = dict(zip(seen, head.likeliest(scores_TL[seen]), strict=True))
            found.append([None if it is None else label_of[it] for it in words.firsts])
        return found

    def _token_scores(self, rows: Sequence[TokenIds]) -> Iterator[Floats]:
        """float32 [T, L] of each row: what the head for tokens says."""
        assert self.token_head is not None
        for part in _batches(rows, None):
            yield from map(self.token_head.scores, self.states(part))

    def hidden_states(self, texts: Sequence[Text]) -> list[Floats]:
        """float32 [T, D] of each text, or pair of texts: the last hidden states of its tokens."""
        return [it for part in _batches(self.token_ids(texts), None) for it in self.states(part)]

    def states(self, rows: Sequence[TokenIds]) -> list[Floats]:
        """The same of rows, in one native call."""
        states_TD = self._native.hidden_states(*_joined(rows))
        return np.split(states_TD, np.cumsum([len(row.ids) for row in rows])[:-1])

    def token_ids(self, texts: Sequence[Text], *, truncate: bool = True) -> list[TokenIds]:
        """Of each text, or pair of texts, what `pooled` takes; cut at the model's `max_length`.

        Without `truncate` a text that is longer is a ConfigError.
        """
        rows = [self._row(it) for it in self._texts.encode(texts)]
        if not truncate:
            self._refuse_cut([row.is_cut for row in rows])
        return rows

    def _refuse_cut(self, are_cut: Sequence[bool]) -> None:
        if any(are_cut):
            raise ConfigError(
                f"found {sum(are_cut)} of {len(are_cut)} texts, the first of them number "
                f"{are_cut.index(True)} from 0 on, of more than {self.pooling.max_length} tokens, this "
                "model's limit; shorten them, or have them cut by truncate=True"
            )

    def _row(self, encoded: tokenizers.Encoding) -> TokenIds:
        num_types = self.architecture.added.num_types if self.architecture.added else 1
        types = encoded.type_ids if num_types > 1 else [0] * len(encoded.ids)
        return TokenIds(encoded.ids, types, bool(encoded.overflowing))

    def vectors(
        self,
        rows: Sequence[TokenIds],
        *,
        normalize: bool = False,
        batch_size: int | None = None,
        progress: Progress = quiet,
    ) -> Floats:
        """float32 [N, D]: the vector of each row; of length 1 where `normalize` or the model's files say so.

        UnsupportedError as of `encode`.
        """
        self.check_vectors("encode")
        vectors_ND = self.pooled(rows, batch_size, progress)
        return of_length_1(vectors_ND) if normalize or self.pooling.normalize else vectors_ND

    def pooled(
        self, rows: Sequence[TokenIds], batch_size: int | None = None, progress: Progress = quiet
    ) -> Floats:
        """float32 [N, D]: what the pooling makes of each row, of whatever length, or what the head takes."""
        mode: PoolingMode = self.pooling.mode if self.head is None else self.head.pooling
        parts, done = [np.empty((0, self.dimension), np.float32)], 0
        for part in _batches(rows, batch_size):
            parts.append(self._native.encode(*_joined(part), mode))
            progress(Event("encode", "texts", done := done + len(part), len(rows)))
        return np.concatenate(parts)

    @property
    def num_cut(self) -> int:
        """Texts, or pairs, so far that were longer than the model's `max_length`."""
        return self._texts.num_cut

    @property
    def dimension(self) -> int:
        """D: numbers of a vector."""
        return self.architecture.hidden_size

    def prompt_of(self, name: str | None) -> str:
        """What goes before each text; the model's default where no name is given. ConfigError for others."""
        prompts, name = self.pooling.prompts, self.pooling.default_prompt if name is None else name
        if name is not None and name not in prompts:
            known = ", ".join(prompts) or "none"
            raise ConfigError(f"found the prompt_name {name!r}; this model's prompts: {known}")
        return "" if name is None else prompts[name]


def of_length_1(vectors_ND: Floats) -> Floats:
    """float32 [N, D]; zeros remain zeros."""
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)


def _refuse_what_is_no_text(texts: Sequence[str]) -> None:
    if any(not isinstance(other := it, str) for it in texts):
        raise ConfigError(f"found {other!r:.80} among the sentences; expected texts")


def _refuse_what_is_no_pair(pairs: Sequence[object]) -> None:
    for it in pairs:
        if not (isinstance(it, tuple) and len(it) == 2 and all(isinstance(part, str) for part in it)):
            raise ConfigError(f"found {it!r:.80} among the texts; expected texts, or pairs (text, text)")


def _listed(texts: Iterable[Given], expected: str) -> list[Given]:
    """All that are given; ConfigError for a text alone, which is a sequence as well: of its letters."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ConfigError(f"found {texts!r:.80}; expected {expected}")
    return list(texts)


def _batches(rows: Sequence[TokenIds], most: int | None) -> Iterator[Sequence[TokenIds]]:
    """The texts in order, at most `most` together, and about as many tokens as one call gets."""
    begin = tokens = 0
    for index, row in enumerate(rows):
        tokens += len(row.ids)
        if tokens >= _CALL_TOKENS or index + 1 - begin == most:
            yield rows[begin : index + 1]
            begin, tokens = index + 1, 0
    if begin < len(rows):
        yield rows[begin:]


def _joined(rows: Sequence[TokenIds]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and types of all tokens, and the length of each text: int32."""
    ids = np.fromiter((index for row in rows for index in row.ids), np.int32)
    types = np.fromiter((index for row in rows for index in row.type_ids), np.int32)
    return ids, types, np.fromiter((len(row.ids) for row in rows), np.int32, len(rows))
