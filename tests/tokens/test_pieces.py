"""Pieces that are remembered: the ids are tokenizers' own, whatever the text."""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gossamer.data.sources import documents
from gossamer.tokens import pieces
from gossamer.tokens.pieces import PieceCache
from gossamer.tokens.tokenizer import Tokenizer as OurTokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# What meets at the borders of pieces: all kinds of characters, and what combines or looks like another kind.
ASCII = [
    *"aZs'tTdLlvVeErRmM09 7..,!\"(){<>/_-~`@[]\\|^\0\7\x1c\x1f\x7f  \n\n\r\t\x0b\x0c",
    "'re",
    "'LL",
    "\n    ",
]
OTHERS = [
    *"\x85\xa0\u2003\u3000\u2028\u180e\ufeff\u200bßſK\u0301\u0308中日٣²½Ⅷǅ😀—“’…\u0e33\u1e9e",
    " é",
    "<s>",
]


def splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    each = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*each, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt2": BYTES,
    "gpt2 spelled out": splits(GPT2),
    "smollm2": splits(r"\p{N}", GPT2),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "llama3": splits(LLAMA3),
    "qwen2": splits(LLAMA3.replace("{1,3}", "")),
}


def trained(splitter: pre_tokenizers.PreTokenizer, *, composed: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def cache(tokenizer: Tokenizer) -> PieceCache | None:
    return PieceCache.of(tokenizer, json.loads(tokenizer.to_str()))


def assert_same(tokenizer: Tokenizer, texts: list[str]) -> None:
    found = cache(tokenizer)
    assert found is not None
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for _ in range(2):  # of new pieces, and of known ones
        for text, ours, theirs in zip(texts, found.encode_batch(texts), expected, strict=True):
            assert ours.tolist() == theirs.ids, repr(text)


@pytest.mark.parametrize("name", KNOWN)
def test_texts_made_of_what_meets_at_borders(name: str) -> None:
    chance, tokenizer = random.Random(0), trained(KNOWN[name], composed=name == "qwen2")
    alphabets = [ASCII, [*ASCII, *OTHERS], [*ASCII, *ASCII, *OTHERS]]
    assert_same(
        tokenizer,
        ["".join(chance.choices(chance.choice(alphabets), k=chance.randint(0, 30))) for _ in range(6000)],
    )


@pytest.mark.parametrize("name", KNOWN)
def test_real_texts(name: str, request: pytest.FixtureRequest) -> None:
    texts = [*islice(documents("python:stdlib"), 40), Path(__file__).read_text(encoding="utf-8")]
    assert_same(trained(KNOWN[name]), texts)
    shared: Path = request.getfixturevalue("shared_data")
    assert_same(trained(KNOWN[name]), [next(documents(str(shared / "text" / "wikipedia.txt")))[:400_000]])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full cache begins anew: the ids stay right, and it holds no more than its limit and a batch."""
    monkeypatch.setattr(pieces, "MAX_CHARACTERS", 40)
    tokenizer = trained(BYTES)
    found = cache(tokenizer)
    assert found is not None
    for number in range(50):
        text = f"word{number} other{number} the the"
        assert found.encode_batch([text])[0].tolist() == tokenizer.encode(text).ids
        assert sum(map(len, found._ids)) <= 40 + len(text)


def with_lower(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def with_prefix(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_stripping(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def with_another_split(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = splits(r"\p{L}+ \p{L}+")


@pytest.mark.parametrize("change", [with_lower, with_prefix, with_stripping, with_another_split])
def test_what_could_differ_is_left_to_tokenizers(change: Callable[[Tokenizer], None]) -> None:
    tokenizer = trained(BYTES)
    change(tokenizer)
    assert cache(tokenizer) is None
    ours = OurTokenizer(tokenizer.to_str().encode())
    texts = ["A b  <mask> c", "one two three", ""]
    expected = [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == expected
