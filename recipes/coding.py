"""Code, as in the paper: evol-codealpaca, 5e-4 falling as a cosine, 1 to 3 epochs; HumanEval judges."""

from one_task import main

from gossamer.runs.recipe import Task

TASK = Task(
    name="code",
    format="instruct",
    example=lambda row: {"instruction": row["instruction"], "output": row.get("output") or row["response"]},
    kind="code",
    question=lambda row: row,
    learning_rate={0.0: 1e-4, 0.5: 5e-4, 0.7: 5e-4},  # the table has none for the dense model: ours
    epochs={0.0: 2, 0.5: 2, 0.7: 3},
    lr_schedule="cosine",
)

if __name__ == "__main__":
    main(TASK, __doc__)
