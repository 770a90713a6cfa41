"""What a run of the paper's recipes will take, step by step: memory, time and cost, before anything runs.

The rates are ours, of docs/results and docs/LOG.md, and of small models: they are scaled to the model by the
multiplications of a token, and every line says so. `--tokens-per-s` counts before them.
"""

import argparse
import functools
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gossamer.data.packing import CHARACTERS_A_TOKEN
from gossamer.measure.synthetic import CONFIGS
from gossamer.runs.compress import Step
from gossamer.runs.recipe import Sizes, command
from gossamer.stages.evaluate import Evaluate
from gossamer.stages.finetune import Finetune
from gossamer.stages.pretrain import Pretrain
from gossamer.stages.prune import Prune
from gossamer.stages.quantize import Quantize
from gossamer.training.device import MICRO_BATCH_TOKENS
from gossamer.training.memory import MemoryEstimate, anatomy_of, estimate_memory, largest_fitting
from gossamer.training.teacher_cache import spread_layers
from gossamer.training.trainer import micro_row_counts

# SmolLM2-135M: weights of a token's products, with the head; of its 30 layers; layers x hidden width.
SMALL_PRODUCTS, SMALL_LAYERS, SMALL_WIDTHS = 134_479_872, 106_168_320, 30 * 576
TRAINING = 127_068  # tokens/s of it beside a live teacher, rows of 512, H200 (recover_smollm2.jsonl)
PACKING = 1_043_089  # tokens/s on two cores (tokenization.jsonl)
PRUNING = 30 * 30.0  # seconds of it by sparsegpt, 128 x 512 tokens, two threads (LOG.md, 30 a layer)
ROUNDING = 904 / 2  # seconds of it to W4A8, 64 x 512 tokens, 904 of the CPU on two threads (LOG.md)
ANSWERING = (
    29.7,
    8 * 202_375_168 + 131_072_000,
)  # tokens/s by two threads, i8 70%, of so many weights (README)


@functools.cache
def without_weights(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(configuration(model), dtype=dtype)


@functools.cache
def configuration(model: str) -> PreTrainedConfig:
    """Of a directory or of the hub; where that cannot be reached, of a shape that `bench` knows by name."""
    try:
        found: Any = AutoConfig.from_pretrained(model)
        return found
    except OSError:
        known: dict[str, Any] = {shape: config for shape, config in CONFIGS.items() if shape in model.lower()}
        if not known:
            raise
        [(shape, config)] = known.items()
        print(f"# {model} is not on this machine: planned by the shape of {shape} that gossamer bench has")
        return AutoConfig.for_model("llama", **config)


def memory(model: str, sizes: Sizes, job: Pretrain | Finetune, gpu_bytes: float) -> str:
    """What training takes of each GPU, from the model's configuration alone, in words.

    FSDP shares out weights, gradients and moments; a teacher that is not in a cache, whose weights are
    bfloat16, and a micro-batch, which is the largest that fits into `gpu_bytes`, are each GPU's.
    """
    built, num_gpus = without_weights(model), sizes.launch.num_processes
    live = job.teacher is not None and job.teacher_cache is None
    beside = without_weights(model, torch.bfloat16) if live else None
    own = sum(weight.nbytes for weight in built.parameters())

    def estimate(num_rows: int) -> MemoryEstimate:
        whole = estimate_memory(built, num_rows, job.max_length, "bf16", device="cuda", teacher=beside)
        shared = {name: math.ceil(getattr(whole, name) / num_gpus) for name in ("gradients", "moments")}
        weights = whole.weights - own + math.ceil(own / num_gpus)
        return replace(whole, weights=weights, **shared)

    own_rows = max(1, job.batch_rows(job.max_length) // num_gpus)
    counts = micro_row_counts(own_rows, job.max_length, MICRO_BATCH_TOKENS["cuda"])
    num_rows = largest_fitting(counts, estimate, int(gpu_bytes))
    return f"{estimate(num_rows).parts()} in micro-batches of {num_rows * job.max_length:,} tokens"


class Plan:
    """Prints it, and adds the hours up."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes) -> None:
        self.given, self.sizes, self.num_gpus = given, sizes, sizes.launch.num_processes
        model = without_weights(given.model)
        anatomy = self.anatomy = anatomy_of(model)
        self.layers = sum(linear.numel() for name, linear in model.named_parameters() if "_proj" in name)
        self.products = self.layers + anatomy.vocab_size * anatomy.hidden_size
        self.hours = self.pretraining = 0.0

    def print(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps, 1):
            print(f"# {number}. {step.stage} -> {step.output}")
            if isinstance(step.job, Pretrain | Finetune):
                self._training(step.job)
            elif isinstance(step.job, Prune | Quantize):
                self._layers(step.job)
            elif isinstance(step.job, Evaluate):
                self._evaluation(step.job)
            else:
                print(f"#    memory: about {self.layers * 4 / self.anatomy.num_layers / 1e9:.2f} GB, a layer")
                print("#    reads and writes each file once: the disk's time, not measured")
            print(shlex.join(command(step, self.sizes.launch)))
        for report in (step.output.with_suffix(".md") for step in steps if step.stage == "evaluate"):
            print(f"# report: {report}")
        if self.pretraining:
            rate, how = self.rate(taught=False)
            spent = f"{self.pretraining:,.1f} hours, {self._cost(self.pretraining)}"
            print(f"# pretraining: {spent}, at {rate:,.0f} tokens/s a GPU ({how})")
        print(f"# all that is timed here: {self.hours:,.1f} hours, {self._cost(self.hours)}")

    def rate(self, *, taught: bool) -> tuple[float, str]:
        """Tokens a second that a GPU trains, and where that is from."""
        if self.given.tokens_per_s:
            return self.given.tokens_per_s, "given"
        widths, length = self.anatomy.num_layers * self.anatomy.hidden_size, self.sizes.max_length
        ours = _multiplications(self.products, widths, length, taught=taught)
        measured = _multiplications(SMALL_PRODUCTS, SMALL_WIDTHS, 512, taught=True)
        how = (
            f"scaled by multiplications from {TRAINING:,} measured, SmolLM2-135M beside a teacher on an H200"
        )
        return TRAINING * measured / ours, how

    def _training(self, job: Pretrain | Finetune) -> None:
        needed = memory(self.given.model, self.sizes, job, self.given.gpu_gb * 1e9)
        print(f"#    each of {self.num_gpus} GPUs: about {needed}")
        if job.teacher_cache is not None:
            width = self.anatomy.hidden_size
            layers = spread_layers(self.anatomy.num_layers, width, 0, job.cache_layers)
            print(f"#    {job.teacher_cache}: {2 * width * len(layers):,} bytes a token of the teacher")
        rate, how = self.rate(taught=job.teacher is not None)
        num_tokens = job.num_tokens if isinstance(job, Pretrain) else _tokens(job)
        if num_tokens is None:
            hours = 1e6 / (rate * self.num_gpus) / 3600
            print(f"#    {job.dataset[0]} is not here; each 1,000,000 tokens: {hours:,.3f} hours ({how})")
            return
        if isinstance(job, Pretrain):
            self._took(
                f"packing {num_tokens:,} tokens", num_tokens / PACKING, "measured, two cores, any model"
            )
        seconds = num_tokens / (rate * self.num_gpus)
        self.pretraining += seconds / 3600 if isinstance(job, Pretrain) else 0.0
        self._took(f"{num_tokens:,} tokens", seconds, f"{rate:,.0f} tokens/s a GPU, {how}")

    def _layers(self, job: Prune | Quantize) -> None:
        """Layer after layer on the CPU, with the hidden states of two copies."""
        num_tokens = job.num_calibration_samples * job.max_seq_length
        states = 2 * 4 * num_tokens * self.anatomy.hidden_size
        layer = 4 * self.layers / self.anatomy.num_layers
        needed = f"{(states + 3 * layer) / 1e9:,.1f} GB of memory"
        print(f"#    the machine: at least {needed} (hidden states, and a layer three times)")
        prunes = isinstance(job, Prune)
        measured, small_tokens = (PRUNING, 128 * 512) if prunes else (ROUNDING, 64 * 512)
        seconds = measured * self.layers / SMALL_LAYERS * num_tokens / small_tokens
        what = "sparsegpt" if prunes else "W4A8, which takes longer than INT8,"
        how = f"scaled from {measured:,.0f} s measured, SmolLM2-135M by {what} on two threads"
        self._took(f"{num_tokens:,} tokens of calibration", seconds, how)

    def _evaluation(self, job: Evaluate) -> None:
        """Time is of the packed model's answers alone; a teacher's and a judge's come to it."""
        both = 4 * self.products + self.products // 2
        print(f"#    the machine: about {both / 1e9:,.1f} GB of memory (the packed model and its teacher)")
        rate = ANSWERING[0] * ANSWERING[1] / self.products
        seconds = 1000 * 256 / rate
        how = f"scaled from {ANSWERING[0]:g} tokens/s measured, 8 layers of Llama-2-7B, i8 70%, two threads"
        hours = f"{seconds / 3600:,.1f} hours, {self._cost(seconds / 3600)}"
        print(f"#    1,000 answers of 256 tokens: {hours} ({how}); its teacher's are not counted")

    def _took(self, what: str, seconds: float, how: str) -> None:
        self.hours += seconds / 3600
        print(f"#    {what}: {seconds / 3600:,.1f} hours, {self._cost(seconds / 3600)} ({how})")

    def _cost(self, hours: float) -> str:
        """Of all GPUs, which are held while the CPU works as well."""
        if self.given.price_per_hour is None:
            return f"{hours * self.num_gpus:,.1f} GPU-hours (--price-per-hour says what they cost)"
        price = self.given.price_per_hour
        return f"{hours * self.num_gpus * price:,.2f} at {price:g} a GPU-hour"


def _multiplications(products: int, widths: int, length: int, *, taught: bool) -> float:
    """Of training a token: forward, backward twice that, and a teacher's forward pass; half of the scores."""
    forward = products + widths * length
    return (4 if taught else 3) * forward


def _tokens(job: Finetune) -> int | None:
    """Of all epochs, by the size of the files; None where one is not here or is compressed."""
    files = [Path(name) for name in job.dataset]
    if not all(file.is_file() and file.suffix == ".jsonl" for file in files):
        return None
    return job.num_train_epochs * sum(file.stat().st_size for file in files) // CHARACTERS_A_TOKEN
