"""Quantization schemes: what a quantized directory says of itself, written once.

The words are compressed-tensors' (https://github.com/vllm-project/compressed-tensors), which transformers and
vLLM read: `config_groups` with the settings of weights and of input activations. A directory never carries a
`sparsity_config`: vLLM refuses it, and the zeros speak for themselves.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.errors import CheckpointError, UnsupportedError

GROUP_INPUTS = 128  # consecutive inputs of a row that share an INT4 scale
LEAST_GROUP = 4
MAX_MULTIPLIER = 16
_DEFAULTS = {"type": "int", "symmetric": True, "dynamic": False}  # for what a file leaves out


@dataclass(frozen=True)
class Scheme:
    """One way to store weights and to round activations; `dtype` is the weights' in safetensors.

    Where the strategy of `weights` is "group", the directory says how many inputs share a scale: 128, or a
    power of two below it. `in_engine`: whether `pack` takes such a directory, for Gossamer's engine to run.
    """

    name: str
    format: str
    dtype: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any]
    summary: str
    in_engine: bool = True

    @property
    def grouped(self) -> bool:
        """Whether groups of inputs have a scale each, and not whole rows."""
        return self.weights["strategy"] == "group"

    def config(self, ignored: Collection[str], group_size: int = GROUP_INPUTS) -> dict[str, Any]:
        """The `quantization_config` of a directory in which the `ignored` linears, and the head, are not."""
        weights = {**self.weights, **({"group_size": group_size} if self.grouped else {})}
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
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
                size = settings.get("group_size")
                if part == "weights" and self.grouped and not (isinstance(size, int) and is_group_size(size)):
                    return f"weights.group_size = {size!r}"
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
W4A8 = Scheme(
    name="W4A8",
    format="int-quantized",
    dtype="I8",
    weights={"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False},
    inputs={**_INT8, "strategy": "token", "dynamic": True},
    summary="compressed-tensors int-quantized W4A8, weights symmetric per group of 4 to 128 inputs, inputs "
    "dynamic per token",
)
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP8_DYNAMIC = Scheme(
    name="FP8_DYNAMIC",
    format="float-quantized",
    dtype="F8_E4M3",
    weights={**_FP8, "strategy": "channel", "dynamic": False},
    inputs={**_FP8, "strategy": "token", "dynamic": True},
    summary="compressed-tensors float-quantized FP8, weights symmetric per channel, inputs dynamic per token",
    in_engine=False,
)
SCHEMES = {scheme.name: scheme for scheme in (W8A8, W4A8, FP8_DYNAMIC)}
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


def is_group_size(size: int) -> bool:
    """Whether groups of so many inputs can be read: 128 of them, or a power of two that is not tiny."""
    return LEAST_GROUP <= size <= GROUP_INPUTS and GROUP_INPUTS % size == 0


def group_size(columns: Mapping[str, int], ignore: str) -> int:
    """The largest group of at most 128 inputs that every linear (name -> inputs) divides into.

    compressed-tensors has no shorter last group. UnsupportedError names a linear that no group fits; `ignore`
    is the option that leaves it out.
    """
    for name, inputs in columns.items():
        if inputs % LEAST_GROUP:
            raise UnsupportedError(
                f"{name} has {inputs} inputs, which groups of {LEAST_GROUP} to {GROUP_INPUTS} do not divide; "
                f"W4A8 has a scale for each: use W8A8, which has one for each row, or {ignore} '{name}'"
            )
    size = GROUP_INPUTS
    while any(inputs % size for inputs in columns.values()):
        size //= 2
    return size


def scale_shape(config: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a quantized weight [N, K] in a directory with this `config.json`."""
    scheme = read_scheme(config, "config.json")
    if scheme is None or not scheme.grouped:
        return (shape[0], 1)
    groups = config["quantization_config"]["config_groups"].values()
    return (shape[0], -(-shape[1] // next(iter(groups))["weights"]["group_size"]))


def dequantized(q_NK: np.ndarray, scale_NG: np.ndarray) -> np.ndarray:
    """float32 [N, K]: integer weights times the scales of their rows, or of their rows' groups of inputs."""
    columns = q_NK.shape[1]
    return q_NK * np.repeat(scale_NG, -(-columns // scale_NG.shape[1]), axis=1)[:, :columns]


def e4m3_to_float32(patterns: np.ndarray) -> np.ndarray:
    """float32 of E4M3 bit patterns: 2^8 times float16, which has the same fields with more bits."""
    wide = (patterns & 0x80).astype(np.uint16) << 8 | (patterns & 0x7F).astype(np.uint16) << 7
    return wide.view(np.float16).astype(np.float32) * 256


def row_scales_and_multipliers(scale_NG: np.ndarray, inputs: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The engine's numbers for INT4 group scales: float32 [N], and uint8 [N, ceil(K / 128)] from 1 to 16.

    Their products are the scales, exactly. `inputs` is K. UnsupportedError, with the linear's `name`, where
    no such numbers exist; CheckpointError for scales that are not above 0.
    """
    if not (scale_NG > 0).all():
        raise CheckpointError(f"{name}.weight_scale is not above 0 somewhere; expected only such scales")
    each = GROUP_INPUTS * scale_NG.shape[1] // inputs  # stored scales of 128 inputs
    wide_NG = scale_NG[:, ::each].astype(np.float64)
    shared = np.array_equal(np.repeat(wide_NG, each, axis=1)[:, : scale_NG.shape[1]], scale_NG)
    row_N, multiplier_NG = np.zeros(len(wide_NG)), np.zeros(wide_NG.shape, np.uint8)
    for largest in range(MAX_MULTIPLIER, 0, -1):  # the smallest multipliers that do are found last
        unit_N1 = wide_NG.max(axis=1, keepdims=True) / largest
        whole_NG = np.rint(wide_NG / unit_N1)
        fits_N = ((whole_NG >= 1) & (whole_NG * unit_N1 == wide_NG)).all(axis=1)
        fits_N &= unit_N1[:, 0].astype(np.float32) == unit_N1[:, 0]
        row_N[fits_N], multiplier_NG[fits_N] = unit_N1[fits_N, 0], whole_NG[fits_N]
    if not shared or not (row_N > 0).all():
        raise UnsupportedError(
            f"{name}: the engine's INT4 has group scales that are 1 to {MAX_MULTIPLIER} times a number of "
            f"their row, one for {GROUP_INPUTS} inputs; these are not. vLLM runs them as they are; `gossamer "
            "quantize --scheme W4A8` of the model in floating point makes scales that both can run"
        )
    return row_N.astype(np.float32), multiplier_NG


def refuse_in_engine(scheme: Scheme, place: str) -> None:
    """Raise UnsupportedError if the engine has no kernels for the scheme."""
    if not scheme.in_engine:
        able = " or ".join(name for name, other in SCHEMES.items() if other.in_engine)
        raise UnsupportedError(
            f"{place}: quantized as {scheme.name}, which vLLM and transformers run on GPUs; Gossamer's "
            f"engine runs {able}: quantize the model in floating point with --scheme {able}"
        )
