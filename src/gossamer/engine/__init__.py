"""CPU inference over packed models: no torch."""

from gossamer.engine.engine import Engine, KvCacheDtype, cached_type, native_model
from gossamer.engine.llm import LLM
from gossamer.engine.request import Generation, Piece, Request
from gossamer.engine.sampling import SamplingParams
from gossamer.engine.scheduler import Scheduler

__all__ = [
    "LLM",
    "Engine",
    "Generation",
    "KvCacheDtype",
    "Piece",
    "Request",
    "SamplingParams",
    "Scheduler",
    "cached_type",
    "native_model",
]
