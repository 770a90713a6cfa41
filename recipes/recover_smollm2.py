"""What comes back of a real chat model after pruning: `python recipes/recover_smollm2.py MODEL -o DIR ...`.

MODEL is a dense Llama with a chat template, such as SmolLM2-135M-Instruct. It writes text itself
(`write_text.py`), and is pruned to 50% and 70%. Then each pruned model, and the dense one as a control, is
trained on rows of that text and of `--dataset`, by cross-entropy, by the dense model's logits and by
SquareHead. All are measured on the tasks and texts of `--tasks` and `--texts`, example by example, so that
recovery has a paired error. Made for a GPU: an H100 writes 140,000 tokens a second of SmolLM2, and trains
60,000. What is finished is not done again: run the same command after an interruption.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gossamer.allocator import keep_freed_memory
from gossamer.checkpoint.directory import Checkpoint
from gossamer.data.mixture import Mixture
from gossamer.data.packing import CHARACTERS_A_TOKEN, pack_once, read_rows
from gossamer.data.rows import evaluation_rows
from gossamer.evaluation.backends import open_backend
from gossamer.evaluation.file_tasks import Kind, file_task
from gossamer.evaluation.harness import load_tasks, run
from gossamer.job.report import Event
from gossamer.stages.pretrain import Pretrain
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.rows import Rows
from gossamer.training.teacher import open_teacher
from gossamer.training.teacher_cache import teacher_for
from gossamer.training.trainer import train
from gossamer.training.whole_model import derive_in_first, load_model, write_model

TASKS: dict[str, Kind] = {
    "arc_easy.jsonl": "multiple-choice",
    "piqa.jsonl": "multiple-choice",
    "openbook_qa.jsonl": "multiple-choice",
    "winogrande.jsonl": "multiple-choice",
    "lambada.jsonl": "cloze",
}
ROW_LENGTH = 512
WRITTEN_SHARE = 0.75
DENSE = "dense"


@dataclass(frozen=True)
class Training:
    """A model that is trained: what it begins as, on how many tokens, at which rate, by which loss."""

    name: str
    start: str
    num_tokens: int
    learning_rate: float
    distill: str


def main() -> None:
    options = _options()
    keep_freed_memory()
    out, start = options.output_dir, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {line}", flush=True)

    if options.train:
        _train(options, _training(options.train))
        return
    if options.evaluate:
        _evaluate(options, options.evaluate)
        return
    pruning = {f"pruned-{sparsity}": _prune(options, sparsity) for sparsity in ("0.5", "0.7")}
    natural = _natural(options)
    say(f"{natural.size:,} tokens of human text")
    if not (out / "written.npy").exists():
        _write(options)
    say(f"{np.load(out / 'written.npy', mmap_mode='r').size:,} tokens that the dense model wrote")
    asked = [DENSE, *pruning]
    names = [training.name for training in map(_training, options.run)]
    for spec, name in zip(options.run, names, strict=True):
        _wait(pruning, _training(spec).start, out)
        if not (out / name).exists() and _again(options, "--train", spec, log=name).wait():
            sys.exit(f"training failed: see {out}/{name}.log")
        say(f"trained {name}")
    for name in pruning:
        _wait(pruning, name, out)
    if _again(options, "--evaluate", *asked, *names, log="evaluate").wait():
        sys.exit(f"evaluation failed: see {out}/evaluate.log")
    for name in [*asked, *names]:
        say(json.dumps(_summary(options, name)))


def _wait(pruning: dict[str, subprocess.Popen[bytes] | None], name: str, out: Path) -> None:
    """Until the directory that training begins with is there."""
    process = pruning.get(name)
    if process is not None and process.wait():
        sys.exit(f"pruning failed: see {out}/{name}.log")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--dataset", nargs="+", required=True, help="human text: SRC[@WEIGHT]...")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to prune by")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of " + ", ".join(TASKS))
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="held-out texts")
    parser.add_argument("--natural-tokens", type=int, default=2_000_000)
    parser.add_argument("--written-tokens", type=int, default=8_000_000)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--limit", type=int, default=0, help="examples of a task; 0: all")
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument(
        "--run",
        nargs="+",
        default=[
            "dense:5e6:6e-4:both",
            "pruned-0.5:5e6:6e-4:both",
            "pruned-0.7:13e6:1e-3:both",
        ],
        help="START:TOKENS:RATE:DISTILL...",
    )
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def _training(spec: str) -> Training:
    start, tokens, rate, distill = spec.split(":")
    return Training("-".join(("trained", *spec.split(":"))), start, int(float(tokens)), float(rate), distill)


def _again(options: argparse.Namespace, *arguments: str, log: str) -> subprocess.Popen[bytes]:
    """This program for one step, in a process of its own, so that a GPU's memory is free after it."""
    command = [sys.executable, *sys.argv, *arguments]
    with (options.output_dir / f"{log}.log").open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def _prune(options: argparse.Namespace, sparsity: str) -> subprocess.Popen[bytes] | None:
    """`gossamer prune` in the background: it is the CPU's, while a GPU writes text."""
    out = options.output_dir / f"pruned-{sparsity}"
    if out.exists():
        return None
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    rows = ["--num-calibration-samples", str(options.calibration_rows), "--max-seq-length", str(ROW_LENGTH)]
    text = ["--dataset", *options.calibration, "--overwrite", "--threads", threads]
    command = ["prune", str(options.model), "-o", str(out), "--sparsity", sparsity, *rows, *text]
    with (options.output_dir / f"{out.name}.log").open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "gossamer", *command], stdout=file, stderr=file, env=environment
        )


def _natural(options: argparse.Namespace) -> np.ndarray:
    """Rows of human text, marked; packed once."""
    tokenizer, folder = Tokenizer.open(options.model), options.output_dir / "natural"
    mixture = Mixture(options.dataset, 0, piece_characters=CHARACTERS_A_TOKEN * ROW_LENGTH)
    max_rows = -(-options.natural_tokens // ROW_LENGTH)
    decided = {"dataset": options.dataset}
    packed = pack_once(mixture, tokenizer, ROW_LENGTH, max_rows, folder, decided)
    natural = np.array(read_rows(folder, packed))
    np.save(options.output_dir / "natural.npy", natural)
    return natural


def _write(options: argparse.Namespace) -> None:
    out = options.output_dir
    command = [
        sys.executable,
        str(Path(__file__).with_name("write_text.py")),
        str(options.model),
        *("-o", str(out / "written.partial.npy"), "--starts", str(out / "natural.npy")),
        *("--num-tokens", str(options.written_tokens), "--row-length", str(ROW_LENGTH + 1)),
    ]
    subprocess.run(command, check=True)
    (out / "written.partial.npy").rename(out / "written.npy")


def _mixed(out: Path, num_tokens: int, tokenizer: Tokenizer) -> Rows:
    """Rows of both kinds of text in a fixed order; a kind that is used up begins again, in another order.

    Of written text, as of packed rows, every second one is without BOS where the tokenizer adds none.
    """
    chance = np.random.default_rng(0)
    num_rows = -(-num_tokens // ROW_LENGTH)
    num_written = round(WRITTEN_SHARE * num_rows)
    written_SU, natural_ST = (np.load(out / f"{name}.npy") for name in ("written", "natural"))
    written_ST = written_SU[:, :-1].copy()
    if not tokenizer.adds_bos:
        written_ST[1::2] = written_SU[1::2, 1:]
        written_ST[1::2, 0] = ~written_ST[1::2, 0]
    kinds = []
    for rows_ST, wanted in ((written_ST, num_written), (natural_ST, num_rows - num_written)):
        order = [chance.permutation(len(rows_ST)) for _ in range(-(-wanted // len(rows_ST)))]
        kinds.append(rows_ST[np.concatenate(order)[:wanted]] if order else rows_ST[:0])
    rows_ST = np.concatenate(kinds)
    return Rows(rows_ST[chance.permutation(len(rows_ST))])


def _train(options: argparse.Namespace, training: Training) -> None:
    out = options.output_dir
    start = options.model if training.start == DENSE else out / training.start
    job = Pretrain(
        str(start),
        str(out / training.name),
        dataset=tuple(options.dataset),
        num_tokens=training.num_tokens,
        teacher=str(options.model),
        distill=training.distill,  # pyright: ignore[reportArgumentType]
        max_length=ROW_LENGTH,
        batch_tokens=options.batch_tokens,
        learning_rate=training.learning_rate,
        report_to="none",
        save_steps=0,
        overwrite=True,
    )
    source = Checkpoint.open(start)
    rows = _mixed(out, training.num_tokens, Tokenizer.open(source.path))
    began = time.monotonic()

    def progress(event: Event) -> None:
        if event.lasting or event.done % 20 == 1:
            print(f"{time.monotonic() - began:6.1f} s {event}", flush=True)

    with derive_in_first(source, job, "pretrain") as target:
        teacher = teacher_for(job, open_teacher(options.model, source), rows, "pretrain", progress)
        model = load_model(source)
        history = train(job, model, rows, target, progress, teacher)
        write_model(model, target)
        target.num_threads = history.num_threads
        target.metrics.update(history.metrics())


def _evaluate(options: argparse.Namespace, names: list[str]) -> None:
    """Each task's metrics and samples, and each text's perplexity, into DIR/scores/NAME.json."""
    folder = options.output_dir / "tasks"
    tasks = [file_task(options.tasks / name, kind, folder) for name, kind in TASKS.items()]
    manager, _ = load_tasks(tasks, offline=True)
    for name in names:
        target = _scores(options, name)
        if target.exists():
            continue
        model = options.model if name == DENSE else options.output_dir / name
        backend, began = open_backend(str(model), "torch", offline=True), time.monotonic()
        perplexities = {}
        for text in options.texts:
            rows_ST = evaluation_rows(str(text), backend.tokenizer)[: options.limit or None]
            losses = [backend.log_probs(rows_ST[at : at + 64]) for at in range(0, len(rows_ST), 64)]
            perplexities[text.name] = float(np.exp(-np.concatenate(losses).mean()))
        found = run(tasks, manager, backend.for_harness(), options.limit)
        scores = {
            task: {"metrics": s.metrics, "errors": s.standard_errors, "samples": s.samples}
            for task, s in found.items()
        }
        target.parent.mkdir(exist_ok=True)
        record = {"perplexity": perplexities, "tasks": scores, "seconds": time.monotonic() - began}
        target.write_text(json.dumps(record))
        print(name, json.dumps(_summary(options, name)), flush=True)


def _scores(options: argparse.Namespace, name: str) -> Path:
    """Where the figures of so many examples are."""
    return options.output_dir / f"scores-{options.limit or 'all'}" / f"{name}.json"


def _summary(options: argparse.Namespace, name: str) -> dict[str, object]:
    """Mean accuracy of the tasks, and over the dense model's, with the error paired by example."""
    ours, dense = (json.loads(_scores(options, n).read_text()) for n in (name, DENSE))
    accuracy = {task: float(np.mean(s["samples"])) for task, s in ours["tasks"].items()}
    base = [np.mean(dense["tasks"][task]["samples"]) for task in accuracy]
    recovery = float(np.mean(list(accuracy.values())) / np.mean(base))
    change = [
        np.array(s["samples"]) - recovery * np.array(dense["tasks"][task]["samples"])
        for task, s in ours["tasks"].items()
    ]
    error = np.sqrt(sum(c.var(ddof=1) / len(c) for c in change)) / len(change)
    return {
        "model": name,
        **{task.removesuffix(".jsonl"): round(value, 4) for task, value in accuracy.items()},
        "mean": round(float(np.mean(list(accuracy.values()))), 4),
        "recovery": round(recovery, 4),
        "paired_error": round(float(error / np.mean(base)), 4),
        **{text: round(value, 2) for text, value in ours["perplexity"].items()},
        "seconds": round(ours["seconds"]),
    }


if __name__ == "__main__":
    main()
