"""A whole model as transformers has it: made of a checkpoint to be trained, and written to another."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.directory import Checkpoint, Derived
from gossamer.decoder import model_config, refuse_quantized, tensor, write_tensor


def new_model(
    anatomy: Anatomy, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """transformers' model of a `config.json`, on the CPU, with weights that are still to be filled in."""
    settings = model_config(anatomy, config)
    settings.dtype = dtype
    model = AutoModelForCausalLM.from_config(settings)
    nn.Module.to(model, dtype)
    return model.eval()


def load_model(source: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The whole model in `dtype`, on the CPU; raises UnsupportedError for a quantized directory."""
    refuse_quantized(source)
    model = new_model(source.architecture, source.config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor(source, name))
    return model


def write_model(model: PreTrainedModel, target: Derived) -> None:
    """Store every weight under its Hugging Face name, in the parent's dtypes; shards are gathered."""
    weights = model.state_dict()
    for name in target.parent.names:
        weight = weights[name]
        write_tensor(target, name, weight.full_tensor() if isinstance(weight, DTensor) else weight)
