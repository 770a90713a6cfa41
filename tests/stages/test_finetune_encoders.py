"""`finetune` of encoders with heads over texts and tokens: against transformers, and zeros kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.supervised import supervised_examples
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.report import Event
from gossamer.stages.finetune import Finetune, finetune
from gossamer.tokens.texts import Texts
from gossamer.tokens.tokenizer import Tokenizer

FAMILIES = ("Bert", "Roberta", "ModernBert")  # the last one's head for texts reads their means
KINDS = {"classification": "ForSequenceClassification", "tokens": "ForTokenClassification"}
CASES = [(kind, f"{family}{ending}") for kind, ending in KINDS.items() for family in FAMILIES]
CLASSES = {0: "low", 1: "middle", 2: "high"}


def examples(kind: str, count: int) -> list[dict[str, Any]]:
    """Texts, some with a second one, whose first word says their class, and words that say their own."""
    generator, found = np.random.default_rng(0), []
    for number in range(count):
        words = generator.choice([*"abcdefghi"], generator.integers(1, 12)).tolist()
        numbers = [(ord(word) - ord("a")) // 3 for word in words]
        if kind == "tokens":
            found.append({"tokens": words, "labels": [CLASSES[n] if n else 0 for n in numbers]})
            continue
        found.append({"text": " ".join(words), "label": CLASSES[numbers[0]] if number % 2 else numbers[0]})
        if number % 3 == 0:
            found[-1]["text2"] = " ".join(reversed(words))
    return found


def prepared(folder: Path, kind: str, name: str, count: int) -> Finetune:
    for index, directory in enumerate(("model", "dense")):
        save_encoder(folder / directory, name, seed=index, id2label=CLASSES, num_labels=3)
    rows = "".join(json.dumps(row) + "\n" for row in examples(kind, count))
    (folder / "rows.jsonl").write_text(rows)
    return Finetune(
        str(folder / "model"),
        str(folder / "out"),
        dataset=(str(folder / "rows.jsonl"),),
        format=kind,  # pyright: ignore[reportArgumentType]
        distill="none",
        num_train_epochs=1,
        batch_tokens=10**4,
        learning_rate=1e-3,
        precision="f32",
        report_to="none",
    )


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_loss_is_transformers_own(tmp_path: Path, kind: str, name: str) -> None:
    """Cross-entropy of each example alone, and KL to a teacher's logits at a temperature."""
    job = prepared(tmp_path, kind, name, 30)
    kinds: Any = __import__("transformers")
    ours, theirs = (getattr(kinds, name).from_pretrained(tmp_path / it).eval() for it in ("model", "dense"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    summed, divergence, count, t = 0.0, 0.0, 0, 5.5
    for row in examples(kind, 30):
        if kind == "tokens":
            given = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            numbers = [[*CLASSES.values()].index(it) if isinstance(it, str) else it for it in row["labels"]]
            labels = torch.tensor([[-100 if at is None else numbers[at] for at in given.word_ids()]])
        else:
            given = tokenizer(row["text"], row.get("text2"), return_tensors="pt", return_token_type_ids=True)
            label = row["label"]
            labels = torch.tensor([[*CLASSES.values()].index(label) if isinstance(label, str) else label])
        with torch.no_grad():
            student, teacher = (model(**given, labels=labels) for model in (ours, theirs))
        kept = int((labels != -100).sum())
        summed, count = summed + float(student.loss) * kept, count + kept
        places = (labels != -100)[..., None].expand_as(student.logits) if kind == "tokens" else slice(None)
        q, p = ((it.logits[places].view(-1, 3) / t).log_softmax(-1) for it in (student, teacher))
        divergence += float(t**2 * kl_div(q, p, reduction="sum", log_target=True))
    assert finetune(job).losses == (pytest.approx(summed / count, rel=1e-4),)
    hard = {"teacher": str(tmp_path / "dense"), "distill": "kl", "distill_temperature": t}
    taught = finetune(replace(job, overwrite=True, cross_entropy_weight=0.0, **hard))
    assert taught.losses == (pytest.approx(divergence / count, rel=1e-3),)
    assert taught.cross_entropy_first == pytest.approx(summed / count, rel=1e-4)


class Stop(Exception):
    """Ends a run from outside, as if the machine had failed."""


def stop_at_7(event: Event) -> None:
    if event.done == 7 and event.message == "training":
        raise Stop


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_learns_keeps_zeros_and_resumes_to_the_same_bits(tmp_path: Path, kind: str, name: str) -> None:
    job = replace(prepared(tmp_path, kind, name, 200), batch_tokens=256, num_train_epochs=4)
    job = replace(job, prune_schedule="cubic:0.5:0-0.3:2", learning_rate=1e-2)
    whole = finetune(job)
    assert whole.loss_last < 0.8 * whole.loss_first
    assert whole.sparsity == pytest.approx(0.5, abs=0.01)
    stopped = replace(job, output_dir=str(tmp_path / "resumed"), save_steps=2)
    with pytest.raises(Stop):
        finetune(stopped, stop_at_7)
    assert finetune(replace(stopped, resume=True)).losses == whole.losses
    files = [tmp_path / it / "model.safetensors" for it in ("out", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    frozen = replace(job, model=str(tmp_path / "out"), output_dir=str(tmp_path / "next"))
    finetune(replace(frozen, prune_schedule=None, freeze="embeddings"))
    parent, child = (Checkpoint.open(tmp_path / it) for it in ("out", "next"))
    for linear in parent.linears:
        assert np.array_equal(parent.zeros(f"{linear}.weight"), child.zeros(f"{linear}.weight"))
    before, after = load_file(files[0]), load_file(tmp_path / "next" / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before if ".embeddings." in key)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a", "label": "none"}, "label 'none'; expected one of low, middle, high"),
        ({"text": "a", "label": 3}, "label 3; .* from 0 to 2"),
        ({"text": "a"}, "label None"),
        ({"label": 1}, "expected text in the field text"),
        ({"text": "a", "text2": 4, "label": 1}, "expected text in the field text2"),
    ],
    ids=str,
)
def test_rows_that_are_none(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    job = prepared(tmp_path, "classification", "BertForSequenceClassification", 4)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=says):
        finetune(job)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": "a b", "labels": [0, 1]}, "expected a list of words"),
        ({"tokens": ["a", "b"], "labels": [0]}, "expected one for each of 2 tokens"),
        ({"tokens": ["a"], "labels": [True]}, "label True"),
    ],
    ids=str,
)
def test_rows_of_tokens_that_are_none(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    job = prepared(tmp_path, "tokens", "BertForTokenClassification", 4)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=says):
        finetune(job)


def test_long_texts_are_cut_the_longer_one_first(tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    tokenizer = Tokenizer.open(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    for first, second in (("a b", "c d e f g h"), ("a b c d e f g", "h i"), ("a b c d e f", "g h i j k l")):
        for length in (6, 7, 8, 20):
            found = Texts(tokenizer, length).encode([(first, second)])[0].ids
            assert found == theirs(first, second, truncation=True, max_length=length).input_ids
        wanted = theirs(first, truncation=True, max_length=5).input_ids
        assert Texts(tokenizer, 5).encode([first])[0].ids == wanted
        words = Texts(tokenizer, 5).encode_words(first.split())
        assert (words.ids, words.word_ids[:2]) == (wanted, [None, 0])


@pytest.mark.parametrize(
    ("format", "long"),
    [
        ("classification", {"text": "a " * 9, "label": 0}),
        ("tokens", {"tokens": ["a"] * 9, "labels": [0] * 9}),
        ("sts", {"sentence1": "a " * 9, "sentence2": "b " * 9, "score": 1}),
    ],
)
def test_rows_that_are_cut_are_counted(tmp_path: Path, format: Any, long: dict[str, Any]) -> None:
    save_encoder(tmp_path / "model")
    short = {name: value[:1] if isinstance(value, str | list) else value for name, value in long.items()}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (short, long, short, long)))
    given = (str(file), format, Tokenizer.open(tmp_path / "model"), 6, bad := BadRows())
    assert len([*supervised_examples(*given, classes=["A", "B"])]) == 4
    assert bad.num_shortened == 2


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"format": "prompt-completion"},
            ConfigError,
            "by decoders; .* a bert for sequence: expected --format classification or tokens",
        ),
        ({"new_head": True, "format": "chat"}, ConfigError, "expected one of classification, tokens"),
        ({"lora": 4}, UnsupportedError, "--lora 4 is for decoders"),
    ],
    ids=str,
)
def test_what_does_not_suit(tmp_path: Path, changes: Any, error: type[Exception], says: str) -> None:
    job = prepared(tmp_path, "classification", "BertForSequenceClassification", 4)
    with pytest.raises(error, match=says):
        finetune(replace(job, **changes))
