"""What a directory's `quantization_config` says of its linears, to whoever loads them on a GPU."""

import re
from collections.abc import Mapping
from typing import Any

from gossamer.checkpoint.schemes import W8A8, read_scheme
from gossamer.errors import UnsupportedError


def left_in_floats(found: Mapping[str, Any]) -> list[str]:
    """Names and patterns of the linears that are not INT8; UnsupportedError for any scheme but W8A8."""
    scheme = read_scheme({"quantization_config": found}, "config.json")
    if scheme is not W8A8:
        name = "nothing" if scheme is None else scheme.name
        raise UnsupportedError(
            f"config.json: quantized as {name}; supported on GPUs: W8A8, and models in bfloat16"
        )
    return list(found.get("ignore") or ())


def matches(pattern: str, name: str) -> bool:
    """As compressed-tensors has it: a name, or `re:` and an expression that it begins with."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name
