"""Gossamer in the same terms as its peers: a whole synthetic model, and a stack of wide linears."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import median, pstdev
from typing import Any, get_args

from stack import NAME, Row, options, print_rows

from gossamer import _native
from gossamer.tools.bench import Bench, bench
from gossamer.tools.synthetic import CONFIGS, Recipe, Shape, Values, synthetic_image

STACK_LAYERS = {"f32": 2, "bf16": 4, "i8": 6, "i4": 8}  # > 300 MB each at 70% zeros
MAX_TOKENS = 256  # that the engine passes through a layer at once


def who(values: Values, sparsity: float, threads: int) -> Row:
    about = {"peer": "gossamer", "version": version("gossamer"), "isa": _native.isa()}
    return about | {"what": f"{values}, {sparsity:.0%} zeros", "threads": threads}


def measure(
    shape: Shape, values: Values, sparsity: float, threads: int, repeats: int, prompt: int, new: int
) -> Iterator[Row]:
    """Two rows as llama-bench has them: a prompt, and decoding from an almost empty context."""
    job = Bench(shape=shape, values=values, sparsity=sparsity, threads=threads, repeats=repeats)
    row = who(values, sparsity, threads) | {"shape": shape, "repeats": repeats}
    found = bench(replace(job, prompt=prompt, new=1))
    about = {"tokens": prompt, "weight_bytes": found.step_bytes}
    yield row | about | {"tokens_per_s": found.prompt_tokens_per_s}
    found = bench(replace(job, prompt=1, new=new))
    yield row | {
        "tokens": 1,
        "tokens_per_s": found.decode_tokens_per_s,
        "step_p99_s": found.step_p99_s,
        "weight_bytes": found.step_bytes,
        "gb_per_s": found.gb_per_s,
    }


@dataclass(frozen=True)
class StackRecipe(Recipe):
    """Layers of llama-2-7b's width whose attention has one small head: 97% of weights are 4096 x 11008."""

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 256}


def ours_stack(
    values: Values, sparsity: float, tokens: list[int], threads: int, repeats: int
) -> Iterator[Row]:
    """Rows of the stack, one for each number of tokens; more than 256 pass in blocks, as in a prompt."""
    image = synthetic_image(StackRecipe("llama-2-7b", values, sparsity, STACK_LAYERS[values], vocabulary=256))
    model = _native.Model(image.buffer, image.tensors, image.config, threads)
    matrices = [entry for name, entry in image.config["linears"].items() if ".layers." in name]
    num_weights = sum(entry["rows"] * entry["columns"] for entry in matrices)
    for count in tokens:
        whole, rest = divmod(count, MAX_TOKENS)
        blocks = [MAX_TOKENS] * whole + [rest] * (rest > 0)
        passes = [model.time_linears(repeats + 2, block)[2:] for block in blocks]
        seconds = [sum(times) for times in zip(*passes, strict=True)]
        middle = median(seconds)
        yield who(values, sparsity, threads) | {
            "shape": NAME,
            "tokens": count,
            "num_weights": num_weights,
            "repeats": repeats,
            "seconds": middle,
            "deviation_s": pstdev(seconds),
            "tops": 2 * count * num_weights / middle / 1e12,
            "weight_bytes": image.num_bytes,
            "gb_per_s": image.num_bytes / middle / 1e9 if count == 1 else None,
        }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("part", choices=("model", "stack"))
    parser.add_argument("--shape", choices=CONFIGS, default="tinyllama-1.1b")
    parser.add_argument("--values", choices=get_args(Values), default="i8")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    job = parser.parse_args()
    about = {"threads": job.threads, "repeats": job.repeats}
    if job.part == "model":
        print_rows(measure(job.shape, job.values, job.sparsity, prompt=job.prompt, new=job.new, **about))
    else:
        print_rows(ours_stack(job.values, job.sparsity, job.tokens, **about))


if __name__ == "__main__":
    main()
