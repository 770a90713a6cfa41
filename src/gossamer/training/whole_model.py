"""A whole model as transformers has it: made of a checkpoint to be trained, and written to another."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.decoder import model_config, refuse_quantized, tensor, write_tensor
from gossamer.job.options import record
from gossamer.job.processes import is_first
from gossamer.training.options import TrainingOptions
from gossamer.unfused import unfuse


def new_model(
    anatomy: Anatomy, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """transformers' model of a `config.json`, on the CPU, with weights that are still to be filled in.

    Linears that files hold as one are modules of their own.
    """
    settings = model_config(anatomy, config)
    settings.dtype = dtype
    model = AutoModelForCausalLM.from_config(settings)
    nn.Module.to(model, dtype)
    layers: Any = model.get_decoder().layers
    for layer, block in zip(layers, anatomy.blocks, strict=True):
        unfuse(layer, block)
    return model.eval()


def load_model(source: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model in `dtype`, on the CPU; raises UnsupportedError for a quantized directory."""
    refuse_quantized(source)
    model = new_model(source.architecture, source.config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor(source, name))
    return model


@contextlib.contextmanager
def derive_in_first(
    source: Checkpoint, job: TrainingOptions, stage: str, kept: str | None = None
) -> Iterator[Derived]:
    """The child directory that all processes of a run share: the first one writes it.

    The others go through the same motions with one that stores nothing. `kept` is `Checkpoint.derive`'s, and
    so is what is raised.
    """
    if is_first():
        with source.derive(
            job.output_dir, job, stage=stage, overwrite=job.overwrite, resume=job.resume, kept=kept
        ) as target:
            yield target
    else:
        output = Path(job.output_dir)
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
