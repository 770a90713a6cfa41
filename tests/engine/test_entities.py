"""Labels of words: entities are those of transformers' pipeline, of texts and of lists of words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from encoders import save_encoder
from gossamer.engine import Encoder
from gossamer.engine.entities import spans
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.tokens import encoder as tokens
from gossamer.tokens.texts import Texts

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
ROBERTA = {"max_position_embeddings": 67, "type_vocab_size": 1, "pad_token_id": 0}
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LINES = [
    "Ada Lovelace went to London by train",
    "the trains of New York are late",
    "Zoë lives in Köln and São Paulo",
    "he said so",
    "",
    "Ada " * 100,
]


def save(directory: Path, name: str, kind: str, **config: Any) -> None:
    """An encoder with labels, and a tokenizer of the kind, which splits words into pieces."""
    save_encoder(directory, name, vocab_size=600, **NAMED, **config)
    given: dict[str, Any] = {"special_tokens": MARKS, "show_progress": False}
    if kind == "pieces":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=120, **given))
    elif kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, **given)
        tokenizer.train_from_iterator(LINES, trainer)
    else:
        words = {word for line in LINES for word in line.split()}
        pieces = {f"\u2581{word[:3]}": -1.0 for word in words} | dict.fromkeys("".join(words), -5.0)
        vocabulary = [*((mark, 0.0) for mark in MARKS), *sorted(pieces.items()), ("\u2581", -5.0)]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=1))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    if kind == "bytes":
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{it}_token": f"[{it.upper()}]" for it in ("pad", "unk", "cls", "sep", "mask")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=66, **names)
    fast.save_pretrained(directory)


KINDS = {
    "BertForTokenClassification": ("pieces", {}),
    "RobertaForTokenClassification": ("bytes", ROBERTA),
    "XLMRobertaForTokenClassification": ("unigram", ROBERTA),
    "ModernBertForTokenClassification": ("bytes", {"classifier_bias": True, "norm_bias": True}),
}


def pipeline(directory: Path) -> Callable[..., Any]:
    return transformers.pipeline("token-classification", str(directory), aggregation_strategy="first")


def assert_same(found: list[Any], expected: list[Any], text: str) -> None:
    """The pipeline's offsets hold the space before a word where the tokenizer's pieces do."""
    assert [it["entity_group"] for it in found] == [it["entity_group"] for it in expected]
    for ours, theirs in zip(found, expected, strict=True):
        blank = len(text[theirs["start"] : theirs["end"]]) - len(ours["word"])
        assert (ours["start"], ours["end"]) == (theirs["start"] + blank, theirs["end"])
        assert ours["word"] == text[theirs["start"] : theirs["end"]].lstrip()
    np.testing.assert_allclose([it["score"] for it in found], [it["score"] for it in expected], atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, config = KINDS[name]
    save(tmp_path, name, kind, **config)
    encoder, theirs = Encoder(tmp_path, 1), pipeline(tmp_path)
    found = encoder.tag(LINES)
    assert sum(map(len, found)) > 10
    assert len({it["entity_group"] for entities in found for it in entities}) == 2
    assert any(" " in it["word"] for entities in found for it in entities)
    for text, entities in zip(LINES, found, strict=True):
        assert_same(entities, theirs(text) if text else [], text)
    assert [encoder.tag([text])[0] for text in LINES] == found


def test_punctuation_is_a_word_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, "BertForTokenClassification", "pieces")
    text = "Ada's train to London, (New York) is late."
    assert_same(Encoder(tmp_path, 1).tag([text])[0], pipeline(tmp_path)(text), text)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "XLMRobertaForTokenClassification"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_lists_of_words_are_labelled(name: str, tmp_path: Path) -> None:
    kind, config = KINDS[name]
    save(tmp_path, name, kind, **config)
    encoder, theirs = Encoder(tmp_path, 1), pipeline(tmp_path)
    words = LINES[0].split()
    [found] = encoder.tag([words])
    assert_same(found, theirs(words, is_split_into_words=True)[0], LINES[0])
    [labels] = encoder.label_words([words])
    assert [None if it is None else it["label"] for it in labels][:1] != [None]
    spanned = [(kind, " ".join(words[a:b])) for kind, a, b in spans([it["label"] for it in labels if it])]
    assert spanned == [(it["entity_group"], it["word"]) for it in found]


@pytest.mark.parametrize("kind", ["pieces", "bytes", "unigram"])
def test_words_are_read_as_transformers_reads_them(kind: str, tmp_path: Path) -> None:
    save(tmp_path, "BertForTokenClassification", kind)
    words = LINES[0].split()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(" " + LINES[0])  # RobertaTokenizer's add_prefix_space, without which it refuses words
    found = Texts(tokens.Encoder.open(tmp_path), 66).encode_words(words)
    assert (found.ids, found.word_ids) == (expected["input_ids"], expected.word_ids())


def test_what_is_cut_has_no_label(tmp_path: Path) -> None:
    save(tmp_path, "BertForTokenClassification", "pieces")
    encoder = Encoder(tmp_path, 1)
    [labels] = encoder.label_words([["so"] * 70])
    assert None not in labels[:64] and labels[64:] == [None] * 6
    [entities] = encoder.tag([["so"] * 70])
    assert all(it["end"] <= 64 * 3 for it in entities)
    assert encoder.label_words([[], ["he", "", "said"]])[0] == []
    assert encoder.label_words([["he", "", "said"]])[0][1] is None
    assert encoder.tag([]) == []


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_white_space_is_no_word(kind: str, tmp_path: Path) -> None:
    save(tmp_path, "XLMRobertaForTokenClassification", kind, **ROBERTA)
    found = Encoder(tmp_path, 1).tag(["  Ada   went  "])[0]
    assert "".join(it["word"].replace(" ", "") for it in found) in ("Adawent", "Ada", "went")
    assert all(it["word"] == it["word"].strip() for it in found)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("B-X I-X O", [("X", 0, 2)]),
        ("I-X I-X B-X", [("X", 0, 2), ("X", 2, 3)]),
        ("B-X I-Y I-Y", [("X", 0, 1), ("Y", 1, 3)]),
        ("B-X O I-X", [("X", 0, 1), ("X", 2, 3)]),
        ("S-X B-X E-X I-X", [("X", 0, 1), ("X", 1, 3), ("X", 3, 4)]),
        ("X X Y O Y", [("X", 0, 2), ("Y", 2, 3), ("Y", 4, 5)]),
        ("O O", []),
        ("B-a-b I-a-b", [("a-b", 0, 2)]),
    ],
)
def test_spans(labels: str, expected: list[tuple[str, int, int]]) -> None:
    assert spans(labels.split()) == expected


def test_other_models_and_other_texts_are_refused(tmp_path: Path) -> None:
    save_encoder(tmp_path / "vectors")
    with pytest.raises(UnsupportedError, match=r"makes vectors of texts.*cannot tag"):
        Encoder(tmp_path / "vectors", 1).tag(["a"])
    save_encoder(tmp_path / "tokens", "BertForTokenClassification", **NAMED)
    encoder = Encoder(tmp_path / "tokens", 1)
    for ask, given in [
        (encoder.tag, "a"),
        (encoder.tag, [3]),
        (encoder.tag, [["a", 3]]),
        (encoder.label_words, ["a b"]),
        (encoder.label_words, [[b"a"]]),
    ]:
        with pytest.raises(ConfigError, match=r"found .*expected"):
            ask(given)  # type: ignore[arg-type]
