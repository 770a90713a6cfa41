"""Two builds of the engine on the same packed model, in turns: is the new one as fast as the one before?

    python benchmarks/builds.py BEFORE_PYTHON [--shape llama-3.2-1b --values i8 --sparsity 0.7]

BEFORE_PYTHON is the interpreter of an environment that holds the other build; this one runs the script. Each
build is a process of its own that keeps the model open and waits while the other one works. A round is a
prompt and a number of decode steps in either, the order changing from round to round; what is printed is the
median over the rounds of the ratio of times, before over now (above 1: now is faster), as a row of JSON.
"""

import argparse
import json
import subprocess
import sys
from statistics import median, quantiles

from gossamer import _native
from gossamer.machine import cpu_model, default_threads
from gossamer.measure.synthetic import Recipe, synthetic_file

WORKER = """
import sys, time
import numpy as np
from gossamer import Packed, _native
packed = Packed.open(sys.argv[1])
how = packed.native_tensors(), packed.native_config(), int(sys.argv[2]), "bf16"
model = _native.Model(packed.buffer, *how)
prompt, steps = int(sys.argv[3]), int(sys.argv[4])
rng = np.random.default_rng(0)
print("ready", flush=True)
for line in sys.stdin:
    sequence = model.new_sequence(prompt + steps)
    ids = rng.integers(0, packed.architecture.vocab_size, prompt).astype(np.int32)
    begin = time.perf_counter()
    chosen = model.forward([sequence], [ids]).argmax(axis=1).astype(np.int32)
    middle = time.perf_counter()
    for _ in range(steps):
        chosen = model.forward([sequence], [chosen]).argmax(axis=1).astype(np.int32)
    print(middle - begin, (time.perf_counter() - middle) / steps, flush=True)
"""


class Build:
    """A process of one interpreter with the model open."""

    def __init__(self, python: str, *arguments: object) -> None:
        command = [python, "-c", WORKER, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> list[float]:
        """The numbers of the next line; the first line has none."""
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        return [] if words == ["ready"] else [float(word) for word in words]

    def measure(self) -> list[float]:
        """Seconds of the prompt, and of a decode step."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--values", default="i8")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    path = synthetic_file(Recipe.of(given.shape, given.values, given.sparsity, given.layers))
    arguments = (path, default_threads(), given.prompt, given.steps)
    before, now = Build(given.before, *arguments), Build(sys.executable, *arguments)
    ratios: list[list[float]] = [[], []]
    for round in range(given.rounds + 1):
        order = (before, now) if round % 2 else (now, before)
        found = {build: build.measure() for build in order}
        for kind, ratio in enumerate(ratios):
            if round:  # the first one warms up
                ratio.append(found[before][kind] / found[now][kind])
    for kind, ratio in zip(("prompt", "decode"), ratios, strict=True):
        low, _, high = quantiles(ratio, n=4)
        row = vars(given) | {
            "kind": kind, "before_over_now": round_to(median(ratio)),
            "quartiles": [round_to(low), round_to(high)],
            "cpu": cpu_model(), "isa": _native.isa(), "threads": default_threads(),
        }  # fmt: skip
        row.pop("before")
        print(json.dumps(row))


def round_to(number: float) -> float:
    return round(number, 3)


if __name__ == "__main__":
    main()
