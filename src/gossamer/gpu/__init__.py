"""Sparse products on GPUs, for transformers and vLLM.

    import gossamer.gpu
    from_pretrained(directory, quantization_config=gossamer.gpu.GossamerConfig(), device_map="cuda")

vLLM imports this in each of its processes: nothing is loaded before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.gpu.linear import SparseLinear
    from gossamer.gpu.transformers import GossamerConfig

__all__ = ["GossamerConfig", "SparseLinear"]


def __getattr__(name: str) -> Any:
    modules = {"GossamerConfig": "transformers", "SparseLinear": "linear"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{modules[name]}"), name)
