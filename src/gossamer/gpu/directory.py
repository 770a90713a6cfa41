"""What a directory's `quantization_config` says of its linears, to whoever loads them on a GPU."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from gossamer.checkpoint.schemes import Scheme, read_scheme
from gossamer.errors import UnsupportedError


def left_in_floats(found: Mapping[str, Any], schemes: Collection[Scheme], by: str) -> list[str]:
    """Names and patterns of the linears that are no integers; UnsupportedError for other schemes than these.

    `by`: who supports these alone.
    """
    scheme = read_scheme({"quantization_config": found}, "config.json")
    if scheme not in schemes:
        name = "nothing" if scheme is None else scheme.name
        able = ", ".join(it.name for it in schemes)
        raise UnsupportedError(
            f"config.json: quantized as {name}; supported by {by}: {able}, and models in bfloat16"
        )
    return list(found.get("ignore") or ())


def matches(pattern: str, name: str) -> bool:
    """As compressed-tensors has it: a name, or `re:` and an expression that it begins with."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name
