"""What the programs of the paper's tasks share: their command line, and what they print."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gossamer.cli import ProgressBars
from gossamer.errors import GossamerError
from gossamer.runs.compress import Step
from gossamer.runs.recipe import (
    Files,
    Sizes,
    Task,
    command,
    evaluation,
    examples_of,
    finetuned,
    measured,
    pruned,
    run,
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every one of the paper's runs."""
    made = argparse.ArgumentParser(description=description)
    whole = Sizes()
    made.add_argument("model", help="dense checkpoint directory, or org/name of the hub")
    made.add_argument("-o", "--output-dir", type=Path, required=True, help="finished steps in it are skipped")
    made.add_argument("--dataset", nargs="+", default=["preset:sparse-llama"], help="text to pretrain on")
    made.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on: SRC[@WEIGHT]...")
    made.add_argument("--num-tokens", nargs=2, type=int, default=whole.num_tokens, metavar=("AT_50", "AT_70"))
    made.add_argument("--repeat", action="store_true", help="text that is used up begins again")
    made.add_argument("--num-calibration-samples", type=int, default=whole.num_calibration_samples)
    made.add_argument("--max-length", type=int, default=whole.max_length, help="tokens a row")
    made.add_argument("--batch-tokens", type=int, help="an optimizer step's, in both kinds of training")
    made.add_argument("--limit", type=int, default=0, help="examples to evaluate on; 0: all")
    made.add_argument(
        "--processes", type=int, default=1, help="GPUs of this machine that training shares (FSDP)"
    )
    made.add_argument(
        "--teacher-cache",
        type=Path,
        metavar="FOLDER",
        help="ask each task's teacher once, into this folder, instead of holding it beside the model",
    )
    made.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run what models write for the code task",
    )
    made.add_argument("--overwrite", action="store_true", help="replace training that other options made")
    made.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    return made


def fail(options: argparse.ArgumentParser, error: Exception) -> NoReturn:
    """End with the codes of the command line: 2 for what was asked, 1 for what the system lacks."""
    options.exit(1 if isinstance(error, OSError) else 2, f"{options.prog}: {error}\n")


def sizes_of(given: argparse.Namespace, sparsity: float) -> Sizes:
    step = given.batch_tokens
    asked = {} if step is None else {"pretrain_batch_tokens": step, "finetune_batch_tokens": step}
    return Sizes(
        sparsity=sparsity,
        num_tokens=tuple(given.num_tokens),
        num_calibration_samples=given.num_calibration_samples,
        max_length=given.max_length,
        repeat=given.repeat,
        num_processes=given.processes,
        teacher_cache=given.teacher_cache,
        **asked,
    )


def run_and_print(
    steps: Sequence[Step], tests: Sequence[tuple[Task, Path]], given: argparse.Namespace
) -> None:
    """A line for each step that is done, and then what each task's examples say.

    Raises what the steps raise, and ConfigError before the first for what could not be measured in the end.
    """
    last = [
        evaluation(
            task, test, given.output_dir / task.name, given.limit, allow_code=given.allow_code_execution
        )
        for task, test in tests
    ]
    with ProgressBars() as progress:
        done = run(steps, given.output_dir, given.processes, given.overwrite, progress)
        for step, how in zip(steps, done, strict=True):
            print(f"{how:8} {step.stage:9} {step.output}", flush=True)
        for job in last:
            print(measured(job, progress), flush=True)


def main(task: Task, description: str | None) -> None:
    """teacher -> prune -> pretrain -> finetune -> quantize -> pack -> evaluate -> report."""
    options = parser(description)
    options.add_argument("--sparsity", type=float, choices=(0.5, 0.7), default=0.7)
    options.add_argument("--train", type=Path, required=True, help="examples: .jsonl[.zst] or .parquet")
    options.add_argument("--test", type=Path, required=True, help="examples to evaluate on")
    given = options.parse_args()
    output, sizes = given.output_dir, sizes_of(given, given.sparsity)
    try:
        files = Files(given.train, given.test)
        if not given.dry_run:
            files = examples_of(task, files, output.with_name(f"{output.name}-examples"))
        first = pruned(given.model, output, given.calibration, given.dataset, sizes)
        rest = finetuned(task, given.model, first[-1].output, output, given.calibration, files, sizes)
        if given.dry_run:
            for step in [*first, *rest]:
                print(shlex.join(command(step, sizes.num_processes)))
            return
        run_and_print([*first, *rest], [(task, files.test)], given)
    except (GossamerError, OSError) as error:
        fail(options, error)
