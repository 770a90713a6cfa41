"""Sparse products on a GPU: right, how fast, and in a model of 8 B weights. Needs torch, NumPy, this source.

    PYTHONPATH=src python benchmarks/gpu.py correct|kernels|whole [--out FILE.jsonl]

Three runs of at most eight minutes each; exit code 1 where something is not right. Rows go to FILE, one
measurement each, with the card's name. What we expect is PREDICTIONS, written before any of it ran on a GPU:
bounds of memory, shared memory and counted instructions. On a CPU (`--device cpu --tiny`) the same program
runs by the operator's definition, so that it is known to run; its times mean nothing there.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from gossamer.gpu.linear import SparseLinear
from gossamer.measure.gpu_decoder import DENSE, Decoder, Sizes, sparse
from gossamer.measure.stopwatch import Stopwatch

# Card -> over cuBLAS bfloat16 at 70% zeros and 1 to 16 tokens, of bfloat16, INT8 and INT4 weights; and INT8
# over the better dense INT8 or FP8. Cards with slow memory are bound by it, the others by instructions.
PREDICTIONS = {
    "H100": {"bf16": (1.8, 2.2), "i8": (2.6, 3.2), "i4": (2.6, 2.8), "i8 over dense": (1.3, 1.8)},
    "H200": {"bf16": (1.3, 1.5), "i8": (1.8, 2.2), "i4": (1.8, 2.0), "i8 over dense": (0.9, 1.3)},
    "A100": {"bf16": (2.0, 2.4), "i8": (2.8, 3.4), "i4": (2.8, 3.0), "i8 over dense": (1.4, 1.7)},
    "L4": {"bf16": (2.5, 2.76), "i8": (4.2, 4.7), "i4": (6.2, 6.9), "i8 over dense": (2.1, 2.35)},
}
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (12288, 5376)]  # of 8 B models, as fused
ZEROS = [0.0, 0.5, 0.6, 0.7, 0.8, 0.9]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256]
NAMES = ("bf16", "i8", "i4")
CPU = torch.device("cpu")
ROTATION_BYTES = 200e6  # of distinct weights: four times the L2 cache of an H100
LAUNCHES, REPEATS = 20, 30
SANITIZER_SECONDS = 120
CACHED = 512  # tokens before the one that is decoded


class Measured(Stopwatch):
    """The device, what a time on it is, and where rows go."""

    def __init__(self, device: str, out: Path | None, *, tiny: bool) -> None:
        super().__init__(device)
        self.tiny, self._out, self.all_right = tiny, out, True

    def row(self, **found: Any) -> None:
        self.all_right &= found.get("right", True)
        line = json.dumps({"card": self.card, "torch": torch.__version__, **found})
        print(line, flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def seconds(self, functions: list[Callable[[], Any]]) -> float:
        """Of one of them: the median of repeats of a CUDA graph in which each is launched in turns."""
        launches = len(functions) if self.tiny else max(LAUNCHES, len(functions))
        return statistics.median(self.times(functions, launches, 2 if self.tiny else REPEATS))


# ---------------------------------------------------------------------------------------------------- correct


def correct(at: Measured) -> None:
    """40 shapes, in memory that is full of what is no number; the sanitizer; what the card can do."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010
    shapes = [
        (rows, columns, zeros, tokens)
        for rows, columns in [(16, 128), (40, 300), (1, 1), (4096, 4096), (1000, 14336)]
        for zeros, tokens in [
            (0, 1),
            (0.5, 7),
            (0.7, 16),
            (0.7, 64),
            (0.7, 100),
            (0.7, 300),
            (0.9, 33),
            (1, 5),
        ]
    ]
    for rows, columns, zeros, tokens in shapes[:24] if at.tiny else shapes:
        w_NK, x_TK = at.weights(rows, columns, zeros, 1), at.random(tokens, columns, seed=3)
        bits = {
            name: torch.equal(sparse(name, w_NK)(x_TK).cpu(), sparse(name, w_NK, CPU)(x_TK.cpu()))
            for name in ("i8", "i4")
        }
        bf16 = w_NK.bfloat16()
        y_TN, exact_TN = sparse("bf16", w_NK)(x_TK.bfloat16()), x_TK.bfloat16().double() @ bf16.double().T
        allowed_TN = 2**-8 * exact_TN.abs() + 1e-5 * (x_TK.double().abs() @ bf16.double().abs().T) + 1e-12
        error = float(((y_TN.double() - exact_TN).abs() / allowed_TN).max())
        at.row(run="correct", shape=[rows, columns], zeros=zeros, tokens=tokens, bits_equal=bits,
               bf16_error_over_allowed=error, right=all(bits.values()) and error <= 1)  # fmt: skip
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.use_deterministic_algorithms(False)
    if at.on_gpu:
        ceilings(at)
        sanitizer(at)


def sanitizer(at: Measured) -> None:
    """NVIDIA's checks of memory and of races, of small products, each tensor with memory of its own."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        at.row(run="sanitizer", found="compute-sanitizer is not on this machine")
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "small"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=SANITIZER_SECONDS
            )
        except subprocess.TimeoutExpired:
            at.row(run="sanitizer", check=check, found=f"not done after {SANITIZER_SECONDS} s")
        else:
            at.row(run="sanitizer", check=check, said=done.stdout.splitlines()[-1:],
                   exit_code=done.returncode, right=done.returncode == 0)  # fmt: skip


def small(at: Measured) -> None:
    """What the sanitizer watches."""
    for tokens in (5, 300):
        for name in NAMES:
            sparse(name, at.weights(64, 1024, 0.7, 1))(at.random(tokens, 1024).bfloat16())


def ceilings(at: Measured) -> None:
    """How fast the card reads, and copies."""
    for name, rates in at.rates(1 << 30, LAUNCHES, REPEATS).items():
        at.row(run="ceilings", **{f"{name}_gb_per_s": statistics.median(rates) / 1e9})


# ---------------------------------------------------------------------------------------------------- kernels


def kernels(at: Measured) -> None:
    """Each shape by zeros and tokens, beside dense products of the same run."""
    shapes = [(48, 512)] if at.tiny else SHAPES
    for rows, columns in shapes:
        dense = {
            (name, tokens): at.seconds(made)
            for tokens in (TOKENS[:2] if at.tiny else TOKENS)
            for name, made in dense_products(at, rows, columns, tokens)
        }
        for (name, tokens), seconds in dense.items():
            row(at, rows, columns, name, 0.0, tokens, seconds, {})
        for zeros in ZEROS[3:4] if at.tiny else ZEROS:
            for name in NAMES:
                layers = sparse_layers(at, rows, columns, name, zeros)
                for tokens in TOKENS[:2] if at.tiny else TOKENS:
                    x_TK = at.random(tokens, columns).bfloat16()
                    seconds = at.seconds([lambda it=it, x=x_TK: it(x) for it in layers])
                    over = {key: time / seconds for (key, of), time in dense.items() if of == tokens}
                    row(at, rows, columns, name, zeros, tokens, seconds, over,
                        is_dense=layers[0].is_dense,
                        bits_a_weight=8 * layers[0].num_bytes / (rows * columns))  # fmt: skip
    for name, found in PREDICTIONS.items():
        if re.search(rf"\b{name}\b", at.card):
            at.row(run="kernels", predicted=found)


def row(
    at: Measured, rows: int, columns: int, name: str, zeros: float, tokens: int, seconds: float,
    over: dict[str, float], **more: Any,
) -> None:  # fmt: skip
    at.row(run="kernels", shape=[rows, columns], weights=name, zeros=zeros, tokens=tokens,
           microseconds=1e6 * seconds, over=over, **more)  # fmt: skip


def sparse_layers(at: Measured, rows: int, columns: int, name: str, zeros: float) -> list[SparseLinear]:
    """As many as are more than the caches hold; with few zeros they are dense, as the operator has it."""
    made = list[SparseLinear]()
    while not made or (not at.tiny and sum(it.num_bytes for it in made) < ROTATION_BYTES):
        made.append(sparse(name, at.weights(rows, columns, zeros, 10 * len(made))))
    return made


def dense_products(
    at: Measured, rows: int, columns: int, tokens: int
) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """bfloat16; INT8 and FP8 without the rounding of inputs, as others quote them."""
    number = 1 if at.tiny else int(ROTATION_BYTES // (rows * columns)) + 1
    x_TK, bf16 = at.random(tokens, columns).bfloat16(), [
        at.random(rows, columns, seed=it).bfloat16() for it in range(number)
    ]  # fmt: skip
    yield "dense bf16", [lambda w=w: linear(x_TK, w) for w in bf16]
    q_TK = x_TK.clamp(-100, 100).to(torch.int8)
    q_TK = torch.cat([q_TK, q_TK.new_zeros(max(0, 32 - tokens), columns)])
    integers = [w.clamp(-100, 100).to(torch.int8).T for w in bf16]
    yield "dense i8", [lambda w=w: torch.ops.aten._int_mm(q_TK, w) for w in integers]
    if not at.on_gpu or torch.cuda.get_device_capability(at.device) < (8, 9):
        return
    one = torch.ones((), device=at.device)
    f8_TK = torch.cat([x_TK, x_TK.new_zeros(-tokens % 16, columns)]).to(torch.float8_e4m3fn)
    floats = [w.to(torch.float8_e4m3fn).T for w in bf16]
    how: dict[str, Any] = {
        "scale_a": one,
        "scale_b": one,
        "out_dtype": torch.bfloat16,
        "use_fast_accum": True,
    }
    yield "dense fp8", [lambda w=w: torch.ops.aten._scaled_mm(f8_TK, w, **how) for w in floats]


# ------------------------------------------------------------------------------------------------------ whole


def whole(at: Measured) -> None:
    """Tokens a second and memory of a decoder of 8 B weights, at 1, 8 and 16 sequences."""
    sizes = Sizes(64, 128, 2, 4, 2, 256) if at.tiny else Sizes()
    for values in (DENSE, *NAMES):
        decode(at, Decoder(at, sizes, values, 0.7))


@torch.no_grad()
def decode(at: Measured, decoder: Decoder) -> None:
    held = torch.cuda.memory_allocated(at.device) if at.on_gpu else 0
    for batch in (1, 8, 16):
        caches, x_BD = decoder.caches(batch, 16 if at.tiny else CACHED), decoder.inputs(batch)
        seconds = at.seconds([lambda x=x_BD, kept=caches: decoder.step(x, kept)])
        at.row(run="whole", weights=decoder.values, batch=batch, tokens_per_second=batch / seconds,
               bytes_held=held)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=["correct", "kernels", "whole", "small"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes and few repeats, to see that it runs"
    )
    given = parser.parse_args()
    run = {"correct": correct, "kernels": kernels, "whole": whole, "small": small}[given.run]
    at = Measured(given.device, given.out, tiny=given.tiny)
    run(at)
    sys.exit(0 if at.all_right else 1)


if __name__ == "__main__":
    main()
