"""Round one layer and train it through the rounding, towards what the unrounded model gives after it."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.reconstruct import Rows, Schedule, reconstruct
from gossamer.compress.straight_through import InType, OnGrid
from gossamer.compress.target import token_error
from gossamer.layerwise.reconstruction import retake
from gossamer.layerwise.rounding import NUMBERS, Rounded, RoundingOptions, Smoothed, round_block, whole_scales
from gossamer.layerwise.states import States
from gossamer.modules.decoder import TORCH_DTYPE, Block, tensor


def round_and_train(
    block: Block,
    smoothed: Collection[Smoothed],
    states: tuple[States, States],
    source: Checkpoint,
    job: RoundingOptions,
    ignored: Collection[str],
    dampening: dict[str, float],
    *,
    read_DD: Tensor,
    reconstruction: list[list[float]],
    towards: Sequence[Tensor] | None = None,
) -> Iterator[Rounded]:
    """As `round_block`, and then everything that the layer has is trained but the scales of its weights.

    It is trained `towards` the hidden states [rows, T, D] of the model that was never changed, of the rows
    and of those held out; without them, towards what the unrounded layer gives.
    `reconstruction` receives the error on held-out rows as rounded, and after each epoch: the mean over
    tokens of |d R|^2 / |parent|^2, d being what hidden states lack, and R of the model `as_read_by_head`. The
    errors of the linears stay what they were before the training, in which linears make up for each other.
    """
    inputs = [each.ours_BTD.clone() for each in states]
    linears = {name: linear for group in block.groups for name, linear in group.items()}
    kept = {name: linear.weight.data != 0 for name, linear in linears.items()}
    rounded = list(round_block(block, smoothed, states, source, job, ignored, dampening))
    grids = parametrize_all(block, rounded, source, job)
    latent = {name: original(linear) for name, linear in linears.items()}

    def after_step(learning_rate: float) -> None:
        for name, grid in grids.items():
            grid.draw(latent[name].data, learning_rate)

    others = {n: p for n, p in block.layer.named_parameters() if all(p is not w for w in latent.values())}
    towards = towards or [each.parent_BTD for each in states]
    rows, held_out = (Rows(x_BTD, y_BTD) for x_BTD, y_BTD in zip(inputs, towards, strict=True))
    schedule = Schedule(job.reconstruct_epochs, job.reconstruct_learning_rate, job.seed)
    error_of = partial(token_error, read_DD=read_DD)
    errors = reconstruct(block, latent | others, kept, rows, held_out, schedule, after_step, error_of)
    reconstruction.append(errors)
    numbers = {name: grid.numbers(latent[name].data) for name, grid in grids.items()}
    leave_as_stored(block)
    for x_BTD, each in zip(inputs, states, strict=True):
        retake(each, block, x_BTD)
    for each in rounded:
        yield dataclasses.replace(each, q_NK=numbers[each.name].to(each.q_NK.dtype))


def as_read_by_head(source: Checkpoint) -> Tensor:
    """R [D, D]: |d R|^2 is the mean of |d|^2 and of what the final norm's weights and the head make of d.

    The latter is on such a scale that it is |d|^2 on average over directions. Hidden states vary most in
    directions of which the head takes little notice, and what it reads is what counts in the end.
    """
    anatomy = source.architecture
    if anatomy.is_encoder:  # its hidden states are what is wanted of it
        return torch.eye(anatomy.hidden_size)
    assert anatomy.final_norm is not None
    w_VD = tensor(source, f"{anatomy.logits}.weight").float()
    w_VD *= tensor(source, f"{anatomy.final_norm.name}.weight").float()
    gram_DD = (w_VD.T @ w_VD).double()
    gram_DD /= gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.cholesky((gram_DD + torch.eye(len(gram_DD))) / 2).float()


def parametrize_all(
    block: Block, rounded: Collection[Rounded], source: Checkpoint, job: RoundingOptions
) -> dict[str, OnGrid]:
    """Have a layer compute with what will be stored of its parameters; the grids by linears' names."""
    numbers, grids = NUMBERS[job.scheme], {each.name: each.scale_NG for each in rounded}
    made: dict[str, OnGrid] = {}
    for path, parameter in list(block.layer.named_parameters()):
        place, _, name = path.rpartition(".")
        linear, module = f"{block.prefix}{place}", block.layer.get_submodule(place)
        if name == "weight" and linear in grids:
            scale_NK = whole_scales(grids[linear], parameter.shape[1], job.scheme)
            made[linear] = OnGrid(numbers.whole, numbers.largest, scale_NK)
            parametrize.register_parametrization(module, name, made[linear])
        else:
            dtype = TORCH_DTYPE[source.dtype(f"{block.prefix}{path}")]
            parametrize.register_parametrization(module, name, InType(dtype))
    return made


def original(linear: nn.Linear) -> nn.Parameter:
    """What the linear's parametrized weight is computed from."""
    parametrizations: Any = linear.parametrizations
    return parametrizations.weight.original


def leave_as_stored(block: Block) -> None:
    """Take the parametrizations away; the parameters are what they computed."""
    for module in list(block.layer.modules()):
        if parametrize.is_parametrized(module):
            names: Any = module.parametrizations
            for name in list(names):
                parametrize.remove_parametrizations(module, name)
