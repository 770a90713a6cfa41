"""The paper's whole run of Llama-2-7B to 70% zeros (arXiv 2405.03594), for a machine with several GPUs.

    python recipes/llama2_7b_70.py meta-llama/Llama-2-7b-hf -o OUT --calibration TEXT --processes 8 \
        --examples arithmetic=TRAIN.jsonl,TEST.jsonl chat=TRAIN.jsonl,TEST.jsonl ... --dry-run

Prune 50% -> pretrain on 45 B tokens -> prune 70% -> pretrain on 100 B, and for each task that has examples:
its dense teacher, fine-tuning beside it, INT8, pack, evaluate. Training runs under torchrun, shared by FSDP.
Finished steps are skipped. On several machines, which see the same files, give each the same command with
`--nnodes N --node-rank I --rdzv-endpoint HOST:PORT`. `--dry-run` prints for every step its command, memory,
time and cost, from our own measured rates, scaled, or from `--tokens-per-s`.
"""

import arithmetic
import chat
import coding
import instruction
import summarization
from one_task import examples_by_task, fail, parser, plan_or_run, sizes_of

from gossamer.errors import GossamerError
from gossamer.runs.recipe import examples_of, finetuned, pruned

TASKS = {module.TASK.name: module.TASK for module in (arithmetic, chat, coding, instruction, summarization)}
SPARSITY = 0.7


def main() -> None:
    options = parser("The paper's whole run of Llama-2-7B to 70% zeros.")
    options.add_argument("--examples", nargs="*", default=[], metavar="TASK=TRAIN,TEST")
    given = options.parse_args()
    output = given.output_dir
    try:
        sizes = sizes_of(given, SPARSITY)
        files = examples_by_task(given.examples, TASKS)
        if not given.dry_run:
            folder = output.with_name(f"{output.name}-examples")
            files = {name: examples_of(TASKS[name], each, folder / name) for name, each in files.items()}
        steps = pruned(given.model, output, given.calibration, given.dataset, sizes)
        sparse = steps[-1].output
        for name, each in files.items():
            steps += finetuned(TASKS[name], given.model, sparse, output, given.calibration, each, sizes)
        plan_or_run(steps, [(TASKS[name], each.test) for name, each in files.items()], given, sizes)
    except (GossamerError, OSError) as error:
        fail(options, error)


if __name__ == "__main__":
    main()
