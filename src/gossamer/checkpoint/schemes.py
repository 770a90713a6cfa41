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
        if config.get("kv_cache_scheme"):
            return "a kv_cache_scheme"
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            return f"config_groups = {groups!r}"
        for group in groups.values():
            if not isinstance(group, dict) or group.get("output_activations"):
                return "output_activations" if isinstance(group, dict) else f"the group {group!r}"
            for part, expected in (("weights", self.weights), ("input_activations", self.inputs)):
                given = group.get(part) or {}
                settings = _DEFAULTS | (given if isinstance(given, dict) else {"num_bits": given})
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
_METHODS = {  # transformers' words for quantizations that are not read here
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8",
    "hqq": "HQQ", "aqlm": "AQLM", "quanto": "Quanto", "torchao": "torchao", "eetq": "EETQ", "mxfp4": "MXFP4",
}  # fmt: skip


def readable_config(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A `config.json` without a `sparsity_config`, which says of plain weights only that many are zero.

    UnsupportedError for a quantization that is none of ours. (Sparse weights that are stored compressed show
    by the names of their tensors.)
    """
    kept = {key: value for key, value in config.items() if key != "sparsity_config"}
    if (found := kept.get("quantization_config")) is None:
        kept.pop("quantization_config", None)
    if isinstance(found, dict) and "sparsity_config" in found:
        kept["quantization_config"] = {key: found[key] for key in found if key != "sparsity_config"}
    if isinstance(found, dict) and found.get("sparsity_config") and not found.get("config_groups"):
        del kept["quantization_config"]
    read_scheme(kept, file)
    return kept


def _describe(found: Any) -> str:
    """A foreign quantization in a user's words, such as `GPTQ (4 bits)`."""
    if not isinstance(found, dict):
        return repr(found)
    method = str(found.get("quant_method"))
    bits = (
        found.get("bits")
        or found.get("w_bit")
        or next((b for b in (4, 8) if found.get(f"load_in_{b}bit")), None)
    )
    return _METHODS.get(method, method) + (f" ({bits} bits)" if bits else "")


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
    raise UnsupportedError(
        f"{file}: the weights are quantized: {_describe(found)}; quantization_config has "
        f"{'; or '.join(problems)}; give the model that was quantized, in floating point"
    )
