"""What comes back of the small Python Llama after pruning: `python recipes/recover_python_llama.py -o DIR`.

The smaller of the two studies of recovery: some minutes a seed on two cores, with the model that ships with
the package. Runs the demo's path (`gossamer.runs.recovery`: prune 50%, pretrain, prune 70%, fine-tune with
SquareHead, INT8, pack), and what it is to be compared with: the dense model trained on the same tokens; 70%
in one shot; the path without its teacher; and fine-tuning alone, with the teacher, on more tokens than the
path has in all. Prints held-out perplexity and accuracy on unseen doctests, a line a model, and in the end
their means over the seeds with the spread (standard deviation). A seed that is finished is not done again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from gossamer.allocator import keep_freed_memory
from gossamer.runs.recovery import SHIPPED, WHOLE, Models, Recovery, finetune_with_replay, plan, recover
from gossamer.stages.evaluate import Evaluate, evaluate

NUM_DOCTESTS = 1000
FIGURES = ("perplexity", "doctests", "recovery", "unseen kinds")


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of a small Llama comes back after pruning to 70%.")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    keep_freed_memory()
    results = options.output_dir / "results.jsonl"
    for seed in options.seeds:
        folder = options.output_dir / str(seed)
        if any(row["seed"] == seed for row in read(results)):
            continue
        start, models = time.monotonic(), train(options.model, folder, seed)
        print(f"seed {seed}: {time.monotonic() - start:.0f} s of pruning and training", flush=True)
        rows = measure(models, seed)
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    summarize([row for row in read(results) if row["seed"] in options.seeds])


def train(dense: Path, folder: Path, seed: int) -> dict[str, Path]:
    """The models of one seed, by what was done to them."""
    job = Recovery(seed=seed)
    models = recover(job, dense, folder)
    jobs = plan(job, Models.under(folder, dense), folder)
    alone, untaught = folder / "finetuned-alone-70", folder / "no-teacher-70"
    finetune_with_replay(
        replace(jobs.finetune, model=str(models.one_shot), output_dir=str(alone), num_train_epochs=2), WHOLE
    )
    finetune_with_replay(
        replace(jobs.finetune, output_dir=str(untaught), teacher=None, distill="none"), WHOLE
    )
    return {
        "dense": dense,
        "dense, trained": models.control,
        "70%, one shot": models.one_shot,
        "70%, fine-tuned alone": alone,
        "70%, no teacher": untaught,
        "70%, recovered": models.recovered,
        "70%, recovered, INT8": models.packed,
    }


def measure(models: dict[str, Path], seed: int) -> list[dict[str, float | int | str]]:
    """A row a model; the doctests are new ones for each seed, and the same for its models."""
    rows: list[dict[str, float | int | str]] = []
    dense = 0.0
    for name, path in models.items():
        job = Evaluate(
            str(path),
            dataset="python:stdlib:held-out",
            tasks=("doctest", "doctest-unseen"),
            backend="engine",
            limit=NUM_DOCTESTS,
            seed=100 + seed,
        )
        found = evaluate(job)
        assert found.perplexity is not None
        accuracy = found.accuracy["doctest"]
        dense = dense or accuracy
        figures = (found.perplexity, accuracy, accuracy / dense, found.accuracy["doctest-unseen"])
        rows.append({"seed": seed, "model": name} | dict(zip(FIGURES, figures, strict=True)))
        print(name, *(f"{figure} {rows[-1][figure]:.4g}" for figure in FIGURES), sep="  ", flush=True)
    return rows


def read(results: Path) -> list[dict[str, float | int | str]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def summarize(rows: list[dict[str, float | int | str]]) -> None:
    """Means over the seeds, and what the seeds differ by."""
    print(f"\n{'mean (spread) over seeds':26}", *(f"{figure:>18}" for figure in FIGURES))
    for name in dict.fromkeys(row["model"] for row in rows):
        line = f"{name:26}"
        for figure in FIGURES:
            values = [float(row[figure]) for row in rows if row["model"] == name]
            spread = stdev(values) if len(values) > 1 else 0.0
            line += f" {mean(values):10.3f} ({spread:.3f})"
        print(line)


if __name__ == "__main__":
    main()
