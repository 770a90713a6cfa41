"""Gossamer makes a Llama sparse, wins its accuracy back, and runs it fast on CPUs.

    [answer] = gossamer.LLM("model.goss").generate("Once upon a time", gossamer.SamplingParams(max_tokens=40))

Every verb is a function of its name in `stages`, `tools` or `runs`, with a dataclass of its options. Names
here are imported when they are first used, so that the engine needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint as Checkpoint
    from gossamer.engine import LLM as LLM
    from gossamer.engine import Encoder as Encoder
    from gossamer.engine import Generation as Generation
    from gossamer.engine import SamplingParams as SamplingParams
    from gossamer.errors import GossamerError as GossamerError
    from gossamer.packed.reader import Packed as Packed
    from gossamer.training.distillation import SquareHead as SquareHead
    from gossamer.training.masks import MaskCallback as MaskCallback

HOMES = {
    "LLM": "gossamer.engine",
    "Checkpoint": "gossamer.checkpoint.directory",
    "Encoder": "gossamer.engine",
    "Generation": "gossamer.engine",
    "GossamerError": "gossamer.errors",
    "MaskCallback": "gossamer.training.masks",
    "Packed": "gossamer.packed.reader",
    "SamplingParams": "gossamer.engine",
    "SquareHead": "gossamer.training.distillation",
}

__all__ = list(HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
