"""An encoder's body under a new head, which fine-tuning begins with where a model has none for the classes.

It is a `Checkpoint` whose tensors of the body lie in the parent's files and whose head is in memory, so that
masks, lineage, checkpoints and the written directory are those of any other fine-tuning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gossamer.architecture.anatomy import Task
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.weights import STORAGE, Entry, read_header
from gossamer.data.supervised import read_classes
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError
from gossamer.job.report import Event, Progress
from gossamer.modules.decoder import TORCH_DTYPE, model_config, refuse_quantized
from gossamer.training.by_task import FORMATS
from gossamer.training.parallel import from_first
from gossamer.training.whole_model import CLASSES, new_model

if TYPE_CHECKING:
    from gossamer.stages.finetune import Finetune

# Of the companions those that say what another head made of the body.
_OF_ANOTHER_HEAD = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/*",
    "README.md",
)


@dataclass(frozen=True)
class InMemory(Entry):
    """A tensor that is in no file yet; `file` is the directory whose body it is made for."""

    value: np.ndarray

    def array(self) -> np.ndarray:
        return self.value


def with_suiting_head(job: "Finetune", source: Checkpoint, progress: Progress) -> Checkpoint:
    """The model to begin with: `source`, or its body under a new head for the classes of the examples.

    A head of the kind that the format needs is kept, unless --new-head asks for another. Raises ConfigError
    for classes that are none.
    """
    tasks: dict[str, Task] = {it: task for task, it in FORMATS.items() if task != "embedding"}
    if job.format not in tasks:
        if job.new_head:
            raise ConfigError(
                f"--new-head with --format {job.format}; expected one of {', '.join(tasks)}, which have heads"
            )
        return source
    anatomy, task = source.architecture, tasks[job.format]
    if not anatomy.is_encoder or (anatomy.task == task and not job.new_head):
        return source
    refuse_quantized(source)
    names, what = [], "both ends of answers"
    if task != "spans":
        bad = BadRows(job.skip_bad_rows)
        names = from_first(lambda: read_classes(job.dataset, job.format, bad, offline=job.offline))
        what = f"{len(names)} classes ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
    why = "--new-head" if anatomy.task == task else f"{source.path} is for {anatomy.task}"
    note = f"a new head of random weights for {what}: {why}"
    progress(Event("finetune", note, lasting=True))
    return with_new_head(source, task, names, job.seed)


def with_new_head(source: Checkpoint, task: Task, names: Sequence[str], seed: int) -> Checkpoint:
    """The body of `source` under a head for `task`, with classes of these names (none of `spans`).

    A pooler that the head reads is kept where the files have one, though the parent's class may not read it.
    All other weights are as transformers makes them by `seed`, in the dtype of the embedding.
    """
    config = _config(source, task, names)
    child = Checkpoint(source.path, config, {})
    child.hash, child.downloaded = source.hash, source.downloaded  # of the parent that is recorded
    files = {entry.file for entry in source.entries.values()}
    found = {name: it for file in files for name, it in read_header(file).items()}
    found.update(source.entries)
    body = child.architecture.embedding.split(".")[0] + "."
    if not source.architecture.embedding.startswith(body):
        found = {f"{body}{name}": entry for name, entry in found.items()}
    kept = {name: entry for name, entry in found.items() if name.startswith(body)}
    missing = {
        name: shape
        for name, shape in child.architecture.tensor_shapes.items()
        if name not in kept or kept[name].shape != shape or kept[name].dtype not in STORAGE
    }
    made = _made(child, missing, seed, source.dtype(f"{source.architecture.embedding}.weight"))
    child.entries = {name: made.get(name) or kept[name] for name in child.architecture.tensor_shapes}
    return child


def leave_out_what_another_head_made(directory: Path) -> None:
    """Remove companions that would say of a model under a new head what it was before."""
    for file in (it for pattern in _OF_ANOTHER_HEAD for it in [*directory.glob(pattern)] if it.is_file()):
        file.unlink()
        if file.parent != directory and not any(file.parent.iterdir()):
            file.parent.rmdir()


def _config(source: Checkpoint, task: Task, names: Sequence[str]) -> dict[str, Any]:
    kind = CLASSES[task]._model_mapping[type(model_config(source.architecture, source.config))]
    left_out = {"num_labels", "problem_type", "sentence_transformers", "id2label", "label2id"}
    classes = {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    return {
        **{key: value for key, value in source.config.items() if key not in left_out},
        "architectures": [kind.__name__],
        **(classes if names else {}),
    }


def _made(
    child: Checkpoint, shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: str
) -> dict[str, InMemory]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights: dict[str, Tensor] = new_model(child.architecture, child.config).state_dict()
    made = {}
    for name in shapes:
        weight = weights[name].to(TORCH_DTYPE[dtype])
        stored = (weight.view(torch.uint16) if dtype == "BF16" else weight).numpy().copy()
        made[name] = InMemory(child.path, dtype, stored.shape, 0, stored.nbytes, stored)
    return made
