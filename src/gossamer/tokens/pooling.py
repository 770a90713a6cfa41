"""How an encoder's tokens become the vector of a text: what sentence-transformers' files say of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import json_object
from gossamer.errors import CheckpointError, UnsupportedError

MODULES, LENGTH, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
PoolingMode = Literal["mean", "cls", "max"]
_MODES = {  # in a pooling's config.json
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """The vector of a text is the mean or maximum of its tokens' hidden states, or the first one's.

    `normalize`: to length 1. Texts are cut at `max_length` tokens, special ones included. `prompts` are put
    before texts where they are asked for by name, or by `default_prompt` where nothing is asked.
    """

    mode: PoolingMode = "mean"
    normalize: bool = False
    max_length: int = 512
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    @classmethod
    def open(cls, directory: Path, anatomy: Anatomy) -> Self:
        """Read a model directory's files; as sentence-transformers does, the mean where there are none.

        CheckpointError for a file that is damaged, UnsupportedError for modules that nothing here computes.
        """
        longest = anatomy.max_position_embeddings
        if not (file := directory / MODULES).is_file():
            return cls(max_length=longest)
        pooling: dict[str, Any] = {}
        for kind, path in _modules(file):
            if kind == "Pooling":
                pooling["mode"] = _mode(directory / path / "config.json")
            elif kind == "Normalize":
                pooling["normalize"] = True
            elif kind != "Transformer":
                raise UnsupportedError(
                    f"{file}: found a module {kind}; supported: Transformer, Pooling, Normalize"
                )
        length = _optional(directory / LENGTH).get("max_seq_length")
        names = _optional(directory / PROMPTS)
        return cls.from_json(
            {
                **pooling,
                "max_length": longest if length is None else length,
                "prompts": names.get("prompts") or {},
                "default_prompt": names.get("default_prompt_name"),
            },
            anatomy,
            str(directory),
        )

    def to_json(self) -> dict[str, Any]:
        """As a packed file keeps it."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any], anatomy: Anatomy, source: str) -> Self:
        """The same from a file that may hold anything: CheckpointError for what is none."""
        pooling = {**asdict(cls()), **found}
        length, prompts, default = (pooling[key] for key in ("max_length", "prompts", "default_prompt"))
        problems = {
            f"the pooling {pooling['mode']!r:.80}": pooling["mode"] not in [*_MODES.values()],
            f"normalize {pooling['normalize']!r:.80}": not isinstance(pooling["normalize"], bool),
            f"the maximum length {length!r:.80}": type(length) is not int or length < 3,
            f"the prompts {prompts!r:.80}": not _is_texts(prompts),
            f"the default prompt {default!r:.80}": default is not None
            and not (_is_texts(prompts) and isinstance(default, str) and default in prompts),
            f"{sorted(pooling.keys() - asdict(cls()).keys())}": bool(pooling.keys() - asdict(cls()).keys()),
        }
        if bad := next((name for name, is_bad in problems.items() if is_bad), None):
            raise CheckpointError(
                f"{source}: says of pooling {bad}; expected what sentence-transformers writes"
            )
        pooling["max_length"] = min(length, anatomy.max_position_embeddings)
        return cls(**pooling)


def _is_texts(found: object) -> bool:
    return isinstance(found, Mapping) and all(isinstance(it, str) for pair in found.items() for it in pair)


def _optional(file: Path) -> dict[str, Any]:
    return json_object(file.read_bytes(), str(file)) if file.is_file() else {}


def _modules(file: Path) -> list[tuple[str, str]]:
    """The kind of each module, the last part of its class's name, and its folder."""
    try:
        found = json.loads(file.read_bytes())
        return [(str(it["type"]).rpartition(".")[2], str(it["path"])) for it in found]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{file}: not a list of modules with type and path ({error}); the file is damaged"
        ) from error


def _mode(file: Path) -> str:
    """Of a pooling's config.json: one mode alone, in the old or the new form."""
    if not file.is_file():
        raise CheckpointError(
            f"{file}: found nothing; modules.json says that the pooling's settings are there"
        )
    found = json_object(file.read_bytes(), str(file))
    chosen = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
    modes = [_MODES.get(key, key) for key in chosen] or [found.get("pooling_mode", "mean")]
    if len(modes) != 1 or modes[0] not in _MODES.values():
        raise UnsupportedError(
            f"{file}: found pooling by {', '.join(map(str, modes))}; expected one of mean, cls, max"
        )
    return modes[0]
