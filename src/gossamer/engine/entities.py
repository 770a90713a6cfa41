"""Names in a text, such as of people: words whose labels, B-PER and I-PER, say that they belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypedDict

import tokenizers

from gossamer.engine.heads import Label

OUTSIDE = "O"


class Entity(TypedDict):
    """Words of one kind in a text; `word` is text[start:end], `score` the mean of its words'."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Words:
    """A text's token ids; of each word its first token, if the model sees one, and its place in the text.

    `is_cut`: the text was longer than its tokens say.
    """

    text: str
    ids: Sequence[int]
    firsts: Sequence[int | None]
    places: Sequence[tuple[int, int]]
    is_cut: bool

    @classmethod
    def seen_in(cls, text: str, encoded: tokenizers.Encoding) -> Self:
        """The words that the tokenizer splits the text into."""
        firsts: list[int] = []
        places: list[tuple[int, int]] = []
        before = None
        for index, (word, (start, end)) in enumerate(zip(encoded.word_ids, encoded.offsets, strict=True)):
            if word is None:
                continue
            if word != before:
                firsts.append(index)
                places.append((start, end))
            places[-1] = places[-1][0], end
            before = word
        places = [without_blanks(text, *place) for place in places]  # which SentencePiece's tokens have
        seen = [index for index, (start, end) in enumerate(places) if start < end]
        is_cut = bool(encoded.overflowing)
        return cls(text, encoded.ids, [firsts[it] for it in seen], [places[it] for it in seen], is_cut)

    @classmethod
    def given(cls, words: Sequence[str], encoded: tokenizers.Encoding) -> Self:
        """These words, with a space between each two."""
        first = {word: index for index, word in reversed([*enumerate(encoded.word_ids)])}
        places: list[tuple[int, int]] = []
        start = 0
        for word in words:
            places.append((start, start + len(word)))
            start += len(word) + 1
        firsts = [first.get(index) for index in range(len(words))]
        return cls(" ".join(words), encoded.ids, firsts, places, bool(encoded.overflowing))

    def entities(self, labels: Sequence[Label | None]) -> list[Entity]:
        """The spans of the labelled words; those without a label are in none."""
        kinds = [OUTSIDE if it is None else it["label"] for it in labels]
        scores = [0.0 if it is None else it["score"] for it in labels]
        found: list[Entity] = []
        for kind, begin, end in spans(kinds):
            (start, _), (_, stop) = self.places[begin], self.places[end - 1]
            found.append(
                Entity(
                    entity_group=kind,
                    score=sum(scores[begin:end]) / (end - begin),
                    word=self.text[start:stop],
                    start=start,
                    end=stop,
                )
            )
        return found


def spans(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """The kind of each span, its first label's place, and the place behind its last, as conlleval counts.

    B- and S- begin a span, E- and S- end it, and a word continues the one before it where both are of one
    kind. Labels without such a beginning are kinds themselves. Words labelled O are in no span.
    """
    found: list[tuple[str, int, int]] = []
    is_open = False
    for place, label in enumerate(labels):
        mark, kind = (label[0], label[2:]) if label[:2] in ("B-", "I-", "E-", "S-") else ("I", label)
        if kind == OUTSIDE:
            is_open = False
            continue
        begin = place
        if is_open and mark not in "BS" and found[-1][0] == kind:
            begin = found.pop()[1]
        found.append((kind, begin, place + 1))
        is_open = mark not in "ES"
    return found


def without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """What is left of a place in a text when white space is taken off; (end, end) for nothing."""
    word = text[start:end]
    start = end - len(word.lstrip())
    return start, max(start, end - len(word) + len(word.rstrip()))
