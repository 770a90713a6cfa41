"""Gossamer makes a Llama sparse, wins its accuracy back, and runs it fast on CPUs.

    from gossamer import LLM, SamplingParams
    [answer] = LLM("model.goss").generate("Once upon a time", SamplingParams(max_tokens=40))

Every verb of the command line is a function of the same name in `gossamer.stages`, `gossamer.tools` or
`gossamer.runs`, with a dataclass of its options. Names here are imported when they are first used, so that
the engine needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint
    from gossamer.engine import LLM, Generation, SamplingParams
    from gossamer.errors import GossamerError
    from gossamer.packed.reader import Packed
    from gossamer.training.distillation import SquareHead
    from gossamer.training.masks import MaskCallback

__all__ = [
    "LLM",
    "Checkpoint",
    "Generation",
    "GossamerError",
    "MaskCallback",
    "Packed",
    "SamplingParams",
    "SquareHead",
]

_HOMES = {
    "LLM": "gossamer.engine",
    "Checkpoint": "gossamer.checkpoint.directory",
    "Generation": "gossamer.engine",
    "GossamerError": "gossamer.errors",
    "MaskCallback": "gossamer.training.masks",
    "Packed": "gossamer.packed.reader",
    "SamplingParams": "gossamer.engine",
    "SquareHead": "gossamer.training.distillation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
