"""Several processes, one run: `torchrun --nproc-per-node N -m gossamer pretrain ...`.

Each process works on its share of every batch, so that N processes take the same steps as one. `ddp` keeps
the whole model in each process and averages the gradients. `fsdp` (torch's FSDP2) keeps 1/N of the weights,
gradients and moments in each process and gathers a layer while it computes. Only the first process writes
files and reports progress.

The model is sharded here, before the Trainer sees it, because accelerate 1.15 consults its FSDP plugin only
where there are accelerators: between processes on a CPU the Trainer would silently train with DDP. The
sharded model is marked the way transformers marks models that it has sharded itself; the Trainer then leaves
placement and gradients to the model. Embedding, last norm and head belong to the group of the model's root,
which stays gathered until the backward pass is over: the loss uses the head after the model's own forward
pass, and tied weights must belong to one group.

DDP rebuilds its buckets after the first step of every process, and the position of a gradient in its bucket
determines the order in which three or more processes are added up: a resumed run would round differently. DDP
does not rebuild them when it looks for unused parameters, so it is told to, although all parameters are used
(DDP warns once that it found none unused).

If a process fails, it exits without waiting for the others, and torchrun stops them.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from gossamer.errors import ConfigError, UnsupportedError
from gossamer.job.processes import is_first, num_processes
from gossamer.job.report import Progress, quiet
from gossamer.training.device import another_device
from gossamer.training.trainer_contract import unsupported_version

Parallel = Literal["ddp", "fsdp"]
Job = TypeVar("Job", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Stage(Protocol[Job, Result]):
    """The function of a verb: it takes the options and a receiver of progress, and returns a result."""

    def __call__(self, job: Job, progress: Progress = quiet) -> Result: ...


def in_every_process(stage: Stage[Job, Result]) -> Stage[Job, Result]:
    """Decorate a stage so that all processes of a torchrun run it as one group.

    Only the progress of the first process is passed on.
    """

    @functools.wraps(stage)
    def run(job: Job, progress: Progress = quiet) -> Result:
        with _joined():
            return stage(job, progress if is_first() else quiet)

    return run


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    """Join the group of all processes: the one that the caller made, else one for the time of the block.

    After an error the group is not destroyed, which would wait for the others: torchrun ends them.
    """
    if num_processes() == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while the first one packs the text.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    yield
    dist.destroy_process_group()


def from_first(result: Callable[[], Result]) -> Result:
    """Call `result` in the first process alone and return what it returned in every process."""
    if num_processes() == 1:
        return result()
    found = [result() if is_first() else None]
    dist.broadcast_object_list(found, src=0)
    return cast(Result, found[0])


def any_process(wish: bool) -> bool:
    """Whether `wish` is true in any process; every process must call this at the same point."""
    if num_processes() == 1:
        return wish
    wishes = torch.tensor([wish], dtype=torch.int, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(wishes, dist.ReduceOp.MAX)
    return bool(wishes.item())


def least_of_all(number: int) -> int:
    """The least `number` of all processes; every process must call this at the same point."""
    if num_processes() == 1:
        return number
    numbers = torch.tensor([number], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(numbers, dist.ReduceOp.MIN)
    return int(numbers.item())


def wait_for_all() -> None:
    """Return when every process has called this."""
    if num_processes() > 1:
        dist.barrier()


def full_tensor_on_cpu(tensor: Any) -> Any:
    """A DTensor gathered from all processes, on the CPU; anything else is returned as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def gather_to_first(named: Mapping[Any, Any]) -> dict[Any, Any]:
    """`full_tensor_on_cpu` of each value, kept in the first process alone (empty in the others).

    Every process must call this: the values are gathered one at a time.
    """
    kept = {}
    for name, value in named.items():
        found = full_tensor_on_cpu(value)
        if is_first():
            kept[name] = found
    return kept


def shard_like(tensor: Any, like: Tensor) -> Any:
    """This process's shard of `tensor`, sharded as `like` is: the inverse of `full_tensor_on_cpu`.

    If `like` is not sharded or has another shape, `tensor` is returned as it is.
    """
    if not isinstance(like, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def rows_of_this_process(batch_rows: int, row_length: int) -> int:
    """How many rows of a batch each process works on; raises ConfigError if the rows do not divide evenly."""
    count = num_processes()
    if batch_rows % count:
        raise ConfigError(
            f"--batch-tokens makes {batch_rows} rows of {row_length} tokens, which {count} processes cannot "
            f"share evenly; expected a multiple of {count * row_length} tokens"
        )
    return batch_rows // count


def check_processes(parallel: Parallel, teacher_device: str | None = None) -> None:
    """Raise UnsupportedError for one process with several GPUs, ConfigError for `fsdp` in one process.

    One process may have two if its teacher is on the second.
    """
    if num_processes() > 1:
        return
    if torch.cuda.device_count() > 1 and another_device(teacher_device, "cuda") in (None, "cpu"):
        raise UnsupportedError(
            f"found {torch.cuda.device_count()} GPUs and one process; start one for each: torchrun "
            "--nproc-per-node gpu -m gossamer ..., or choose a GPU with CUDA_VISIBLE_DEVICES (or have the "
            "teacher on the second one: --teacher-device cuda:1)"
        )
    if parallel == "fsdp":
        raise ConfigError("--parallel fsdp found one process; start several with torchrun, or leave it out")


def distribute(model: PreTrainedModel, parallel: Parallel, teacher_device: str | None = None) -> None:
    """Shard the model in place for `fsdp`. For `ddp` leave it whole: the Trainer wraps it.

    Raises what `check_processes` does, and UnsupportedError for a transformers that does not know sharded
    models.
    """
    check_processes(parallel, teacher_device)
    if parallel == "fsdp":
        _shard(model)


def _shard(model: PreTrainedModel) -> None:
    """Shard with FSDP2: each decoder layer is a group of its own, all other weights are the root's group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (num_processes(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # A warning about writes to the view, and nothing writes to it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for mark in ("_is_distributed_loading_by_transformers", "_is_fsdp_managed_module"):
        setattr(model, mark, True)
    model.config.distributed_config = DistributedConfig(fsdp_size=num_processes())
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        raise unsupported_version("PreTrainedModel: no property is_distributed_loading_by_transformers")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of the model's decoder, or encoder, in their order."""
    trunk: Any = model.base_model
    layers = trunk.encoder.layer if hasattr(trunk, "encoder") else trunk.layers
    assert isinstance(layers, nn.ModuleList)
    return layers
