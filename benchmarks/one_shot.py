"""What one-shot pruning costs: perplexity of texts, and plain questions, beside the parent and a peer.

    python benchmarks/one_shot.py MODEL --who dense --text FILE... --questions
    python benchmarks/one_shot.py MODEL --who llm-compressor --sparsity 0.5 --text FILE... --questions
    python benchmarks/one_shot.py MODEL --who gossamer --sparsity 0.5 --text FILE... --questions
    python benchmarks/one_shot.py --report

MODEL is a checkpoint directory or a .goss file; each run adds a row to docs/results/one_shot.jsonl. `--limit`
takes that many rows of 255 tokens of each text. `--questions` asks the twenty of questions.jsonl, greedily,
through the engine. `--report` prints, of the newest rows, ln(perplexity / dense), ours over the peer's, and
how many of the questions that the parent answers rightly the pruned model does too.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from results import RESULTS, write_row

from gossamer.engine.llm import LLM
from gossamer.engine.sampling import SamplingParams
from gossamer.stages.evaluate import Evaluate, evaluate

QUESTIONS = Path(__file__).with_name("questions.jsonl")
MAX_TOKENS = 48


def answers(model: str) -> list[tuple[str, bool]]:
    """Each question's answer, and whether one of the words it must have is in it."""
    asked = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    llm, params = LLM(model), SamplingParams(max_tokens=MAX_TOKENS)
    texts = [llm.chat([{"role": "user", "content": row["question"]}], params).text for row in asked]
    return [
        (text, any(word.lower() in text.lower() for word in row["answers"]))
        for text, row in zip(texts, asked, strict=True)
    ]


def report() -> None:
    """The newest row of each model, against the parent's and the peer's of the same sparsity."""
    lines = (RESULTS / "one_shot.jsonl").read_text(encoding="utf-8").splitlines()
    rows: dict[tuple[str, float], dict[str, Any]] = {
        (row["who"], row["sparsity"]): row for row in map(json.loads, lines)
    }
    dense = rows["dense", 0.0]
    for (who, sparsity), row in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0])):
        peer, cells = rows.get(("llm-compressor", sparsity)), []
        for text, perplexity in row["perplexity"].items():
            lost = math.log(perplexity / dense["perplexity"][text])
            cell = f"{text} {perplexity:.2f} (ln {lost:.3f}"
            if peer and peer is not row:
                cell += f", {lost / math.log(peer['perplexity'][text] / dense['perplexity'][text]):.2f}x"
            cells.append(f"{cell})")
        if row["answers"] and dense["answers"]:
            known = [
                ours[1] for ours, parent in zip(row["answers"], dense["answers"], strict=True) if parent[1]
            ]
            cells.append(f"{sum(known)} of {len(known)} answers")
        print(f"{who} {sparsity:.0%}: {'; '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--who")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--questions", action="store_true")
    parser.add_argument("--report", action="store_true")
    job = parser.parse_args()
    if job.report:
        report()
        return
    found = {
        Path(text).stem: evaluate(Evaluate(job.model, dataset=text, limit=job.limit)).perplexity
        for text in job.text
    }
    row = {"who": job.who, "sparsity": job.sparsity, "limit": job.limit, "perplexity": found}
    write_row("one_shot", row | {"answers": answers(job.model) if job.questions else []})


if __name__ == "__main__":
    main()
