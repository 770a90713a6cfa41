"""CPU inference over packed models: no torch."""

from gossamer.engine.encoder import Encoder
from gossamer.engine.llm import LLM
from gossamer.engine.model import OpenModel, cached_type, native_model
from gossamer.engine.options import EngineOptions, GenerationOptions, KvCacheDtype
from gossamer.engine.request import Generation, Piece, Request, TokenLogprob
from gossamer.engine.sampling import SamplingParams
from gossamer.engine.scheduler import Scheduler

__all__ = [
    "LLM",
    "Encoder",
    "EngineOptions",
    "Generation",
    "GenerationOptions",
    "KvCacheDtype",
    "OpenModel",
    "Piece",
    "Request",
    "SamplingParams",
    "Scheduler",
    "TokenLogprob",
    "cached_type",
    "native_model",
]
