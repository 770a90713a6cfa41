"""What comes back of the small Python Llama after pruning: `python recipes/recover_python_llama.py -o DIR`.

Runs the demo's path (`gossamer.runs.recovery`: prune 50%, pretrain, prune 70%, fine-tune with SquareHead,
INT8, pack) once a seed, and prints held-out perplexity and accuracy on unseen doctests beside the dense
model's.
"""

import argparse
import time
from pathlib import Path

from gossamer.runs.recovery import SHIPPED, Recovery, recover
from gossamer.stages.evaluate import Evaluate, evaluate

NUM_DOCTESTS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of a small Llama comes back after pruning to 70%.")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for seed in options.seeds:
        start = time.monotonic()
        models = recover(Recovery(seed=seed), options.model, options.output_dir / str(seed))
        print(f"seed {seed}: {time.monotonic() - start:.0f} s of pruning and training", flush=True)
        dense = 0.0
        for name in ("dense", "control", "one_shot", "recovered", "packed"):
            job = Evaluate(
                str(getattr(models, name)),
                dataset="python:stdlib:held-out",
                tasks=("doctest", "doctest-unseen"),
                backend="engine",
                limit=NUM_DOCTESTS,
                seed=100 + seed,
            )
            figures = evaluate(job)
            accuracy, unseen = figures.accuracy["doctest"], figures.accuracy["doctest-unseen"]
            dense = dense or accuracy
            print(
                f"  {name:10} perplexity {figures.perplexity:8.2f}   doctests {accuracy:6.1%}"
                f"   recovery {accuracy / dense:6.1%}   unseen kinds {unseen:6.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
