"""oBERTa's way (arXiv 2303.17612): an encoder pruned while it is pretrained, then tuned for seven tasks.

    python recipes/oberta.py FacebookAI/roberta-base -o OUT --dataset TEXT.jsonl \
        --examples sst2=TRAIN.jsonl,TEST.jsonl mnli=TRAIN.jsonl,TEST.jsonl --dry-run

Upstream: three epochs, zeros from 70 to 90% by a cubic, a learning rate of 12 cycles, the dense model's
logits alone (hardness 1, temperature 5.5). Each task: its dense teacher, eight epochs beside it at 1.5e-4
with zeros fixed and the embeddings frozen, INT8, pack, evaluate. `--also-free`: once more with embeddings
that are trained, which the paper advises against. Rows have the fields of GLUE, SQuAD,
IMDB and CoNLL's data sets.
"""

from collections.abc import Mapping
from typing import Any

from encoder_program import Arm, examples, parser, plan_or_run, sizes_of, transfers
from one_task import fail

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import GossamerError
from gossamer.runs.encoder_recipe import EncoderSizes, EncoderTask, dense_teacher, upstream

CONLL = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")  # by number


def classes(text: str, text2: str | None = None) -> Any:
    """A conversion of rows of those fields; GLUE's rows without a label (-1) are left out."""

    def example(row: Mapping[str, Any]) -> dict[str, Any] | None:
        if row["label"] == -1:
            return None
        second = {} if text2 is None else {"text2": row[text2]}
        return {"text": row[text], **second, "label": row["label"]}

    return example


def tagged(row: Mapping[str, Any]) -> dict[str, Any]:
    """CoNLL-2003: tags are numbers, or names under `labels`."""
    labels = row["labels"] if "labels" in row else [CONLL[it] for it in row["ner_tags"]]
    return {"tokens": row["tokens"], "labels": labels}


TASKS = {
    task.name: task
    for task in (
        EncoderTask("squad", "qa", "qa", dict),
        EncoderTask("squad_v2", "qa", "qa", dict),
        EncoderTask("mnli", "classification", "classification", classes("premise", "hypothesis")),
        EncoderTask("qqp", "classification", "classification", classes("question1", "question2")),
        EncoderTask("sst2", "classification", "classification", classes("sentence")),
        EncoderTask("imdb", "classification", "classification", classes("text")),
        EncoderTask("conll2003", "tokens", "tokens", tagged),
    )
}


def main() -> None:
    options = parser(__doc__, EncoderSizes())
    options.add_argument("--also-free", action="store_true", help="a transfer that trains embeddings, too")
    given = options.parse_args()
    try:
        sizes, calibration = sizes_of(given, EncoderSizes()), given.calibration or given.dataset
        head, output = Checkpoint.open(given.model).architecture.task, given.output_dir
        pruned = output / "pruned"
        steps = [upstream(given.model, pruned, given.dataset, head, sizes)]
        arms: list[Arm] = []
        for name, files in examples(given, TASKS).items():
            task, teacher = TASKS[name], output / name / "teacher"
            steps.append(dense_teacher(task, given.model, files, teacher, sizes))
            arms.append(Arm(task, "dense", [teacher], files.test))
            for freeze in ("embeddings", "nothing") if given.also_free else ("embeddings",):
                said = f"{freeze} frozen"
                some, arm = transfers(given, task, files, sizes, pruned, freeze, said, calibration, freeze)
                steps += some
                arms.append(arm)
        plan_or_run(given, steps, arms)
    except (GossamerError, OSError) as error:
        fail(options, error)


if __name__ == "__main__":
    main()
