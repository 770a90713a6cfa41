"""What `finetune` and `pretrain` refuse: options that mean nothing, and rows that hold nothing to learn."""

import json
from pathlib import Path

import pytest

from bad_input.cases import FINETUNE, Case, Tiny, by_name, check_refused, make_sparse, nothing


def bad_row(model: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    (model.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def long_prompt(model: Path) -> None:
    (model.parent / "rows.jsonl").write_text(json.dumps({"prompt": "a b " * 600, "completion": "c"}) + "\n")


def unanswered(model: Path) -> None:
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    rows = {"messages": [{"role": "user", "content": "a"}]}
    (model.parent / "rows.jsonl").write_text(json.dumps(rows) + "\n")


TABLE: list[Case] = [
    (
        "row without its fields",
        "llama2",
        bad_row,
        [*FINETUNE, "--distill", "none"],
        ["rows.jsonl:2", "completion"],
    ),
    (
        "unknown reporter",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--report-to", "paper"],
        ["--report-to paper", "tensorboard", "wandb"],
    ),
    (
        "reporter without its package",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--report-to", "wandb"],
        ["--report-to wandb", "--report-to none"],
    ),
    (
        "nothing to resume",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--resume"],
        ["--resume", "out.partial", "leave --resume out"],
    ),
    (
        "sparse kernel for a dense model",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--kernel", "sparse"],
        ["--kernel sparse", "found no zeros", "gossamer prune", "--kernel dense"],
    ),
    (
        "fsdp with one process",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--parallel", "fsdp"],
        ["--parallel fsdp", "one process", "torchrun"],
    ),
    (
        "a schedule that is none",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "0.0-0.7"],
        ["--prune-schedule is 0.0-0.7", "expected cubic:[START-]END"],
    ),
    (
        "a schedule that falls",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "cubic:0.7-0.5"],
        ["from 0.7 to 0.5", "what is zero stays zero"],
    ),
    (
        "a schedule that would raise weights from zero",
        "llama2",
        make_sparse,
        ["pretrain", "{model}", "-o", "{out}", "--dataset", "{text}", "--prune-schedule", "cubic:0.2-0.7"],
        ["begins at 0.2", "would raise weights from zero", "0.5000 sparse", "leave START out"],
    ),
    (
        "a schedule for the sparse kernel",
        "llama2",
        make_sparse,
        [*FINETUNE, "--distill", "none", "--prune-schedule", "cubic:0.7", "--kernel", "sparse"],
        ["--kernel sparse", "--prune-schedule cubic:0.7", "leave --kernel out"],
    ),
    (
        "a rank of none",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "0"],
        ["--lora 0", "a rank of at least 1"],
    ),
    (
        "a rank that is a whole matrix's",
        "llama3",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "24"],
        ["--lora 24", "k_proj is 24 x 48", "a rank below 24"],
    ),
    (
        "adapters for the sparse kernel",
        "llama2",
        make_sparse,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--kernel", "sparse"],
        ["--lora 4", "--kernel sparse", "leave --kernel out"],
    ),
    (
        "adapters of sharded weights",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--parallel", "fsdp"],
        ["--lora 4", "--parallel fsdp", "--parallel ddp"],
    ),
    (
        "adapters of weights that are pruned meanwhile",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--lora", "4", "--prune-schedule", "cubic:0.5"],
        ["--lora 4", "--prune-schedule cubic:0.5", "one after the other"],
    ),
    (
        "weight decay that grows",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--weight-decay", "-1"],
        ["--weight-decay -1", "from 0 on"],
    ),
    (
        "weight decay that is no number",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--weight-decay", "nan"],
        ["--weight-decay nan", "from 0 on"],
    ),
    (
        "gradients of less than no norm",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--max-grad-norm", "-1"],
        ["--max-grad-norm -1", "from 0 on"],
    ),
    (
        "a seed that nothing takes",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--seed", "-1"],
        ["--seed is -1", "from 0 to 4294967295"],
    ),
    (
        "no rows",
        "llama2",
        lambda m: (m.parent / "rows.jsonl").write_text(""),
        [*FINETUNE, "--distill", "none"],
        ["rows.jsonl: found no example to learn from", "it has no rows"],
    ),
    (
        "prompts longer than a row",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--max-length", "3"],
        ["left out 8 rows whose prompt alone takes 3 tokens (--max-length) or more"],
    ),
    (
        "prompts longer than the context",
        "llama2",
        long_prompt,
        [*FINETUNE, "--distill", "none", "--max-length", "4096"],
        ["left out 1 rows whose prompt alone takes 512 tokens (the context of the model) or more"],
    ),
    (
        "a chat in which nobody answers",
        "llama2",
        unanswered,
        [*FINETUNE, "--distill", "none", "--format", "chat"],
        ["left out 1 rows without an answer", "role assistant"],
    ),
    (
        "a chat without a template",
        "llama2",
        nothing,
        [*FINETUNE, "--distill", "none", "--format", "chat"],
        ["--format chat", "no chat template", "chat_template.jinja"],
    ),
    (
        "no doctests",
        "llama2",
        nothing,
        ["finetune", "{model}", "-o", "{out}", "--dataset", "python:doctests:0", "--distill", "none"],
        ["python:doctests:0", "at least 1"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
