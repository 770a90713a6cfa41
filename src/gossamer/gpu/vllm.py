"""vLLM's way in: `vllm serve DIR --quantization gossamer`, where this package is installed beside vLLM.

Every process of every vLLM that finds us installed imports this module and calls `register`, whatever it
serves: so neither vLLM nor torch is imported before that call.
"""

# pyright: reportMissingImports=false

NAME = "gossamer"
LOGGER = "vllm.gossamer"  # vLLM shows what is said by loggers under its own name


def register() -> None:
    """Make `--quantization gossamer` known to vLLM, which may ask for that more than once in a process."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if NAME not in QUANTIZATION_METHODS:
        from gossamer.gpu.vllm_config import SparseConfig

        register_quantization_config(NAME)(SparseConfig)
