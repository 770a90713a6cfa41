"""Figures in the cache: read while nothing that decides them has changed. And what `--output` writes."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file, save_file

from gossamer.errors import ConfigError
from gossamer.evaluation.file_tasks import Shots, file_task
from gossamer.evaluation.harness import content_of, load_tasks
from gossamer.evaluation.kept import KeptFigures
from gossamer.job.report import Event
from gossamer.stages.evaluate import Evaluate, evaluate

TinyLlama = Callable[[str], Path]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def job(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """A harness's task, our own examples, and a model that may be changed; the cache is empty."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(tiny_llama("llama2"), tmp_path / "model")
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05\xff\xfe\x80")  # no text, as SentencePiece's
    rows = [{"context": word, "continuation": "x", "prompt": word, "answer": "y"} for word in "abcd"]
    file = write(tmp_path / "cloze.jsonl", rows)
    return Evaluate(str(model), dataset=file, kind="cloze", tasks=(file,), backend="engine")


def figures(result: Any) -> dict[str, Any]:
    """All that must be the same, wherever it comes from."""
    return {
        name: value for name, value in vars(result).items() if name not in ("seconds", "from_cache", "cache")
    }


def test_what_was_measured_is_read_again(job: Evaluate) -> None:
    first = evaluate(job)
    assert first.from_cache == () and first.closing == ()
    again = evaluate(job)
    names = (f"{job.model}: {job.dataset}", f"{job.model}: cloze.jsonl")
    assert again.from_cache == names and figures(again) == figures(first)
    assert "--no-cache measures anew" in again.closing[0] and "cloze.jsonl" in again.closing[0]
    assert evaluate(replace(job, no_cache=True)).from_cache == ()
    baseline = evaluate(replace(job, baseline=job.model))
    assert len(baseline.from_cache) == 4 and baseline.baseline == first.accuracy


def test_a_text_is_kept_by_its_content(job: Evaluate, text_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    job = replace(job, dataset=str(text), kind=None, tasks=(), limit=3)
    first = evaluate(job)
    assert evaluate(job).from_cache == (f"{job.model}: perplexity",)
    assert evaluate(job).perplexity == first.perplexity
    assert evaluate(replace(job, row_length=99)).from_cache == ()
    text.write_text(text_file.read_text()[100:])
    changed = evaluate(job)
    assert changed.from_cache == () and changed.perplexity != first.perplexity


@pytest.mark.parametrize(
    "change",
    [
        *("weights", "template", "tokenizer", "file", "limit", "backend", "chat", "cache type", "shots"),
        *("engine's instructions", "torch's instructions"),
    ],
)
def test_what_has_changed_is_measured_anew(
    change: str, job: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(job, tasks=(), backend="torch" if change.startswith("torch") else "engine")
    evaluate(job)
    assert evaluate(job).from_cache
    model, file = Path(job.model), Path(job.dataset)
    if change == "weights":
        tensors = load_file(model / "model.safetensors")
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[name] = tensors[name] * 1.5
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    elif change == "template":
        (model / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    elif change == "tokenizer":
        (model / "tokenizer.model").write_bytes(b"\xfe\xff")
    elif change == "engine's instructions":
        monkeypatch.setattr("gossamer._native.isa", lambda: "another")
    elif change == "torch's instructions":
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    elif change == "file":
        file.write_text(file.read_text().replace("x", "y"))
    else:
        changes: dict[str, dict[str, Any]] = {
            "limit": {"limit": 2},
            "backend": {"backend": "torch"},
            "chat": {"apply_chat_template": True},
            "cache type": {"kv_cache_dtype": "i8"},
            "shots": {"num_fewshot": 1, "fewshot_dataset": job.dataset},
        }
        if change == "chat":
            (model / "chat_template.jinja").write_text("{{ messages[0].content }}!")
            evaluate(job)
        job = replace(job, **changes[change])
    assert evaluate(job).from_cache == ()
    assert evaluate(job).from_cache


@pytest.mark.parametrize("damage", ["cut off", "another figure", "nothing"])
def test_a_damaged_file_is_told_of_and_made_anew(damage: str, job: Evaluate) -> None:
    job = replace(job, tasks=())
    first = evaluate(job)
    [file] = KeptFigures(lambda event: None).folder.glob("*.json")
    text = file.read_text()
    file.write_text(
        {
            "cut off": text[: len(text) // 2],
            "another figure": text.replace('"num_examples": 4', '"num_examples": 5'),
            "nothing": "",
        }[damage]
    )
    assert file.read_text() != text
    events: list[Event] = []
    again = evaluate(job, events.append)
    [note] = [event.message for event in events if event.lasting]
    assert str(file) in note and "is damaged" in note and "measured anew" in note
    assert again.from_cache == () and figures(again) == figures(first)
    assert evaluate(job).from_cache == (f"{job.model}: cloze.jsonl",)


def test_figures_that_cannot_be_kept_are_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file" / "cache"))
    events: list[Event] = []
    kept = KeptFigures(events.append)
    assert kept.of({"model": "a"}, "a: piqa", lambda: {"accuracy": 0.5}) == {"accuracy": 0.5}
    [event] = events
    assert event.lasting and "the figures of a: piqa are not kept" in event.message


def test_examples_that_are_shown_decide(tmp_path: Path) -> None:
    asked = write(tmp_path / "test.jsonl", [{"prompt": "a", "answer": "b"}])

    def content(shown: str, num_fewshot: int | None) -> str:
        shots = write(tmp_path / "train.jsonl", [{"prompt": shown, "answer": "c"}])
        settings = file_task(Path(asked), "exact-match", tmp_path / "tasks", shots=Shots(1, Path(shots)))
        return content_of(
            load_tasks([settings])[0].load([str(settings.file)])["tasks"]["test.jsonl"], num_fewshot
        )

    assert content("x", None) != content("y", None)
    assert content("x", 1) == content("x", None)
    assert content("x", 0) == content("y", 0)


def test_another_program_measures_anew(job: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(job)
    monkeypatch.setattr("gossamer.evaluation.kept.program", lambda: {"gossamer": "another"})
    assert evaluate(job).from_cache == ()


def test_all_figures_are_written_with_a_table_and_a_picture(
    job: Evaluate, text_file: Path, tmp_path: Path
) -> None:
    rows = [{"query": f"q{n}", "choices": ["a", "bc"], "gold": n % 2} for n in range(6)]
    file = write(tmp_path / "choices.jsonl", rows)
    output = tmp_path / "results" / "scores.json"
    job = replace(job, dataset=file, kind="multiple-choice", tasks=(), baseline=job.model, output=str(output))
    result = evaluate(job)
    written = json.loads(output.read_text())
    assert written["options"]["kind"] == "multiple-choice" and written["model_hash"] == result.model_hash
    assert written["metrics"]["choices.jsonl"] == result.metrics["choices.jsonl"]
    assert written["standard_errors"]["choices.jsonl"] == result.standard_errors["choices.jsonl"]
    assert written["recovery"] == {"choices.jsonl": 1.0} and written["recovery_errors"] == {
        "choices.jsonl": 0.0
    }
    assert written["baseline"] == result.accuracy
    table = output.with_suffix(".md").read_text()
    accuracy, error = result.accuracy["choices.jsonl"], result.standard_errors["choices.jsonl"]["acc_norm"]
    assert f"| choices.jsonl | {accuracy:.1%} +- {error:.1%} (acc_norm) | 6 | 100.0% +- 0.0% |" in table
    assert "![scores](scores.png)" in table
    picture = imread(output.with_suffix(".png"))
    assert picture.shape[0] > 100 and picture.min() < picture.max()
    with pytest.raises(ConfigError, match=r"scores\.json exists; .*--overwrite"):
        evaluate(job)
    text = replace(job, dataset=str(text_file), kind=None, limit=2, overwrite=True)
    assert evaluate(text).perplexity == json.loads(output.read_text())["perplexity"]
    with pytest.raises(ConfigError, match=r"--output is scores\.md; expected FILE\.json"):
        evaluate(replace(job, output="scores.md"))


def test_what_is_no_finite_number_has_no_bar_and_the_figures_are_written_last(
    job: Evaluate, tmp_path: Path
) -> None:
    output = tmp_path / "scores.json"
    result = replace(evaluate(job), perplexity=math.inf, num_tokens=9, baseline={"perplexity": math.nan})
    output.with_suffix(".png").mkdir()
    with pytest.raises(OSError, match=r"scores\.png"):
        result.write(output, job)
    assert not output.exists()
    output.with_suffix(".png").rmdir()
    result.write(output, job)
    assert json.loads(output.read_text())["perplexity"] == math.inf
    assert "| perplexity | inf |" in output.with_suffix(".md").read_text()
    assert imread(output.with_suffix(".png")).shape[0] > 100
