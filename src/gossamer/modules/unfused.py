"""Linears that a family keeps as one, such as Phi-3's queries, keys and values, as modules of their own.

So stages see the same roles in every family: they change, prune, round and train each linear by itself, and
masks, hooks and names are those of the linear. `checkpoint/fused.py` does the same for files.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gossamer.architecture.anatomy import Block


class Joined(nn.Module):
    """Takes the place of a linear whose rows are those of several: their outputs, one after the other.

    They are modules of `owner`, under their own names, and looked up there at every call, because training
    may put others in their place.
    """

    def __init__(self, owner: nn.Module, names: list[str]) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, for it is no module of this one
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self._owner[0], name)(x) for name in self.names], dim=-1)


def unfuse(layer: nn.Module, block: Block) -> None:
    """Give transformers' layer a linear for each of the block's, with the weights of those that it has."""
    for stored, roles in block.fused.items():
        module, _, name = stored.rpartition(".")
        owner, whole = layer.get_submodule(module), layer.get_submodule(stored)
        linears = [block.linears[role] for role in roles]
        names = [linear.name.rpartition(".")[2] for linear in linears]
        rows = [linear.rows for linear in linears]
        split = {kind: tensor.detach().split(rows) for kind, tensor in whole.named_parameters()}
        for index, (linear, own) in enumerate(zip(linears, names, strict=True)):
            part = nn.Linear(linear.columns, linear.rows, linear.bias, device="meta")
            for kind, tensors in split.items():
                part.register_parameter(kind, nn.Parameter(tensors[index].clone()))
            setattr(owner, own, part)
        setattr(owner, name, Joined(owner, names))


def join(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights and biases under the names that files have for them."""
    state = dict(state)
    for stored, parts in _joined(model):
        for kind in _kinds(state, parts):
            state[f"{stored}.{kind}"] = torch.cat([state.pop(f"{part}.{kind}") for part in parts])
    return state


def part(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `join`."""
    state, shapes = dict(state), model.state_dict()
    for stored, parts in _joined(model):
        for kind in _kinds(shapes, parts):
            rows = [len(shapes[f"{name}.{kind}"]) for name in parts]
            tensors = state.pop(f"{stored}.{kind}").split(rows)
            state |= {f"{name}.{kind}": tensor for name, tensor in zip(parts, tensors, strict=True)}
    return state


def _kinds(state: Mapping[str, Tensor], parts: list[str]) -> list[str]:
    return [kind for kind in ("weight", "bias") if f"{parts[0]}.{kind}" in state]


def _joined(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Stored name and those of the parts, for each module that stands for several."""
    for stored, module in model.named_modules():
        if isinstance(module, Joined):
            owner = stored.rpartition(".")[0]
            yield stored, [f"{owner}.{name}" for name in module.names]
