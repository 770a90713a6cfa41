"""torch.compile on a GPU: between two products there is a kernel or two instead of dozens.

Norms, rotations, casts and losses read and write all hidden states, or all logits, in float32, each step on
its own; on an H200 that took three times as long as the products (docs/LOG.md). A CPU keeps eager mode: there
native losses and attention of short rows do most of this already, and a run may be shorter than compiling.
torch's own TORCHDYNAMO_DISABLE=1 turns it off.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gossamer.training.parallel import decoder_layers

COMPILING = (
    "compiling the layers for this GPU: the first step may take a minute (TORCHDYNAMO_DISABLE=1: eager)"
)
Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def compiles(device: str) -> bool:
    """Whether torch can compile for the device: Triton and the C compiler that it calls are there."""
    if device != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    names = (os.environ.get("CC"), "gcc", "clang")
    return any(shutil.which(name) is not None for name in names if name)


def fused(function: Function, device: str) -> Function:
    """The function, compiled where `compiles` says so; it is compiled once a process."""
    return cast(Function, _compiled(function)) if compiles(device) else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def compile_layers(device: str, *models: PreTrainedModel | None) -> bool:
    """Compile what the decoder layers of each model do, where `compiles` says so, which is returned.

    Hooks stay eager. All layers share the code that the first one is compiled to.
    """
    if compiles(device):
        for layer in _layers(*models):
            layer.forward = torch.compile(layer.forward)
    return compiles(device)


def restore_layers(*models: PreTrainedModel | None) -> None:
    """Undo `compile_layers`."""
    for layer in _layers(*models):
        vars(layer).pop("forward", None)


def _layers(*models: PreTrainedModel | None) -> list[nn.Module]:
    return [layer for model in models if model is not None for layer in decoder_layers(model)]
