"""Gossamer in the same terms as its peers: a whole synthetic model, and a stack of wide linears."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median, pstdev
from typing import Literal, get_args

from stack import NAME, Row, options, print_rows

from gossamer import _native
from gossamer.measure.synthetic import CONFIGS, Shape, Values
from gossamer.tools.bench import Bench, bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.wide import num_weights, stack

Pattern = Literal["unstructured", "1x4"]
UNSTRUCTURED: Pattern = "unstructured"
MAX_TOKENS = 256  # that the engine passes through a layer at once


def who(values: Values, sparsity: float, pattern: str, threads: int) -> Row:
    about = {"peer": "gossamer", "version": version("gossamer"), "isa": _native.isa()}
    zeros = f"{sparsity:.0%} zeros" + f" in {pattern}" * (pattern != UNSTRUCTURED)
    return about | {"what": f"{values}, {zeros}", "threads": threads}


def measure(
    shape: Shape,
    values: Values,
    sparsity: float,
    pattern: Pattern,
    threads: int,
    repeats: int,
    prompt: int,
    new: int,
) -> Iterator[Row]:
    """Two rows as llama-bench has them: a prompt, and decoding from an almost empty context."""
    job = Bench(shape=shape, values=(values,), sparsity=(sparsity,), pattern=pattern)
    job = replace(job, threads=threads, repeats=repeats)
    row = who(values, sparsity, pattern, threads) | {"shape": shape, "repeats": repeats}
    found = bench(replace(job, prompt=(prompt,), new=1)).row
    about = {"tokens": prompt, "weight_bytes": found.step_bytes - found.kv_bytes}
    yield row | about | {"tokens_per_s": found.prompt_tokens_per_s}
    found = bench(replace(job, prompt=(1,), new=new)).row
    yield row | {
        "tokens": 1,
        "tokens_per_s": found.decode_tokens_per_s,
        "step_p99_s": found.step_p99_s,
        "weight_bytes": found.step_bytes - found.kv_bytes,
        "gb_per_s": found.gb_per_s,
    }


def ours_stack(
    values: Values, sparsity: float, tokens: list[int], threads: int, repeats: int
) -> Iterator[Row]:
    """Rows of the stack, one for each number of tokens; more than 256 pass in blocks, as in a prompt."""
    image = stack(values, sparsity)
    model = _native.Model(image.buffer, image.tensors, image.config, threads)
    weights = num_weights(image)
    for count in tokens:
        whole, rest = divmod(count, MAX_TOKENS)
        blocks = [MAX_TOKENS] * whole + [rest] * (rest > 0)
        passes = [model.time_linears(repeats + 2, block)[2:] for block in blocks]
        seconds = [sum(times) for times in zip(*passes, strict=True)]
        middle = median(seconds)
        yield who(values, sparsity, UNSTRUCTURED, threads) | {
            "shape": NAME,
            "tokens": count,
            "num_weights": weights,
            "repeats": repeats,
            "seconds": middle,
            "deviation_s": pstdev(seconds),
            "tops": 2 * count * weights / middle / 1e12,
            "weight_bytes": image.num_bytes,
            "gb_per_s": image.num_bytes / middle / 1e9 if count == 1 else None,
        }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("part", choices=("model", "stack"))
    parser.add_argument("--shape", choices=CONFIGS, default="tinyllama-1.1b")
    parser.add_argument("--values", choices=get_args(Values), default="i8")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--pattern", choices=get_args(Pattern), default=UNSTRUCTURED, help="of a model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    job = parser.parse_args()
    about = {"threads": job.threads, "repeats": job.repeats}
    if job.part == "model":
        kind = (job.shape, job.values, job.sparsity, job.pattern)
        print_rows(measure(*kind, prompt=job.prompt, new=job.new, **about))
    else:
        print_rows(ours_stack(job.values, job.sparsity, job.tokens, **about))


if __name__ == "__main__":
    main()
