"""CPU inference over packed models: no torch."""

from gossamer.engine.engine import Engine, KvCacheDtype, native_model
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
    "native_model",
]
