"""Several processes, one run: `torchrun --nproc-per-node N -m gossamer pretrain ...`.

Each process works on its share of every batch, so that N processes take the steps that one takes. `ddp` keeps
the whole model in each and averages gradients. `fsdp` (torch's FSDP2) keeps 1/N of weights, gradients and
moments in each, and gathers a layer while it is at work. The first process alone writes and reports.

accelerate 1.15 looks at its FSDP plugin only where there are accelerators: on CPU ranks the Trainer silently
trains with DDP, and every test passes. So the model is sharded here, before the Trainer sees it, and marked
the way transformers marks models that it sharded itself: the Trainer then leaves placement and gradients to
the model. Embedding, last norm and head stay in the root's group, gathered until the backward pass is over:
the loss uses the head after the model's own forward, and tied weights have to be in one group.

DDP lays out its buckets anew after the first step of every process, and where a gradient lies in its bucket
decides in which order three or more processes add it: a resumed run would round otherwise. It keeps them when
it looks for unused parameters, so it is told to, though all are used (and warns once that it found none).

A process that fails ends all: it leaves without waiting, and torchrun stops the others.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.processes import is_first, num_processes
from gossamer.job.report import Progress, quiet

Parallel = Literal["ddp", "fsdp"]
Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Stage(Protocol[Job, Result]):
    """A verb's function."""

    def __call__(self, job: Job, progress: Progress = quiet) -> Result: ...


def together(stage: Stage[Job, Result]) -> Stage[Job, Result]:
    """Run a stage in every process of the group; only the first one's progress is passed on."""

    @functools.wraps(stage)
    def run(job: Job, progress: Progress = quiet) -> Result:
        with _joined():
            return stage(job, progress if is_first() else quiet)

    return run


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """The group of all processes, the caller's or a new one; after an error torchrun is left to end it."""
    if num_processes() == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    yield
    dist.destroy_process_group()


def from_first(result: Callable[[], Result]) -> Result:
    """What `result` returns in the first process, in all of them; the others wait for it."""
    if num_processes() == 1:
        return result()
    found = [result() if is_first() else None]
    dist.broadcast_object_list(found, src=0)
    return cast(Result, found[0])


def any_process(wish: bool) -> bool:
    """Whether any process has the wish; all of them have to ask at the same time."""
    if num_processes() == 1:
        return wish
    wishes = torch.tensor([wish], dtype=torch.int, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes.item())


def wait_for_all() -> None:
    """Return when every process is here."""
    if num_processes() > 1:
        dist.barrier()


def whole(tensor: Any) -> Any:
    """Of a tensor whose shards lie in several processes all of it, on the CPU; of anything else itself."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def gathered(named: Mapping[Any, Any]) -> dict[Any, Any]:
    """`whole` of each, one at a time, in which all processes take part; kept by the first alone."""
    kept = {}
    for name, value in named.items():
        found = whole(value)
        if is_first():
            kept[name] = found
    return kept


def share(tensor: Any, like: Tensor) -> Any:
    """The inverse of `whole`: a tensor of the shape of `like`, sharded as that is; anything else itself."""
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def share_of_rows(batch_rows: int, row_length: int) -> int:
    """How many rows of a batch are this process's; raises ConfigError where all cannot have as many."""
    count = num_processes()
    if batch_rows % count:
        raise ConfigError(
            f"--batch-tokens makes {batch_rows} rows of {row_length} tokens, which {count} processes cannot "
            f"share evenly; expected a multiple of {count * row_length} tokens"
        )
    return batch_rows // count


def distribute(model: LlamaForCausalLM, parallel: Parallel) -> None:
    """Shard the model under `fsdp`; under `ddp` it stays whole, and the Trainer wraps it."""
    if num_processes() == 1 and torch.cuda.device_count() > 1:
        raise UnsupportedError(
            f"found {torch.cuda.device_count()} GPUs and one process; start one for each: torchrun "
            "--nproc-per-node gpu -m gossamer ..., or choose a GPU with CUDA_VISIBLE_DEVICES"
        )
    if parallel == "fsdp":
        _shard(model)


def _shard(model: LlamaForCausalLM) -> None:
    """FSDP2: each layer a group, the rest in the root's."""
    if num_processes() == 1:
        raise ConfigError("--parallel fsdp found one process; start several with torchrun, or leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (num_processes(),))
    layers: nn.ModuleList = model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module .* returned a view tensor"
    )  # nothing writes to it
    for mark in ("_is_distributed_loading_by_transformers", "_is_fsdp_managed_module"):
        setattr(model, mark, True)
    model.config.distributed_config = DistributedConfig(fsdp_size=num_processes())
