"""What the programs for encoders share: their command line, a plan of what they take, and their table."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from one_task import examples_by_task

from gossamer.checkpoint.directory import Checkpoint
from gossamer.cli import ProgressBars
from gossamer.runs.compress import Step
from gossamer.runs.encoder_recipe import EncoderSizes, EncoderTask, evaluation, transferred
from gossamer.runs.recipe import Files, command, examples_of, run
from gossamer.stages.finetune import Finetune
from gossamer.stages.pretrain import Pretrain
from gossamer.training.memory import estimate_memory
from gossamer.training.whole_model import new_model

# Tokens a second that one core of a Xeon trains beside a teacher, MiniLM: 10.6 M weights of layers (LOG.md).
TRAINING, SMALL_LAYERS = 952, 10_616_832
CHARACTERS_A_TOKEN = 4


def parser(description: str | None, sizes: EncoderSizes) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", help="dense encoder: a directory, or org/name of the hub")
    made.add_argument("-o", "--output-dir", type=Path, required=True, help="finished steps in it are skipped")
    made.add_argument("--dataset", nargs="+", required=True, help="text to pretrain on: SRC[@WEIGHT]...")
    made.add_argument("--calibration", nargs="+", help="text to calibrate INT8 on (default: --dataset)")
    made.add_argument("--examples", nargs="*", default=[], metavar="TASK=TRAIN,TEST")
    made.add_argument("--sparsity", type=float, default=sizes.sparsity)
    made.add_argument("--pattern", default=sizes.pattern, help="of the zeros; 1x4: what INT8 prompts skip")
    made.add_argument("--num-tokens", type=int, default=sizes.num_tokens, help="of each pretraining")
    made.add_argument("--max-length", type=int, default=sizes.max_length, help="tokens of a text")
    made.add_argument("--pretrain-batch-tokens", type=int, default=sizes.pretrain_batch_tokens)
    made.add_argument("--lr-cycles", type=int, default=sizes.lr_cycles, help="of gradual pruning")
    made.add_argument("--epochs", type=int, default=sizes.epochs, help="of a task")
    made.add_argument("--num-calibration-samples", type=int, default=sizes.num_calibration_samples)
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="a transfer of each")
    made.add_argument("--overwrite", action="store_true", help="replace training that other options made")
    made.add_argument("--dry-run", action="store_true", help="print commands, memory and time; run nothing")
    made.add_argument("--tokens-per-s", type=float, help="that training does here; default: scaled from ours")
    return made


def sizes_of(given: argparse.Namespace, sizes: EncoderSizes) -> EncoderSizes:
    upstream = ("sparsity", "pattern", "num_tokens", "max_length", "pretrain_batch_tokens", "lr_cycles")
    names = (*upstream, "epochs", "num_calibration_samples")
    return replace(
        sizes,
        **{name: getattr(given, name) for name in names},
        begin_sparsity=min(sizes.begin_sparsity, given.sparsity),
    )


def examples(given: argparse.Namespace, tasks: Mapping[str, EncoderTask]) -> dict[str, Files]:
    """`TASK=TRAIN,TEST` of each, as the stages read them; as they are given for a dry run."""
    found = examples_by_task(given.examples, tasks)
    if given.dry_run:
        return found
    folder = given.output_dir.with_name(f"{given.output_dir.name}-examples")
    return {name: examples_of(tasks[name], each, folder / name) for name, each in found.items()}


@dataclass(frozen=True)
class Arm:
    """Models of a task that differ by their seeds alone, and that the table has a line for."""

    task: EncoderTask
    name: str
    models: Sequence[Path]
    test: Path

    def evaluations(self) -> list[Step]:
        return [evaluation(self.task, it, self.test, it.with_suffix(".json")) for it in self.models]


def transfers(
    given: argparse.Namespace, task: EncoderTask, files: Files, sizes: EncoderSizes, sparse: Path, kind: str,
    said: str, calibration: Sequence[str], freeze: str = "embeddings",
) -> tuple[list[Step], Arm]:  # fmt: skip
    """A transfer of each seed beside the task's teacher, in folders named by `kind`, and their line."""
    steps, models = list[Step](), list[Path]()
    for seed in given.seeds:
        folder = given.output_dir / task.name / f"{kind}-{seed}"
        teacher = folder.with_name("teacher")
        steps += transferred(
            task, sparse, teacher, folder, calibration, files, sizes, seed=seed, freeze=freeze
        )
        models.append(folder / "model.goss")
    return steps, Arm(task, f"{sizes.sparsity:.0%} zeros, INT8, {said}", models, files.test)


def plan_or_run(given: argparse.Namespace, steps: Sequence[Step], arms: Sequence[Arm]) -> None:
    """The plan; or a line for each step that is done, and then the table."""
    if given.dry_run:
        plan(given, [*steps, *(step for arm in arms for step in arm.evaluations())])
        return
    with ProgressBars() as progress:
        for step, what in zip(
            steps, run(steps, given.output_dir, overwrite=given.overwrite, progress=progress), strict=True
        ):
            print(f"{what:8} {step.stage:9} {step.output}", flush=True)
        print("| task | model | score | spread | runs |\n|---|---|---|---|---|")
        for arm in arms:
            scores: list[float] = []
            for step in arm.evaluations():
                step.function(step.job, progress)
                scores += json.loads(step.output.read_text(encoding="utf-8"))["accuracy"].values()
            spread = f"{stdev(scores):.4f}" if len(scores) > 1 else ""
            print(
                f"| {arm.task.name} | {arm.name} | {mean(scores):.4f} | {spread} | {len(scores)} |",
                flush=True,
            )


def plan(given: argparse.Namespace, steps: Sequence[Step]) -> None:
    """Of every step its command; of training also memory and time."""
    source = Checkpoint.open(given.model)
    with torch.device("meta"):
        model = new_model(source.architecture, source.config)
        teacher = new_model(source.architecture, source.config)
    layers = sum(weight.numel() for name, weight in model.named_parameters() if ".layer" in name)
    scaled = TRAINING * SMALL_LAYERS / layers
    rate = given.tokens_per_s or scaled
    how = "given" if given.tokens_per_s else f"scaled from {TRAINING} measured, MiniLM on one core"
    hours = 0.0
    for number, step in enumerate(steps, 1):
        print(f"# {number}. {step.stage} -> {step.output}")
        if isinstance(step.job, Pretrain | Finetune):
            rows = max(1, min(step.job.batch_tokens, 8192) // step.job.max_length)
            needed = estimate_memory(model, rows, step.job.max_length, "bf16", teacher=teacher)
            print(f"#    memory: weights {8 * layers / 1e9:.1f} GB with a teacher's, and {needed.parts()}")
            num_tokens = _tokens(step.job)
            if num_tokens is None:
                print(f"#    {step.job.dataset[0]} is not here; {rate:,.0f} tokens/s ({how})")
            else:
                hours += num_tokens / rate / 3600
                print(f"#    {num_tokens:,} tokens: {num_tokens / rate / 3600:,.1f} hours ({how})")
        print(shlex.join(command(step)))
    print(f"# all training that is timed here: {hours:,.1f} hours")


def _tokens(job: Pretrain | Finetune) -> int | None:
    if isinstance(job, Pretrain):
        return job.num_tokens
    files = [Path(name) for name in job.dataset]
    if not all(file.is_file() for file in files):
        return None
    return job.num_train_epochs * sum(file.stat().st_size for file in files) // CHARACTERS_A_TOKEN
