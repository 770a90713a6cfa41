"""Quantization schemes: what a quantized directory says of itself, written once.

The words are compressed-tensors' (https://github.com/vllm-project/compressed-tensors), which transformers and
vLLM read: `config_groups` with the settings of weights and of input activations. A directory never carries a
`sparsity_config`: vLLM refuses it, and the zeros speak for themselves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.errors import UnsupportedError

_DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}  # for what a file leaves out


@dataclass(frozen=True)
class Scheme:
    """One way to store weights and to round activations; `dtype` is the weights' in safetensors."""

    name: str
    format: str
    dtype: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    summary: str

    def config(self, ignored: Collection[str]) -> dict[str, Any]:
        """The `quantization_config` of a directory in which the `ignored` linears, and the head, are not."""
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": dict(self.weights),
                    "input_activations": dict(self.inputs),
                }
            },
            "ignore": ["lm_head", *ignored],
        }

    def difference(self, config: Any) -> str | None:
        """The first setting of a `quantization_config` that is not this scheme's, or None."""
        if not isinstance(config, dict):
            return repr(config)
        for key, expected in (("quant_method", "compressed-tensors"), ("format", self.format)):
            if config.get(key) != expected:
                return f"{key} = {config.get(key)!r}"
        for key in ("sparsity_config", "kv_cache_scheme"):
            if config.get(key):
                return f"a {key}"
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return f"config_groups = {groups!r}"
        for group in groups.values():
            if group.get("output_activations"):
                return "output_activations"
            for part, expected in (("weights", self.weights), ("input_activations", self.inputs)):
                settings = _DEFAULTS | (group.get(part) or {})
                for key, value in expected.items():
                    if settings.get(key) != value:
                        return f"{part}.{key} = {settings.get(key)!r}"
        return None


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = Scheme(
    name="W8A8",
    format="int-quantized",
    dtype="I8",
    weights={**_INT8, "strategy": "channel", "dynamic": False},
    inputs={**_INT8, "strategy": "token", "dynamic": True},
    summary="compressed-tensors int-quantized W8A8, weights symmetric per channel, inputs dynamic per token",
)
SCHEMES = {scheme.name: scheme for scheme in (W8A8,)}


def read_scheme(config: Mapping[str, Any], file: str) -> Scheme | None:
    """The scheme of a `config.json`, None for an unquantized model; UnsupportedError for any other one."""
    found = config.get("quantization_config")
    if found is None:
        return None
    problems = []
    for scheme in SCHEMES.values():
        if (problem := scheme.difference(found)) is None:
            return scheme
        problems.append(f"{problem}; supported: {scheme.summary}")
    raise UnsupportedError(f"{file}: quantization_config has {'; or '.join(problems)}")
