"""Which of a decoder's linears the patterns of a recipe mean.

A pattern is the name of a module (`model.layers.0.mlp.down_proj`, or of what holds it, such as
`model.layers.0`), of its parameter (`....down_proj.weight`), a class (`Linear`, `LlamaDecoderLayer`), all
(`__ALL__`, `__ALL_PRUNABLE__`) or `re:` and a regular expression that matches from a name's beginning.

A recipe does not say of which model it is, so that patterns are tried on the names of a very deep decoder.
"""

import fnmatch
import re
from collections.abc import Collection

from gossamer.errors import ConfigError

_ROLES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")  # Phi-3's
_PREFIXES = tuple(f"model.layers.{layer}." for layer in range(128))
NEEDED = frozenset(f"{prefix}{role}" for prefix in _PREFIXES for role in _ROLES)
LINEARS = tuple(f"{prefix}{role}" for prefix in _PREFIXES for role in (*_ROLES, *_FUSED))
_ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear")
_WILD = {r"\.": ".", ".*": "*", r"\d+": "*", ".": "?"}  # of regular expressions -> of shell patterns


def meant(patterns: Collection[str], where: str) -> set[str]:
    """Those of `LINEARS` that the patterns mean; all linears of a decoder if `NEEDED` are among them."""
    return {name for pattern in patterns for name in _matches(pattern, where)}


def shell_pattern(pattern: str, where: str) -> str | None:
    """The shell pattern that means the same linears, as `quantize --ignore` takes it, or None."""
    if not pattern.startswith("re:"):
        candidate = pattern.removesuffix(".weight")
    else:
        parts = re.split(r"(\\\.|\.\*|\\d\+|\.)", pattern.removeprefix("re:").lstrip("^"))
        candidate = "".join(_WILD.get(part, part) for part in parts)
        candidate = candidate.removesuffix("$") if candidate.endswith("$") else f"{candidate}*"
    names = meant([pattern], where)
    for glob in (candidate.removesuffix("*"), candidate, f"{candidate}.*"):
        for simpler in (glob.replace("?", "."), glob):
            if set(fnmatch.filter(LINEARS, simpler)) == names:
                return simpler
    return None


def _matches(pattern: str, where: str) -> Collection[str]:
    if pattern in _ALL or pattern.endswith("DecoderLayer"):
        return LINEARS
    if not pattern.startswith("re:"):
        return [name for name in LINEARS if pattern in _names(name)]
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no regular expression ({error})") from error
    return [name for name in LINEARS if any(map(expression.match, _names(name)))]


def _names(linear: str) -> tuple[str, ...]:
    """The linear, its weight, and the modules that hold it."""
    block = linear.rpartition(".")[0]
    return linear, f"{linear}.weight", block, block.rpartition(".")[0]
