"""Training on the values alone against dense training, in one run: speed beside 1 / (1 - s), and memory.

    python benchmarks/training.py linears   forward and backward of a block's linears: width 2048, FFN 5632
    python benchmarks/training.py step      whole steps of the Trainer: 12 layers x 768, vocabulary 8192
    python benchmarks/training.py real SPARSE DENSE TEXT
                                            whole steps of a real model by a teacher on disk, and the peak of
                                            memory, each in a process of its own

Rows of docs/results/training.jsonl; `linears` draws docs/results/training.png. Dense is torch, in float32
and in bfloat16 (on the matrix unit where there is one); both and the sparse products take turns.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import torch
from results import RESULTS, write_row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer import _native, plots
from gossamer.checkpoint.directory import companions
from gossamer.job.report import Event
from gossamer.measure.readers import impossible
from gossamer.measure.report import GIGA, Spread
from gossamer.runs.recovery import SHIPPED
from gossamer.stages.pretrain import Pretrain, pretrain
from gossamer.training.kernel_choice import TrainingKernel
from gossamer.training.sparse_linear import SparseLinear

WIDTH, FFN, TOKENS = 2048, 5632, 2048
SHAPES = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH)] * 2 + [(WIDTH, FFN)]  # q k v o, gate up, down
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
REPEATS = 7
STEP_SPARSITY, ROW_LENGTH = 0.7, 512
REAL_STEPS, REAL_ROUNDS = 3, 2
STEPS, ROUNDS = 4, 2


def masked_linear(rows: int, columns: int, sparsity: float) -> nn.Linear:
    dense = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        dense.weight.mul_(torch.rand(rows, columns) >= sparsity)
    return dense


def pass_seconds(linear: nn.Module, x_TK: Tensor, dy_TN: Tensor, precision: str) -> float:
    """One forward and backward, gradients of weights and inputs both."""
    linear.zero_grad(set_to_none=True)
    x_TK.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        y_TN = linear(x_TK)
    y_TN.backward(dy_TN.to(y_TN.dtype))
    return time.perf_counter() - start


def linears_row(sparsity: float) -> dict[str, Any]:
    """All linears of a block: seconds of each way, summed over the shapes within each round."""
    contenders: dict[str, Callable[[nn.Linear], tuple[nn.Module, str]]] = {
        "dense_f32": lambda dense: (dense, "f32"),
        "dense_bf16": lambda dense: (dense, "bf16"),
        "sparse_f32": lambda dense: (SparseLinear(dense), "f32"),
    }
    rounds: dict[str, list[float]] = {name: [0.0] * (REPEATS + 1) for name in contenders}
    peaks = []
    for rows, columns in dict.fromkeys(SHAPES):
        dense = masked_linear(rows, columns, sparsity)
        modules = {name: make(dense) for name, make in contenders.items()}
        x_TK = torch.randn(TOKENS, columns, requires_grad=True)
        dy_TN = torch.randn(TOKENS, rows)
        for turn in range(REPEATS + 1):
            peaks.append(2 * _native.f32_peak(_native.isa(), torch.get_num_threads(), 1))
            for name, (module, precision) in modules.items():
                seconds = pass_seconds(module, x_TK, dy_TN, precision)
                rounds[name][turn] += seconds * SHAPES.count((rows, columns))
    spreads = {name: Spread.of(found[1:]) for name, found in rounds.items()}
    work = 6 * TOKENS * sum(rows * columns for rows, columns in SHAPES)
    shares = {
        "dense_f32": work / spreads["dense_f32"].median / max(peaks),
        "sparse_f32": work * (1 - sparsity) / spreads["sparse_f32"].median / max(peaks),
    }
    return {
        "job": "linears",
        "sparsity": sparsity,
        "width": WIDTH,
        "ffn": FFN,
        "tokens": TOKENS,
        "num_threads": torch.get_num_threads(),
        "seconds": {name: dataclasses.asdict(spread) for name, spread in spreads.items()},
        "against_dense_f32": spreads["dense_f32"].median / spreads["sparse_f32"].median,
        "against_dense_bf16": spreads["dense_bf16"].median / spreads["sparse_f32"].median,
        "bound": 1 / (1 - sparsity),
        "f32_peak_gflops": max(peaks) / GIGA,
        "peak_share": shares,
        "impossible": impossible(shares),
    }


def linears() -> None:
    rows = [linears_row(sparsity) for sparsity in SPARSITIES]
    for row in rows:
        write_row("training", row)
    plots.training_speed(
        RESULTS / "training.png",
        SPARSITIES,
        {
            "against dense float32": [row["against_dense_f32"] for row in rows],
            "against dense bfloat16": [row["against_dense_bf16"] for row in rows],
        },
        f"Forward and backward of a block's linears, width {WIDTH}, {TOKENS} tokens",
    )


def sparse_model(folder: Path) -> Path:
    """Random weights, 12 layers x 768, vocabulary 8192, 70% zeros; the shipped model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=8192,
        max_position_embeddings=ROW_LENGTH,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                module.weight.mul_(torch.rand_like(module.weight) >= STEP_SPARSITY)
    model.save_pretrained(folder / "model")
    for file in companions(SHIPPED):
        shutil.copyfile(file, folder / "model" / file.name)
    return folder / "model"


def run_steps(
    model: Path, output: Path, kernel: TrainingKernel, precision: Literal["f32", "bf16"]
) -> dict[str, Any]:
    """Seconds of each step but the first, and the bytes of gradients and moments, of a run of `pretrain`."""
    ends: list[float] = []

    def watch(event: Event) -> None:
        if event.message == "training":
            ends.append(time.perf_counter())

    job = Pretrain(
        model=str(model),
        output_dir=str(output),
        dataset=("python:stdlib",),
        num_tokens=STEPS * TOKENS,
        batch_tokens=TOKENS,
        max_length=ROW_LENGTH,
        kernel=kernel,
        precision=precision,
        overwrite=True,
    )
    pretrain(job, watch)
    metrics = json.loads((output / "gossamer.json").read_text())["metrics"]
    seconds = [end - begin for begin, end in pairwise(ends)]
    return {"seconds": seconds, "bytes": metrics["optimizer_gradient_bytes"]}


def steps() -> None:
    """Whole steps of 2048 tokens in rows of 512; the runs take turns."""
    kernels: tuple[TrainingKernel, ...] = ("dense", "sparse")
    precisions: tuple[Literal["f32", "bf16"], ...] = ("f32", "bf16")
    with tempfile.TemporaryDirectory() as folder:
        model = sparse_model(Path(folder))
        seconds: dict[str, list[float]] = {}
        held: dict[str, int] = {}
        for _ in range(ROUNDS):
            for kernel, precision in product(kernels, precisions):
                found = run_steps(model, Path(folder) / "trained", kernel, precision)
                seconds.setdefault(f"{kernel}_{precision}", []).extend(found["seconds"])
                held[kernel] = found["bytes"]
    spreads = {name: Spread.of(found) for name, found in seconds.items()}
    row = {
        "job": "step",
        "sparsity": STEP_SPARSITY,
        "layers": 12,
        "width": 768,
        "tokens": TOKENS,
        "num_threads": torch.get_num_threads(),
        "seconds": {name: dataclasses.asdict(spread) for name, spread in spreads.items()},
        "against_dense_f32": spreads["dense_f32"].median / spreads["sparse_f32"].median,
        "against_dense_bf16": spreads["dense_bf16"].median / spreads["sparse_bf16"].median,
        "optimizer_gradient_bytes": held,
        "optimizer_gradient_share": held["sparse"] / held["dense"],
        "impossible": [],
    }
    write_row("training", row)


def real(sparse: str, dense: str, text: str) -> None:
    """Steps of 8,192 tokens in micro-batches of 2,048; the ways to train take turns.

    Seconds are of steps after the first. What the teacher says is written down before, by a run of its own.
    """
    ways = {
        "dense": ["--kernel", "dense"],
        "dense_checkpointed": ["--kernel", "dense", "--activation-checkpointing"],
        "sparse_checkpointed": ["--kernel", "sparse", "--activation-checkpointing"],
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gossamer", "pretrain", sparse, "-o", f"{folder}/trained"]
        command += ["--dataset", text, "--num-tokens", str(REAL_STEPS * 4 * TOKENS), "--overwrite"]
        command += ["--batch-tokens", str(4 * TOKENS), "--max-length", str(ROW_LENGTH), "--save-steps", "0"]
        command += ["--teacher", dense, "--distill", "both", "--teacher-cache", f"{folder}/teacher"]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        peaks: dict[str, int] = {}
        for turn in range(
            1 + REAL_ROUNDS
        ):  # in the first one, which counts for nothing, the teacher is asked
            for way, flags in ways.items() if turn else [("dense", ways["dense"])]:
                process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
                _, status, used = os.wait4(process.pid, 0)
                if status:
                    sys.exit(f"{way} failed")
                if turn:
                    lines = (Path(folder) / "trained" / "metrics.jsonl").read_text().splitlines()
                    ends = [json.loads(line)["seconds"] for line in lines]
                    seconds[way] += [end - begin for begin, end in pairwise(ends)]
                    peaks[way] = used.ru_maxrss * 1024
    spreads = {way: Spread.of(found) for way, found in seconds.items()}
    row = {
        "job": "real",
        "model": Path(sparse).name,
        "tokens": 4 * TOKENS,
        "micro_batch_tokens": TOKENS,
        "num_threads": torch.get_num_threads(),
        "seconds": {way: dataclasses.asdict(spread) for way, spread in spreads.items()},
        "tokens_per_s": {way: 4 * TOKENS / spread.median for way, spread in spreads.items()},
        "peak_bytes": peaks,
        "impossible": [],
    }
    write_row("training", row)


JOBS = {"linears": linears, "step": steps}


def main() -> None:
    if sys.argv[1:2] == ["real"]:
        real(*sys.argv[2:])
        return
    for job in sys.argv[1:] or JOBS:
        JOBS[job]()


if __name__ == "__main__":
    main()
