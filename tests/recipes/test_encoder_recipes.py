"""The programs for encoders, from a dense model to the table, on a tiny BERT."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from encoders import save_encoder

LINES = [
    "Ada met Bob in Rome .",
    "the train to Oslo is late",
    "Eve sold her house",
    "it rains on Tuesdays",
    "Max reads books by Woolf",
    "nobody was there at noon",
]
RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--num-tokens", "2000", "--pretrain-batch-tokens", "128", "--max-length", "32", "--epochs", "2"]
SMALL += ["--num-calibration-samples", "8"]


def program(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def files(folder: Path, rows: list[dict[str, Any]]) -> str:
    made = []
    for part, some in (("train", rows[: len(rows) // 2]), ("test", rows[len(rows) // 2 :])):
        made.append(folder / f"{part}.jsonl")
        made[-1].write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return ",".join(map(str, made))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    save_encoder(tmp_path / "dense", "BertForMaskedLM")
    (tmp_path / "text.txt").write_text("\n".join(LINES * 20), encoding="utf-8")
    return [str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "--dataset", str(tmp_path / "text.txt")]


def test_a_sparse_general_model_goes_on_to_a_field_and_is_tuned_from_both(
    given: list[str], tmp_path: Path
) -> None:
    words = [line.split() for line in LINES * 4]
    rows = [{"tokens": it, "labels": ["B-X" if word[0].isupper() else "O" for word in it]} for it in words]
    field = ["--field-dataset", str(tmp_path / "text.txt"), "--examples", f"ner={files(tmp_path, rows)}"]
    asked = [*given, *field, *SMALL, "--sparsity", "0.6", "--seeds", "0"]
    lines = program("sparse_bert", *asked).splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| ner")]
    assert [line[1:2] + line[4:] for line in table] == [
        ["dense", "1 |"],
        ["60% zeros, INT8, general", "1 |"],
        ["60% zeros, INT8, field", "1 |"],
    ]
    sparse = []
    for name in ("general", "field", "ner/field-0/finetuned"):
        weights = load_file(tmp_path / "out" / name / "model.safetensors")
        queries = [weights[it] != 0 for it in sorted(weights) if it.endswith("query.weight")]
        sparse.append(queries)
    assert sparse[0] and all(0.35 < mask.float().mean() < 0.45 for mask in sparse[0])
    for later in sparse[1:]:
        assert all((ours <= first).all() for ours, first in zip(later, sparse[0], strict=True))
    again = program("sparse_bert", *asked).splitlines()
    assert {line.split()[0] for line in again if " out/" in line or str(tmp_path / "out") in line} == {
        "stood"
    }
    assert [line for line in again if line.startswith("| ner")] == [
        line for line in lines if line.startswith("| ner")
    ]


def test_answers_are_transferred_too(given: list[str], tmp_path: Path) -> None:
    """Of SQuAD's rows as the hub has them, of which some have no answer."""
    question = {"question": "Who met Bob ?", "context": LINES[0]}
    answers = ({"text": ["Ada"], "answer_start": [0]}, {"text": [], "answer_start": []})
    made = files(tmp_path, [question | {"answers": it} for it in answers * 4])
    small = [*SMALL[:6], "--epochs", "1", *SMALL[-2:], "--lr-cycles", "1"]
    table = program("oberta", *given, "--examples", f"squad_v2={made}", *small).splitlines()
    found = [line.split(" | ")[1] for line in table if line.startswith("| squad_v2")]
    assert found == ["dense", "90% zeros, INT8, embeddings frozen"]


def test_the_plan_says_what_the_seven_tasks_take(given: list[str], tmp_path: Path) -> None:
    rows = [{"sentence": line, "label": index % 2} for index, line in enumerate(LINES)]
    made = files(tmp_path, rows)
    plan = program("oberta", *given, "--examples", f"sst2={made}", "--also-free", "--dry-run")
    assert not (tmp_path / "out").exists()
    assert "--prune-schedule cubic:0.7-0.9:0-0.9167:" in plan and "--lr-cycles 12" in plan
    assert plan.count("gossamer finetune") == 3 and plan.count("--freeze embeddings") == 2
    assert "10,000,000,000 tokens" in plan and "all training that is timed here" in plan
    wrong = subprocess.run(
        [sys.executable, RECIPES / "oberta.py", *given, "--examples", "cola=a,b", "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2 and "one of squad" in wrong.stderr
