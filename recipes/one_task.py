"""What the programs of the paper's tasks share: their command line, and what they print."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from plan import Plan

from gossamer.cli import ProgressBars
from gossamer.errors import ConfigError, GossamerError
from gossamer.runs.compress import Step
from gossamer.runs.recipe import (
    Files,
    Launch,
    Measuring,
    Sizes,
    Task,
    check_measurable,
    evaluations,
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
        "--nnodes", type=int, default=1, help="machines that share it, which see the same files"
    )
    made.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0 on")
    made.add_argument("--rdzv-endpoint", default="", metavar="HOST:PORT", help="of the first machine")
    made.add_argument(
        "--judge", default="", metavar="URL", help="compares answers of chat (evaluate --judge)"
    )
    made.add_argument("--judge-model", default="", help="the judge's name at its endpoint")
    made.add_argument(
        "--ifeval", type=Path, metavar="FILE", help="IFEval's prompts, for the instruction task"
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
    made.add_argument(
        "--dry-run", action="store_true", help="print commands, memory, time and cost; run nothing"
    )
    made.add_argument(
        "--tokens-per-s", type=float, help="that a GPU trains; default: scaled from our own rate"
    )
    made.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU, for the plan")
    made.add_argument("--price-per-hour", type=float, help="of a GPU")
    return made


def fail(options: argparse.ArgumentParser, error: Exception) -> NoReturn:
    """End with the codes of the command line: 2 for what was asked, 1 for what the system lacks."""
    options.exit(1 if isinstance(error, OSError) else 2, f"{options.prog}: {error}\n")


def examples_by_task(given: Sequence[str], tasks: Collection[str]) -> dict[str, Files]:
    """`TASK=TRAIN,TEST` of each; ConfigError for anything else, and for another task."""
    found: dict[str, Files] = {}
    for each in given:
        name, equals, files = each.partition("=")
        train, comma, test = files.partition(",")
        if name not in tasks or not equals or not comma:
            raise ConfigError(
                f"--examples {each}: expected TASK=TRAIN,TEST with TASK one of {', '.join(tasks)}"
            )
        found[name] = Files(Path(train), Path(test))
    return found


def sizes_of(given: argparse.Namespace, sparsity: float) -> Sizes:
    step = given.batch_tokens
    asked = {} if step is None else {"pretrain_batch_tokens": step, "finetune_batch_tokens": step}
    return Sizes(
        sparsity=sparsity,
        num_tokens=tuple(given.num_tokens),
        num_calibration_samples=given.num_calibration_samples,
        max_length=given.max_length,
        repeat=given.repeat,
        launch=launch_of(given),
        teacher_cache=given.teacher_cache,
        **asked,
    )


def launch_of(given: argparse.Namespace) -> Launch:
    launch = Launch(given.processes, given.nnodes, given.node_rank, given.rdzv_endpoint)
    launch.check()
    return launch


def plan_or_run(
    steps: Sequence[Step], tests: Sequence[tuple[Task, Path]], given: argparse.Namespace, sizes: Sizes
) -> None:
    """The plan, or a line for each step that is done, and then what each task's examples say.

    Raises what the steps raise, and ConfigError before the first for what could not be measured in the end.
    """
    how = Measuring(given.limit, given.allow_code_execution, given.judge, given.judge_model, given.ifeval)
    last = [
        step for task, test in tests for step in evaluations(task, test, given.output_dir / task.name, how)
    ]
    if given.dry_run:
        Plan(given, sizes).print([*steps, *last])
        return
    check_measurable(last)
    with ProgressBars() as progress:
        done = run(steps, given.output_dir, sizes.launch, given.overwrite, progress)
        for step, what in zip(steps, done, strict=True):
            print(f"{what:8} {step.stage:9} {step.output}", flush=True)
        for step in last if given.node_rank == 0 else ():
            print(measured(step.job, progress), flush=True)


def main(task: Task, description: str | None) -> None:
    """teacher -> prune -> pretrain -> finetune -> quantize -> pack -> evaluate -> report."""
    options = parser(description)
    options.add_argument("--sparsity", type=float, choices=(0.5, 0.7), default=0.7)
    options.add_argument("--train", type=Path, required=True, help="examples: .jsonl[.zst] or .parquet")
    options.add_argument("--test", type=Path, required=True, help="examples to evaluate on")
    given = options.parse_args()
    output = given.output_dir
    try:
        sizes = sizes_of(given, given.sparsity)
        files = Files(given.train, given.test)
        if not given.dry_run:
            files = examples_of(task, files, output.with_name(f"{output.name}-examples"))
        first = pruned(given.model, output, given.calibration, given.dataset, sizes)
        rest = finetuned(task, given.model, first[-1].output, output, given.calibration, files, sizes)
        plan_or_run([*first, *rest], [(task, files.test)], given, sizes)
    except (GossamerError, OSError) as error:
        fail(options, error)
