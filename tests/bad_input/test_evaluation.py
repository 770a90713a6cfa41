"""What `evaluate` refuses: options that mean nothing, and rows without what their kind needs."""

from pathlib import Path

import pytest

from bad_input.cases import Case, Tiny, by_name, check_refused, nothing

TABLE: list[Case] = [
    (
        "fewer than no rows to leave out",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze", "--skip-bad-rows", "-1"],
        ["--skip-bad-rows -1", "a number of rows"],
    ),
    (
        "examples that are not there",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{goss}", "--kind", "cloze"],
        ["model.goss, for --kind cloze: no such file", ".jsonl, .jsonl.zst or .parquet"],
    ),
    (
        "a field that holds nothing",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"prompt": null, "continuation": "a"}\n'),
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze"],
        ["rows.jsonl:1: expected text in the field context or prompt; found null in 'prompt'"],
    ),
    (
        "an answer without a number",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n'),
        ["evaluate", "{model}", "--dataset", "{rows}", "--kind", "gsm8k"],
        ["rows.jsonl:1", "expected an answer that is a number", "'#### b'"],
    ),
    (
        "more examples to show than there are",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text('{"prompt": "a", "continuation": "b"}\n' * 2),
        [
            *("evaluate", "{model}", "--dataset", "{rows}", "--kind", "cloze"),
            *("--num-fewshot", "1", "--fewshot-dataset", "{rows}"),
        ],
        ["--num-fewshot is 1", "expected at most 0", "rows.jsonl"],
    ),
    (
        "a chat evaluation without a template",
        "llama2",
        nothing,
        [
            *("evaluate", "{model}", "--dataset", "{rows}", "--kind", "chat", "--baseline", "{model}"),
            *("--judge", "http://127.0.0.1:9/v1", "--judge-model", "j", "-o", "{report}"),
        ],
        ["model: this model has no chat template", "chat_template.jinja"],
    ),
    (
        "a task to keep of what the harness does not run",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{text}", "--write-tasks", "{report}"],
        ["--write-tasks keeps the task of --dataset FILE --kind KIND"],
    ),
    (
        "the harness's own task that runs code",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--tasks", "mbpp", "--allow-code-execution"],
        ["task mbpp ", "unconfined", "--kind code --allow-code-execution", "entry_point", "test_list"],
    ),
    (
        "the engine's options without the engine",
        "llama2",
        nothing,
        ["evaluate", "{model}", "--dataset", "{text}", "--kv-cache-dtype", "f32"],
        ["--kv-cache-dtype", "--backend engine"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
