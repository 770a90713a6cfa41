"""What one-shot pruning costs a model: perplexity of texts, and plain questions, beside the dense parent.

    python benchmarks/one_shot.py DENSE NAME=MODEL... --text FILE... [--questions]

DENSE and each MODEL is a checkpoint directory or a .goss file. Of each text the perplexity and its distance
ln(perplexity / dense) are printed; the last column says how large that is against the first MODEL's, so name
the peer first. `--questions` asks the twenty of questions.jsonl, greedily, through the engine (a directory is
packed into the cache), and counts those that DENSE answers rightly.
"""

import argparse
import json
import math
from pathlib import Path

from results import write_row

from gossamer.engine.llm import LLM
from gossamer.engine.sampling import SamplingParams
from gossamer.stages.evaluate import Evaluate, evaluate

QUESTIONS = Path(__file__).with_name("questions.jsonl")
MAX_TOKENS = 48


def perplexities(model: str, texts: list[str], limit: int) -> dict[str, float]:
    """Of rows of 255 tokens after the BOS, at most `limit` of each text (0: all), text by text."""
    found = {}
    for text in texts:
        perplexity = evaluate(Evaluate(model, dataset=text, limit=limit)).perplexity
        assert perplexity is not None
        found[Path(text).stem] = perplexity
    return found


def answers(model: str) -> list[tuple[str, bool]]:
    """Each question's answer, and whether one of the words it must have is in it."""
    asked = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    llm, params = LLM(model), SamplingParams(max_tokens=MAX_TOKENS)
    texts = [llm.chat([{"role": "user", "content": row["question"]}], params).text for row in asked]
    return [
        (text, any(word.lower() in text.lower() for word in row["answers"]))
        for text, row in zip(texts, asked, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=0, help="rows of each text; 0: all")
    parser.add_argument("--questions", action="store_true")
    job = parser.parse_args()
    dense, peer = perplexities(job.dense, job.text, job.limit), None
    known = answers(job.dense) if job.questions else []
    for name, model in (given.split("=", 1) for given in job.models):
        found = perplexities(model, job.text, job.limit)
        lost = {text: math.log(found[text] / dense[text]) for text in found}
        peer = peer or lost
        row = {"model": name, "limit": job.limit, "dense": dense, "perplexity": found, "lost": lost}
        row |= {"of_the_first": {text: lost[text] / peer[text] for text in lost}}
        if known:
            ours = answers(model)
            kept = [right for (_, right), (_, parent) in zip(ours, known, strict=True) if parent]
            row |= {"questions": len(known), "parent_right": len(kept), "kept": sum(kept), "answers": ours}
        write_row("one_shot", row)


if __name__ == "__main__":
    main()
