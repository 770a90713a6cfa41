"""Rows of tokens to evaluate on, and supervised examples."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from gossamer.data.rows import evaluation_rows
from gossamer.data.supervised import Format, supervised_examples, write_completions
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError, GossamerError
from gossamer.tokens.tokenizer import Tokenizer

TINY = Callable[[str], Path]
TEXTS = ["def f(x):\n    return x\n", "import os\n", "print('hello, world')\n" * 5]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: TINY) -> Tokenizer:
    return Tokenizer.open(tiny_llama("llama2"))


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_evaluation_rows_cut_the_whole_text(tokenizer: Tokenizer, tiny_llama: TINY, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TEXTS * 9))
    text = "\n".join(TEXTS * 9)
    ids = AutoTokenizer.from_pretrained(tiny_llama("llama2"))(text, add_special_tokens=False).input_ids
    rows = evaluation_rows(str(tmp_path / "a.txt"), tokenizer)
    assert rows.shape == (len(ids) // 255, 256) and (rows[:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), ids[: len(ids) // 255 * 255])


def test_few_evaluation_rows_read_no_more_than_they_need(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same rows as of the whole; the line that no text could be read from is never reached."""
    rows = [{"text": TEXTS[n % len(TEXTS)]} for n in range(400)]
    whole = write_rows(tmp_path / "whole.jsonl", rows)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(whole).read_text() + "{")
    expected = evaluation_rows(whole, tokenizer, 16)
    for max_rows in (1, 3, 40):
        np.testing.assert_array_equal(
            evaluation_rows(str(broken), tokenizer, 16, max_rows=max_rows), expected[:max_rows]
        )
    with pytest.raises(GossamerError, match=r"broken\.jsonl"):
        evaluation_rows(str(broken), tokenizer, 16)
    np.testing.assert_array_equal(evaluation_rows(whole, tokenizer, 16, max_rows=10**6), expected)


def test_evaluation_needs_a_row_and_an_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match="a row to evaluate needs 255"):
        evaluation_rows(str(tmp_path / "a.txt"), tokenizer)
    with pytest.raises(ConfigError, match="has no end"):
        evaluation_rows("python:doctests", tokenizer)


def labelled(tokenizer: Tokenizer, ids: list[int], labels: list[int]) -> str:
    """The text that is learned; labels are the ids where they are not -100."""
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != -100])


def test_prompts_are_not_learned_and_answers_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"prompt": "2 + 2 = ", "completion": "4, I think"}])
    ((ids, labels),) = supervised_examples(source, "prompt-completion", tokenizer, 512)
    assert ids[0] == tokenizer.bos_id and ids[-1] in tokenizer.eos_ids
    assert labelled(tokenizer, ids, labels) == "4, I think"
    assert tokenizer.decode(ids) == "2 + 2 = 4, I think"


def test_instructions_carry_their_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "", "response": "3"},
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    (with_input, without) = supervised_examples(source, "instruct", tokenizer, 512)
    assert labelled(tokenizer, *with_input) == labelled(tokenizer, *without) == "3"
    assert "1 2" in tokenizer.decode(with_input[0]) and "Input" not in tokenizer.decode(without[0])


def test_chat_learns_every_turn_of_the_assistant(tiny_llama: TINY, tmp_path: Path) -> None:
    content = (tiny_llama("llama2") / "tokenizer.json").read_bytes()
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = Tokenizer(content, {"bos_token": "<s>", "eos_token": "</s>"}, chat_template=template)
    turns = [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "so"),
        ("assistant", "no"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    source = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    ((ids, labels),) = supervised_examples(source, "chat", tokenizer, 512)
    assert labelled(tokenizer, ids, labels) == "yes;no;"
    assert tokenizer.decode(ids) == "<system>Be brief.;<user>hi;<assistant>yes;<user>so;<assistant>no;"


def test_of_text_every_token_is_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Rows, documents of a .txt and of a folder; what is blank is no document."""
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": " "}, {"content": "three"}])
    (tmp_path / "b.txt").write_text("one two\n<|endoftext|>\nthree")
    (tmp_path / "folder").mkdir()
    for name, text in (("a.py", "one two"), ("b.txt", "three")):
        (tmp_path / "folder" / name).write_text(text)
    for source in (rows, f"{tmp_path}/b.txt", f"{tmp_path}/folder"):
        found = list(supervised_examples(source, "text", tokenizer, 512))
        assert [labelled(tokenizer, *example) for example in found] == ["one two", "three"]
        for ids, labels in found:
            assert ids[0] == tokenizer.bos_id and ids[-1] in tokenizer.eos_ids
            assert labels == [-100, *ids[1:]]
    assert len(list(supervised_examples("python:doctests:3", "text", tokenizer, 512))) == 3
    bad = write_rows(tmp_path / "c.jsonl", [{"body": "x"}, {"text": "one"}])
    with pytest.raises(ConfigError, match=r"c\.jsonl:1: expected text in the field text or content"):
        list(supervised_examples(bad, "text", tokenizer, 512))
    assert len(list(supervised_examples(bad, "text", tokenizer, 512, BadRows(1)))) == 1


def test_an_answer_that_is_cut_away_leaves_no_example(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "x" * 60, "completion": "y"},
        {"prompt": "x", "completion": "y" * 60},
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    ((ids, labels),) = supervised_examples(source, "prompt-completion", tokenizer, 10)
    assert len(ids) == len(labels) == 10 and labels[-1] != -100


def test_text_can_be_completions_of_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "".join(f"line_{number} = {number}\n" for number in range(300))
    (tmp_path / "a.txt").write_text(text)
    write_completions(tmp_path / "a.jsonl", f"{tmp_path}/a.txt", 5, seed=0)
    examples = list(supervised_examples(f"{tmp_path}/a.jsonl", "prompt-completion", tokenizer, 2048))
    assert len(examples) == 5
    for ids, labels in examples:
        piece = labelled(tokenizer, ids, labels)
        assert piece in text and 500 < len(piece) <= 600


def test_doctests_are_examples(tokenizer: Tokenizer) -> None:
    examples = list(supervised_examples("python:doctests:30", "prompt-completion", tokenizer, 512))
    assert len(examples) == 30
    for ids, labels in examples:
        answer = labelled(tokenizer, ids, labels)
        prompt = tokenizer.decode(ids).removesuffix(answer)
        assert prompt.startswith(">>> ") and answer == repr(eval(prompt[4:])) + "\n"


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        (
            "prompt-completion",
            {"prompt": "a"},
            r"a\.jsonl:2: expected text in the field completion; found fields \['prompt'\]",
        ),
        ("instruct", {"instruction": "a"}, r"a\.jsonl:2: expected text in the field output or response"),
        ("chat", {"text": "a"}, r"a\.jsonl:2: no list in field 'messages'"),
        ("chat", {"messages": [{"role": "user"}]}, r"a\.jsonl:2: expected text in the field content; found"),
        ("chat", {"messages": ["hi"]}, r"a\.jsonl:2: a message is str"),
    ],
)
def test_rows_without_their_fields_are_named(
    form: Format, row: dict[str, object], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good = {
        "prompt": "a", "completion": "b", "instruction": "a", "output": "b",
        "messages": [{"role": "user", "content": "a"}],
    }  # fmt: skip
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with_template = Tokenizer(tokenizer.bytes, {"eos_token": "</s>"}, chat_template=template)
    source = write_rows(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(ConfigError, match=message):
        list(supervised_examples(source, form, with_template, 512))


def test_what_is_cut_is_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One example is short, one loses the end of its answer, and one all of it."""
    long = "a b c d " * 8
    rows: list[dict[str, object]] = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": long}]
    source = write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": long, "completion": "b"}])
    found = list(supervised_examples(source, "prompt-completion", tokenizer, 12, bad := BadRows()))
    assert [len(ids) == 12 for ids, _ in found] == [False, True]
    assert (bad.num_shortened, bad.num_cut_off, bad.num_without_answer) == (1, 1, 0)
