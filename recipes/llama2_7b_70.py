"""The paper's whole run of Llama-2-7B to 70% zeros (arXiv 2405.03594), for a machine with several GPUs.

    python recipes/llama2_7b_70.py meta-llama/Llama-2-7b-hf -o OUT --calibration TEXT --processes 8 \
        --examples arithmetic=TRAIN.jsonl,TEST.jsonl chat=TRAIN.jsonl,TEST.jsonl ... --dry-run

Prune 50% -> pretrain on 45 B tokens -> prune 70% -> pretrain on 100 B, and for each task that has examples:
its dense teacher, fine-tuning beside it, INT8, pack, evaluate. Training runs under torchrun, shared by FSDP.
Finished steps are skipped. `--dry-run` prints the commands, the memory that each GPU needs, and, from a
rate that you measured, time and cost.
"""

import argparse
import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import arithmetic
import chat
import coding
import instruction
import summarization
import torch
from one_task import fail, parser, run_and_print, sizes_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gossamer.errors import ConfigError, GossamerError
from gossamer.runs.compress import Step
from gossamer.runs.recipe import Files, Sizes, command, examples_of, finetuned, pruned
from gossamer.stages.finetune import Finetune
from gossamer.stages.pretrain import Pretrain
from gossamer.training.device import MICRO_BATCH_TOKENS
from gossamer.training.memory import MemoryEstimate, estimate_memory, largest_fitting
from gossamer.training.teacher_cache import spread_layers
from gossamer.training.trainer import micro_row_counts

TASKS = {module.TASK.name: module.TASK for module in (arithmetic, chat, coding, instruction, summarization)}
SPARSITY = 0.7


def examples_by_task(given: Sequence[str]) -> dict[str, Files]:
    """`TASK=TRAIN,TEST` of each."""
    found: dict[str, Files] = {}
    for each in given:
        name, equals, files = each.partition("=")
        train, comma, test = files.partition(",")
        if name not in TASKS or not equals or not comma:
            raise ConfigError(
                f"--examples {each}: expected TASK=TRAIN,TEST with TASK one of {', '.join(TASKS)}"
            )
        found[name] = Files(Path(train), Path(test))
    return found


@functools.cache
def without_weights(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)


def memory(model: str, sizes: Sizes, job: Pretrain | Finetune, gpu_bytes: float) -> str:
    """What training takes of each GPU, from the model's configuration alone, in words.

    FSDP shares out weights, gradients and moments; a teacher that is not in a cache, whose weights are
    bfloat16, and a micro-batch, which is the largest that fits into `gpu_bytes`, are each GPU's.
    """
    built = without_weights(model)
    live = job.teacher is not None and job.teacher_cache is None
    beside = without_weights(model, torch.bfloat16) if live else None
    own = sum(weight.nbytes for weight in built.parameters())

    def estimate(num_rows: int) -> MemoryEstimate:
        whole = estimate_memory(built, num_rows, job.max_length, "bf16", device="cuda", teacher=beside)
        shared = {
            name: math.ceil(getattr(whole, name) / sizes.num_processes) for name in ("gradients", "moments")
        }
        weights = whole.weights - own + math.ceil(own / sizes.num_processes)
        return replace(whole, weights=weights, **shared)

    own_rows = max(1, job.batch_rows(job.max_length) // sizes.num_processes)
    counts = micro_row_counts(own_rows, job.max_length, MICRO_BATCH_TOKENS["cuda"])
    num_rows = largest_fitting(counts, estimate, int(gpu_bytes))
    return f"{estimate(num_rows).parts()} in micro-batches of {num_rows * job.max_length:,} tokens"


def cache_bytes(model: str) -> int:
    """What a token takes in a teacher's cache, in its default layers."""
    settings = without_weights(model).config.get_text_config()
    layers = spread_layers(settings.num_hidden_layers, settings.hidden_size, 0, None)
    return 2 * settings.hidden_size * len(layers)


def print_plan(given: argparse.Namespace, sizes: Sizes, steps: Sequence[Step]) -> None:
    speed, hours = given.tokens_per_s, 0.0
    for number, step in enumerate(steps, 1):
        print(f"# {number}. {step.stage} -> {step.output}")
        if isinstance(step.job, Pretrain | Finetune):
            needed = memory(given.model, sizes, step.job, given.gpu_gb * 1e9)
            print(f"#    each of {sizes.num_processes} GPUs: about {needed}")
            if step.job.teacher_cache is not None:
                a_token = f"{cache_bytes(given.model):,} bytes a token of the teacher"
                print(f"#    {step.job.teacher_cache}: {a_token}")
        if isinstance(step.job, Pretrain) and speed:
            took = step.job.num_tokens / (speed * sizes.num_processes) / 3600
            hours += took
            print(f"#    {step.job.num_tokens:,} tokens: {took:,.1f} hours, {cost(given, took)}")
        print(shlex.join(command(step, sizes.num_processes)))
    if not speed:
        print("# time and cost: give --tokens-per-s, the rate of one GPU as you measured it")
        return
    print(f"# pretraining: {hours:,.1f} hours, {cost(given, hours)}, at {speed:,.0f} tokens/s a GPU")
    print("# pruning, fine-tuning and rounding, a small part of it, are not counted")


def cost(given: argparse.Namespace, hours: float) -> str:
    """Of all GPUs."""
    if given.price is None:
        return f"{hours * given.processes:,.1f} GPU-hours (--price says what they cost)"
    return f"{hours * given.processes * given.price:,.2f} at {given.price:g} a GPU-hour"


def main() -> None:
    options = parser("The paper's whole run of Llama-2-7B to 70% zeros.")
    options.add_argument("--examples", nargs="*", default=[], metavar="TASK=TRAIN,TEST")
    options.add_argument("--tokens-per-s", type=float, help="that a GPU trains, as you measured it")
    options.add_argument("--gpu-gb", type=float, default=80, help="memory of a GPU, for the plan")
    options.add_argument("--price", type=float, help="of an hour of a GPU")
    given = options.parse_args()
    output, sizes = given.output_dir, sizes_of(given, SPARSITY)
    try:
        files = examples_by_task(given.examples)
        if not given.dry_run:
            folder = output.with_name(f"{output.name}-examples")
            files = {name: examples_of(TASKS[name], each, folder / name) for name, each in files.items()}
        steps = pruned(given.model, output, given.calibration, given.dataset, sizes)
        sparse = steps[-1].output
        for name, each in files.items():
            steps += finetuned(TASKS[name], given.model, sparse, output, given.calibration, each, sizes)
        if given.dry_run:
            print_plan(given, sizes, steps)
            return
        run_and_print(steps, [(TASKS[name], each.test) for name, each in files.items()], given)
    except (GossamerError, OSError) as error:
        fail(options, error)


if __name__ == "__main__":
    main()
