"""What sparse pretraining and a teacher add: `python recipes/recover_stories.py MODEL TEXT HELD_OUT -o DIR`.

For a small Llama and the kind of text that it was trained on: TEXT has a document a line ({"text": ...}),
HELD_OUT is text of the same kind. As in the paper (arXiv 2405.03594, section 4), a task's examples are few:
the last `--num-examples` documents are put aside for it, the beginning of each is a prompt and the rest its
answer. The model is pruned to 70% once; then, for each seed, it is

    fine-tuned alone        on the examples, for as many tokens as all of "pretrained, fine-tuned"
    pretrained, fine-tuned  on the other documents, then on the examples twice
    without a teacher       the same by cross-entropy alone
    dense, fine-tuned       the dense model on the examples twice: the control, and the teacher of them all

Prints perplexity of the held-out text, a line a model, and means over the seeds with their spread (standard
deviation). What a seed has done already is not done again.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from gossamer.allocator import keep_freed_memory
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.finetune import Finetune, finetune
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.stages.prune import Prune, prune
from gossamer.tokens.tokenizer import Tokenizer

SPARSITY, ROW_LENGTH, BATCH_TOKENS = 0.7, 256, 4096
RATE = 2e-3  # of pretraining; so high a rate makes fine-tuning learn its few examples by heart
PROMPT_WORDS = 12
PASSES = 2  # over the examples, after pretraining

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description="What sparse pretraining and a teacher add.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help=".jsonl, a document a line")
    parser.add_argument("held_out", type=Path)
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-tokens", type=int, default=400_000, help="of sparse pretraining")
    parser.add_argument("--num-examples", type=int, default=300)
    options = parser.parse_args()
    keep_freed_memory()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = options.output_dir / "results.jsonl"
    text, examples = split(options)
    report(results, "dense", -1, options.model, options.held_out)
    one_shot = options.output_dir / "one-shot"
    if not one_shot.exists():
        how = {"num_calibration_samples": 256, "max_seq_length": ROW_LENGTH, "sparsity": SPARSITY}
        prune(Prune(str(options.model), str(one_shot), dataset=(str(text),), **how))
    report(results, "70%, one shot", -1, one_shot, options.held_out)
    for seed in options.seeds:
        for name, model in train(options, one_shot, text, examples, seed):
            report(results, name, seed, model, options.held_out)
    summarize(read(results))


def split(options: argparse.Namespace) -> tuple[Path, Path]:
    """The documents to pretrain on, and the examples of the task, as files of the output directory."""
    text, examples = options.output_dir / "text.jsonl", options.output_dir / "examples.jsonl"
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    text.write_text("".join(lines[: -options.num_examples]), encoding="utf-8")
    with examples.open("w", encoding="utf-8") as file:
        for line in lines[-options.num_examples :]:
            words = json.loads(line)["text"].split(" ")
            prompt, rest = " ".join(words[:PROMPT_WORDS]), " ".join(["", *words[PROMPT_WORDS:]])
            file.write(json.dumps({"prompt": prompt, "completion": rest}) + "\n")
    return text, examples


def train(options: argparse.Namespace, one_shot: Path, text: Path, examples: Path, seed: int) -> Any:
    """Yields the models of one seed by what was done to them, each when it is there."""
    folder = options.output_dir / str(seed)
    shared: dict[str, Any] = {"max_length": ROW_LENGTH, "batch_tokens": BATCH_TOKENS, "seed": seed}
    shared |= {"kernel": "dense", "report_to": "none"}
    on_task = Finetune("", "", dataset=(str(examples),), num_train_epochs=PASSES, **shared)
    on_text = Pretrain(str(one_shot), "", dataset=(str(text),), num_tokens=options.num_tokens, **shared)
    on_text = replace(on_text, learning_rate=RATE, repeat=True)
    dense, model = folder / "dense", str(options.model)
    if not dense.exists():
        finetune(replace(on_task, model=model, output_dir=str(dense), distill="none"))
    yield "dense, fine-tuned", dense
    taught: dict[str, Any] = {"teacher": str(dense), "distill": "both"}
    alone = folder / "alone"
    if not alone.exists():
        passes = PASSES + math.ceil(options.num_tokens / tokens_of(examples, options.model))
        job = replace(on_task, model=str(one_shot), output_dir=str(alone), **taught)
        finetune(replace(job, num_train_epochs=passes))
    yield "70%, fine-tuned alone", alone
    for name, teaching in {
        "pretrained, fine-tuned": taught,
        "without a teacher": {"distill": "none"},
    }.items():
        middle, end = (folder / f"{name.replace(', ', '-').replace(' ', '-')}-{n}" for n in (1, 2))
        if not middle.exists():
            teacher = {"teacher": model} if "teacher" in teaching else {}
            pretrain(replace(on_text, output_dir=str(middle), **teaching | teacher))
        if not end.exists():
            finetune(replace(on_task, model=str(middle), output_dir=str(end), **teaching))
        yield f"70%, {name}", end


def tokens_of(examples: Path, model: Path) -> int:
    """How many tokens the examples have."""
    tokenizer = Tokenizer.open(model)
    rows = map(json.loads, examples.read_text(encoding="utf-8").splitlines())
    return sum(len(tokenizer.encode(row["prompt"] + row["completion"])) for row in rows)


def report(results: Path, name: str, seed: int, model: Path, held_out: Path) -> None:
    """Evaluate a model that has no row yet, and write the row. A seed of -1: the same for all."""
    if any(row["model"] == name and row["seed"] == seed for row in read(results)):
        return
    found = evaluate(Evaluate(str(model), dataset=str(held_out), backend="engine"))
    row = {"model": name, "seed": seed, "perplexity": found.perplexity}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(*row.values(), sep="  ", flush=True)


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def summarize(rows: list[Row]) -> None:
    """Means over the seeds, what the seeds differ by, and how many times the dense model's they are."""
    dense = rows[0]["perplexity"]
    print(f"\n{'held-out perplexity':30} {'mean':>8} {'spread':>8} {'of dense':>9}")
    for name in dict.fromkeys(row["model"] for row in rows):
        values = [row["perplexity"] for row in rows if row["model"] == name]
        spread = f"{stdev(values):8.3f}" if len(values) > 1 else f"{'':8}"
        print(f"{name:30} {mean(values):8.3f} {spread} {mean(values) / dense:8.3f}x")


if __name__ == "__main__":
    main()
