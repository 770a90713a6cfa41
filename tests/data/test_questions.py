"""Files of questions: both forms are the same questions, and bad rows are refused by their place."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gossamer.data.questions import Question, read_questions
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError

CONTEXT = "Ada wrote it in 1843."
FIRST = Question("1", "Who?", CONTEXT, ["Ada"], [0])
SECOND = Question("2", "When?", CONTEXT, ["1843", "in 1843"], [16, 13])
NONE = Question("3", "Where?", CONTEXT, [], [])


def nested(*questions: dict[str, Any]) -> str:
    return json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": CONTEXT, "qas": questions}]}]})


def test_every_form_is_the_same(tmp_path: Path) -> None:
    listed = [
        {
            "id": it.id,
            "question": it.question,
            "answers": [
                {"text": text, "answer_start": at} for text, at in zip(it.answers, it.starts, strict=True)
            ],
        }
        for it in (FIRST, SECOND, NONE)
    ]
    (tmp_path / "squad.json").write_text(nested(*listed), encoding="utf-8")
    of_the_hub = [
        {**vars(it), "answers": {"text": it.answers, "answer_start": it.starts}}
        for it in (FIRST, SECOND, NONE)
    ]
    rows = [{**row, "context": CONTEXT} for row in listed]
    for name, content in (("hub.jsonl", of_the_hub), ("rows.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    for name in ("squad.json", "hub.jsonl", "rows.jsonl"):
        assert read_questions(tmp_path / name) == [FIRST, SECOND, NONE], name


def test_one_answer_without_lists_and_a_question_without_a_name(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": CONTEXT, "answers": {"text": "Ada", "answer_start": 0}}
    (tmp_path / "it.jsonl").write_text(json.dumps(row), encoding="utf-8")
    [found] = read_questions(tmp_path / "it.jsonl")
    assert (found.answers, found.starts, found.id) == (["Ada"], [0], f"{tmp_path}/it.jsonl:1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answers": {"text": ["Ada"], "answer_start": [1]}}, "'Ada' at character 1, where .* 'da '"),
        ({"answers": {"text": ["Ada"], "answer_start": [-21]}}, "at character -21"),
        ({"answers": {"text": ["Ada"], "answer_start": []}}, "expected text and answer_start of each"),
        ({"answers": {"text": ["Ada"], "answer_start": ["0"]}}, "expected text and answer_start of each"),
        ({"answers": ["Ada"]}, "expected text and answer_start of each"),
        ({"answers": None}, "found answers None"),
        ({"question": " "}, "in the field question"),
        ({"context": 4}, "in the field context"),
    ],
    ids=str,
)
def test_rows_that_are_none(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    good = {"question": "Who?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}
    rows = [good, {**good, **changes}]
    (tmp_path / "it.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"it.jsonl:2: .*{says}"):
        read_questions(tmp_path / "it.jsonl")
    bad = BadRows(1)
    assert len(read_questions(tmp_path / "it.jsonl", bad)) == 1 and len(bad.found) == 1


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("it.json", "{}", "not SQuAD's JSON .*'data'"),
        ("it.json", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "'qas'"),
        ("it.json", "[", "not SQuAD's JSON"),
        ("it.json", nested({"question": "Who?", "id": "7"}), "paragraph 1, question 7: found answers None"),
        ("it.txt", "", "expected a file of questions"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        read_questions(tmp_path / name)


def test_the_reader_needs_no_torch() -> None:
    program = "import sys, gossamer.data.questions; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
