"""Which models vLLM gives to Gossamer, and which of their linears: what `--quantization gossamer` means.

A directory says nothing of us, in bfloat16 or W8A8: without the option vLLM runs it by kernels of its own.
What vLLM calls a quantization is what makes room for the weights of linears and computes with them.
"""

# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from gossamer.checkpoint.schemes import W8A8
from gossamer.errors import UnsupportedError
from gossamer.gpu import compiler, hosts
from gossamer.gpu.directory import left_in_floats, matches
from gossamer.gpu.vllm import LOGGER, NAME
from gossamer.gpu.vllm_tally import Tally

TESTED = (0, 22), (0, 33)  # of vLLM; those before lose biases of linears that are packed as they load
LEAST_CAPABILITY = 80


class SparseConfig(QuantizationConfig):
    """Linears without their zeros. Embeddings, the head, attention and `ignored` linears are vLLM's."""

    def __init__(self, ignored: Sequence[str] | None = None) -> None:
        """`ignored`: of a W8A8 directory, what it says of linears that are not INT8; None of one in bfloat16.

        vLLM itself calls it without arguments, for a directory that is not quantized. UnsupportedError for a
        vLLM that is too old, or a GPU for which there are no kernels.
        """
        super().__init__()
        check_version(vllm.__version__)
        _check_kernels()
        self.ignored, self.tally = ignored, Tally()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SparseConfig":
        """Of a directory's `quantization_config`; UnsupportedError for any scheme but W8A8."""
        return cls(_left_in_floats(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, **_: Any
    ) -> str | None:
        """Claims a directory's scheme where a person asked for us; UnsupportedError if it is not W8A8."""
        if user_quant != NAME:
            return None
        _left_in_floats(hf_quant_cfg)
        return NAME

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What computes a layer, by its name; None leaves it to vLLM. UnsupportedError for experts."""
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from gossamer.gpu.vllm_linear import SparseLinearMethod

        if isinstance(layer, (VocabParallelEmbedding, AttentionLayerBase)):
            return None
        if not isinstance(layer, LinearBase):
            raise UnsupportedError(
                f"{prefix}: found {type(layer).__name__}; supported by --quantization {NAME}: models whose "
                "weights are linears and embeddings"
            )
        if self._ignores(prefix):
            return UnquantizedLinearMethod()
        return SparseLinearMethod(self.tally, is_int8=self.ignored is not None)

    def _ignores(self, prefix: str) -> bool:
        """Of a linear that vLLM fuses the directory has the parts, which must be alike."""
        place, dot, last = prefix.rpartition(".")
        names = [f"{place}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]
        found = [name for name in names if any(matches(it, name) for it in self.ignored or ())]
        if found and len(found) < len(names):
            raise UnsupportedError(
                f"{', '.join(found)}: not quantized, but other parts of {prefix} are, and vLLM multiplies "
                "them as one; supported: all of them, or none: see `gossamer quantize --ignore`"
            )
        return bool(found)

    def get_name(self) -> str:
        """As the option has it."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of inputs that the operator takes."""
        return [torch.bfloat16] if self.ignored is None else [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The first GPUs that copy to shared memory beside their work."""
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in `config.json`."""
        return []


def check_version(version: str) -> None:
    """As `hosts.check_version` has it."""
    hosts.check_version("vLLM", version, TESTED, f"--quantization {NAME}", init_logger(LOGGER).warning_once)


def _check_kernels() -> None:
    """They are compiled before a weight is read; without a context of CUDA, since vLLM may fork."""
    if current_platform.is_cuda() and (found := current_platform.get_device_capability()):
        compiler.cubin((found.major, found.minor))


def _left_in_floats(found: Mapping[str, Any]) -> list[str]:
    return left_in_floats(found, [W8A8], by=f"vLLM's --quantization {NAME}")
