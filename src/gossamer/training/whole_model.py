"""A whole model as transformers has it: made of a checkpoint to be trained, and written to another."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from gossamer.architecture.anatomy import Anatomy, Task
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.checkpoint.partial import holds_checkpoint
from gossamer.job.options import record
from gossamer.job.processes import is_first
from gossamer.modules.decoder import model_config, refuse_quantized, tensor, write_tensor
from gossamer.modules.unfused import unfuse
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import decoder_layers

CLASSES: dict[Task, Any] = {
    "generation": AutoModelForCausalLM,
    "embedding": AutoModel,
    "masked": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "spans": AutoModelForQuestionAnswering,
}


def new_model(
    anatomy: Anatomy, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """transformers' model of a `config.json`, on the CPU, with weights that are still to be filled in.

    Linears that files hold as one are modules of their own. An encoder leaves nothing to chance: a sparse one
    has no weights to spare for dropout.
    """
    settings = model_config(anatomy, config)
    settings.dtype = dtype
    if anatomy.is_encoder:
        settings.attention_dropout = 0.0
    model = CLASSES[anatomy.task].from_config(settings)
    nn.Module.to(model, dtype)
    for layer, block in zip(decoder_layers(model), anatomy.blocks, strict=True):
        unfuse(layer, block)
    for module in model.modules() if anatomy.is_encoder else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def load_model(source: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model in `dtype`, on the CPU; raises UnsupportedError for a quantized directory."""
    refuse_quantized(source)
    model = new_model(source.architecture, source.config, dtype)
    if source.architecture.optional.keys() - {*source.names}:
        model.pooler = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor(source, name))
    return model


@contextlib.contextmanager
def derive_in_first(
    source: Checkpoint, job: TrainingOptions, stage: str, kept: str | None = None
) -> Iterator[Derived]:
    """The child directory that all processes of a run share: the first one writes it.

    The others go through the same motions with one that stores nothing. Where a run fails before its first
    checkpoint, the folder of the file `kept` stays as `OUT.partial.<folder>` if that is there, and the next
    run finds it in its place. Raises what `Checkpoint.derive` does.
    """
    output = Path(job.output_dir)
    if is_first():
        with source.derive(output, job, stage=stage, overwrite=job.overwrite, resume=job.resume) as target:
            if kept is None:
                yield target
                return
            folder = (target.path / kept).parent
            aside = target.path.with_name(f"{target.path.name}.{folder.name}")
            if (aside / Path(kept).name).is_file() and not folder.exists():
                aside.rename(folder)
            try:
                yield target
            except BaseException:
                if (target.path / kept).is_file() and not holds_checkpoint(target.path):
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                raise
    else:
        yield WrittenElsewhere(source, output, output.with_name(output.name + ".partial"), record(job), stage)


class WrittenElsewhere(Derived):
    """A child directory as the processes see it that do not write it."""

    def write(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Store nothing."""


def write_model(model: PreTrainedModel, target: Derived) -> None:
    """Store every weight under its Hugging Face name, in the parent's dtypes; shards are gathered."""
    weights = model.state_dict()
    for name in target.parent.names:
        weight = weights[name]
        write_tensor(target, name, weight.full_tensor() if isinstance(weight, DTensor) else weight)
