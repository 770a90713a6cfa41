"""What `finetune` and `evaluate` refuse of labelled examples, and of a head that does not suit them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_input.cases import FINETUNE, Case, Tiny, by_name, check_refused
from encoders import save_encoder


def encoder(name: str, rows: str, **config: object) -> Callable[[Path], object]:
    """An encoder of this class in the model's place, and other rows; those of columns are beside them."""

    def put(model: Path) -> None:
        shutil.rmtree(model)
        save_encoder(model, name, **config)
        for file in ("rows.jsonl", "rows.tsv"):
            (model.parent / file).write_text(rows, encoding="utf-8")

    return put


NER = [*FINETUNE[:5], "{model}/../rows.tsv", "--distill", "none", "--format", "tokens"]
CLASSES = [*FINETUNE, "--distill", "none", "--format", "classification"]
SEQUENCE = "BertForSequenceClassification"
TABLE: list[Case] = [
    (
        "labels that the head does not have",
        "llama2",
        encoder(SEQUENCE, '{"text": "a", "label": "LABEL_0"}\n{"text": "b", "label": "high"}\n'),
        CLASSES,
        ["rows.jsonl:2", "'high'", "LABEL_0, LABEL_1", "--new-head"],
    ),
    (
        "labels by number that the head does not have",
        "llama2",
        encoder(SEQUENCE, '{"text": "a", "label": 2}\n'),
        CLASSES,
        ["rows.jsonl:1", "from 0 to 1"],
    ),
    (
        "labels that the head does not have, measured",
        "llama2",
        encoder(SEQUENCE, '{"text": "a", "label": 2}\n'),
        ["evaluate", "{model}", "--kind", "classification", "--dataset", "{rows}"],
        ["rows.jsonl:1", "from 0 to 1"],
    ),
    (
        "one class for a new head",
        "llama2",
        encoder("BertModel", '{"text": "a", "label": "same"}\n' * 3),
        CLASSES,
        ["'same'", "two classes or more"],
    ),
    (
        "a sentence of words whose columns differ",
        "llama2",
        encoder("BertModel", "a\tO\nb\tO\n\nc\tO\nd\tX\tO\n"),
        NER,
        ["rows.tsv:5", "found 3 columns", "expected 2"],
    ),
    (
        "a decoder for classes",
        "llama2",
        lambda model: None,
        CLASSES,
        ["is learned by encoders", "a llama for generation", "--format prompt-completion"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
