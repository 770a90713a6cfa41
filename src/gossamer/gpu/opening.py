"""A directory's model with sparse linears on a GPU, as the verbs open it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.fused import fused_matrices
from gossamer.errors import UnsupportedError
from gossamer.gpu.memory import memory_for
from gossamer.gpu.packing import packing_bytes
from gossamer.gpu.transformers import GossamerConfig

REFUSED = {"F64", "F32", "F16"}  # types of linears


def open_sparse(
    source: Checkpoint,
    device: str,
    kind: str = "AutoModelForCausalLM",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """transformers' model of this kind on torch's device.

    `dtype`: of what is no integer where no linear is bfloat16; where one is, all floats are.
    UnsupportedError for linears in other floats, or in other integers than W8A8 and W4A8; MemoryError where
    the device's memory ends.
    """
    found = {source.dtype(f"{name}.weight") for name in source.linears}
    if refused := sorted(found & REFUSED):
        raise UnsupportedError(
            f"{source.path}: found linears in {', '.join(refused)}; supported on a GPU: BF16, and W8A8 "
            "and W4A8, which `gossamer quantize` makes of them. The engine runs others on a CPU"
        )
    opening: Any = getattr(transformers, kind)
    how = {"quantization_config": GossamerConfig(), "device_map": device, "local_files_only": True}
    dtype, of_linears = (torch.bfloat16, torch.bfloat16) if "BF16" in found else (dtype, torch.int8)
    linear_bytes = max(packing_bytes(rows, columns, of_linears) for rows, columns in _shapes(source))
    with memory_for(
        f"{source.path} was loaded; before its linears are packed its weights take "
        f"{loaded_bytes(source, dtype) / 1e9:.2f} GB, and the largest linear at most "
        f"{linear_bytes / 1e9:.2f} GB more while it is"
    ):
        model = opening.from_pretrained(source.path, dtype=dtype, **how)
    return model.eval()


def loaded_bytes(source: Checkpoint, dtype: torch.dtype) -> int:
    """What its weights take as they are loaded: scales in float32, other floats in this type."""
    floats = {name: 4 if name.endswith(".weight_scale") else dtype.itemsize for name in source.names}
    sizes = {name: 1 if source.dtype(name) == "I8" else size for name, size in floats.items()}
    return sum(math.prod(source.entries[name].shape) * size for name, size in sizes.items())


def _shapes(source: Checkpoint) -> Iterator[Sequence[int]]:
    """Of its layers' linears as transformers has them."""
    yield from (source.entries[f"{name}.weight"].shape for name in source.linears)
    yield from (it.shape for it in fused_matrices(source.architecture))
