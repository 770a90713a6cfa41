"""Sparse*BERT's way (arXiv 2205.12452): a sparse general encoder goes on to the text of a field.

    python recipes/sparse_bert.py google-bert/bert-base-uncased -o OUT --dataset WIKI.jsonl \
        --field-dataset PUBMED.jsonl --examples bc5cdr=TRAIN.tsv,TEST.tsv --seeds 0 1 2 --dry-run

Gradual magnitude pruning while the model is pretrained on general text; then the same sparse model on text of
the field, with its zeros fixed. Each task is tuned from both, beside its dense teacher, so that the table
shows what the field's text gave. Rows are CoNLL's columns, or `tokens` and `labels`.
"""

from collections.abc import Mapping
from typing import Any

from encoder_program import Arm, examples, parser, plan_or_run, sizes_of, transfers
from one_task import fail

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import GossamerError
from gossamer.runs.encoder_recipe import (
    EncoderSizes,
    EncoderTask,
    continued,
    dense_teacher,
    upstream,
)

SIZES = EncoderSizes(begin_sparsity=0.0, lr_cycles=1, num_cuts=100, prune_until=0.8)


def tagged(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokens": row["tokens"], "labels": row["labels"]}


TASKS = {name: EncoderTask(name, "tokens", "tokens", tagged) for name in ("bc5cdr", "ncbi", "bc2gm", "ner")}


def main() -> None:
    options = parser(__doc__, SIZES)
    options.add_argument(
        "--field-dataset", nargs="+", required=True, help="text of the field: SRC[@WEIGHT]..."
    )
    given = options.parse_args()
    try:
        sizes, calibration = sizes_of(given, SIZES), given.calibration or given.field_dataset
        head, output = Checkpoint.open(given.model).architecture.task, given.output_dir
        sparse = {"general": output / "general", "field": output / "field"}
        steps = [
            upstream(given.model, sparse["general"], given.dataset, head, sizes),
            continued(sparse["general"], given.model, sparse["field"], given.field_dataset, head, sizes),
        ]
        arms: list[Arm] = []
        for name, files in examples(given, TASKS).items():
            task, teacher = TASKS[name], output / name / "teacher"
            steps.append(dense_teacher(task, given.model, files, teacher, sizes))
            arms.append(Arm(task, "dense", [teacher], files.test))
            for kind, model in sparse.items():
                some, arm = transfers(given, task, files, sizes, model, kind, kind, calibration)
                steps += some
                arms.append(arm)
        plan_or_run(given, steps, arms)
    except (GossamerError, OSError) as error:
        fail(options, error)


if __name__ == "__main__":
    main()
