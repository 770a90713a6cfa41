"""The options of every verb that runs a model in the engine."""

from dataclasses import dataclass, fields
from typing import Literal

from gossamer.errors import ConfigError
from gossamer.job.options import ThreadOptions, option

KvCacheDtype = Literal["auto", "f32", "bf16", "i8"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions(ThreadOptions):
    """What `Run`, `Serve`, `Bench` and `Evaluate` share."""

    kv_cache_dtype: KvCacheDtype = option(
        "auto", help="type of cached keys and values (auto: f32 for float32 models, else bf16)"
    )
    offline: bool = option(False, help="never touch the network")

    def refuse_given(self, *names: str) -> None:
        """ConfigError for one of these options that was given: it is for verbs on another backend."""
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ConfigError(f"--{flag} is the engine's; add --backend engine, or leave it out")


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(EngineOptions):
    """What `Run` and `Serve` share."""

    generation_config: Literal["auto", "none"] = option(
        "auto",
        help="auto: temperature, top-k, top-p, min-p and repetition penalty that nobody gives are those of "
        "the model's generation_config.json; none: they are not",
    )
