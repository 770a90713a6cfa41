"""A directory's model with sparse linears on a GPU, as the verbs open it."""

from typing import Any

import torch
import transformers

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import UnsupportedError
from gossamer.gpu.memory import memory_for
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
    UnsupportedError for linears in other floats, or in other integers than W8A8 and W4A8.
    """
    found = {source.dtype(f"{name}.weight") for name in source.linears}
    if refused := sorted(found & REFUSED):
        raise UnsupportedError(
            f"{source.path}: found linears in {', '.join(refused)}; supported on a GPU: BF16, and W8A8 "
            "and W4A8, which `gossamer quantize` makes of them. The engine runs others on a CPU"
        )
    opening: Any = getattr(transformers, kind)
    how = {"quantization_config": GossamerConfig(), "device_map": device, "local_files_only": True}
    with memory_for(f"{source.path} was loaded, which takes that of all weights before they are packed"):
        model = opening.from_pretrained(
            source.path, dtype=torch.bfloat16 if "BF16" in found else dtype, **how
        )
    return model.eval()
