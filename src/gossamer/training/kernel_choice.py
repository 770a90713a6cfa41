"""The choice of a run's training kernel: how the decoder's linear layers multiply while the model trains.

`dense`: torch multiplies whole matrices, whose zeros `masks` keeps. `sparse`: `SparseLinear` stores, updates
and multiplies the nonzero weights alone. A training kernel is not to be confused with the kernels of
`native/kernels/`, which are functions; the sparse training kernel calls some of them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.training.masks import decoder_zeros
from gossamer.training.sparse_linear import SparseLinear

TrainingKernel = Literal["dense", "sparse"]
SECONDS_A_SIDE = 0.15


@dataclass(frozen=True)
class KernelChoice:
    """The training kernel of a run and the reason for it.

    `ratio`: the seconds that dense took over those of sparse, None if they were not measured.
    """

    kernel: TrainingKernel
    reason: str
    ratio: float | None = None

    def metrics(self) -> dict[str, Any]:
        """For `gossamer.json`."""
        return {"kernel": self.kernel, "kernel_ratio": None if self.ratio is None else round(self.ratio, 3)}


def choose_kernel(
    wanted: Literal["auto", "dense", "sparse"],
    model: nn.Module,
    device: str,
    precision: Literal["f32", "bf16"],
    num_tokens: int,
    *,
    sharded: bool = False,
) -> KernelChoice:
    """Choose the training kernel that is `wanted`, or for `auto` the faster one.

    What is faster is measured for micro-batches of `num_tokens` on one block of the model itself.
    sharded: whether FSDP shards the weights. Raises ConfigError for `sparse` if the model has no zeros,
    UnsupportedError for `sparse` with sharded weights.
    """
    if wanted == "dense":
        return KernelChoice("dense", "asked for")
    if sharded:
        refuse_sharded(wanted)
        return KernelChoice("dense", "FSDP shards the weights")
    linears = masked_linears(model)
    if wanted == "sparse":
        refuse_dense(has_zeros=bool(linears))
        return KernelChoice("sparse", "asked for")
    if not linears:
        return KernelChoice("dense", "the model has no zeros")
    if device != "cpu":
        return KernelChoice("dense", "a GPU multiplies dense matrices either way")
    return _measured(linears, precision, num_tokens)


def refuse_dense(*, has_zeros: bool) -> None:
    """Raise ConfigError for a model that the sparse training kernel has nothing to leave out of."""
    if not has_zeros:
        raise ConfigError(
            "--kernel sparse: found no zeros in the decoder's linears; expected a pruned model: run "
            "`gossamer prune` first, or train with --kernel dense"
        )


def refuse_sharded(kernel: str) -> None:
    """Raise UnsupportedError for the training kernel that cannot work on sharded weights."""
    if kernel == "sparse":
        raise UnsupportedError(
            "kernel sparse: found weights sharded by FSDP; expected one process or --parallel ddp: give one "
            "of these, or begin anew with --kernel dense"
        )


def masked_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """name -> linear layer of the decoder that has zeros, in the model's order."""
    names = [name.removesuffix(".weight") for name in decoder_zeros(model)]
    modules = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def _measured(linears: dict[str, nn.Linear], precision: str, num_tokens: int) -> KernelChoice:
    """Time both training kernels on the first block that has zeros, each distinct shape once."""
    block = _first_block(linears)
    by_shape = sorted(block, key=lambda dense: tuple(dense.weight.shape))
    dense_s = sparse_s = 0.0
    for _, same in groupby(by_shape, key=lambda dense: tuple(dense.weight.shape)):
        layers = list(same)
        times = _seconds(layers[0], precision, num_tokens)
        dense_s, sparse_s = dense_s + len(layers) * times[0], sparse_s + len(layers) * times[1]
    ratio = dense_s / sparse_s
    zeros = sum(int((dense.weight == 0).sum()) for dense in block) / sum(d.weight.numel() for d in block)
    on = f"on one block at {zeros:.0%} sparsity, {num_tokens:,} tokens, forward and backward"
    if ratio > 1:
        return KernelChoice("sparse", f"{ratio:.2f} times as fast as dense {precision} {on}", ratio)
    return KernelChoice("dense", f"{precision} is {1 / ratio:.2f} times as fast as sparse {on}", ratio)


def _first_block(linears: dict[str, nn.Linear]) -> list[nn.Linear]:
    prefixes = [re.sub(r"(layers?\.\d+\.).*", r"\1", name) for name in linears]
    return [dense for name, dense in linears.items() if name.startswith(prefixes[0])]


def _seconds(dense: nn.Linear, precision: str, num_tokens: int) -> tuple[float, float]:
    """Seconds of a forward and backward pass over random tokens: dense, sparse."""
    weight, sparse = dense.weight.detach().requires_grad_(), SparseLinear(dense)
    generator = torch.Generator().manual_seed(0)
    x_TK = torch.randn(num_tokens, dense.in_features, generator=generator).requires_grad_()
    dy_TN = torch.randn(num_tokens, dense.out_features, generator=generator)

    def run(product: Callable[[Tensor], Tensor], parameter: Tensor) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y_TN = product(x_TK)
        torch.autograd.grad(y_TN, (x_TK, parameter), dy_TN.to(y_TN.dtype))
        return time.perf_counter() - start

    def dense_s() -> float:
        return run(lambda x: linear(x, weight), weight)

    def sparse_s() -> float:
        return run(sparse, sparse.values)

    return _best(dense_s), _best(sparse_s)


def _best(measure: Callable[[], float]) -> float:
    """The shortest of at least two measurements, after one to warm up."""
    measure()
    found = [measure(), measure()]
    while sum(found) < SECONDS_A_SIDE:
        found.append(measure())
    return min(found)
