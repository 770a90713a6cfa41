"""What computes a linear of vLLM: its weights are packed as soon as they are loaded, layer by layer.

vLLM fuses q, k and v, and gate and up, and gives every GPU its share of them, before we see any weights: so
whatever rows and columns come here are packed as one matrix, of any size. What they lack of 16 outputs and
128 inputs costs bits of masks. Of a linear whose inputs are shared out (o, down), every GPU rounds its own
inputs, as vLLM's own kernels for W8A8 do.

Shapes: N outputs and K inputs on this GPU.
"""

# pyright: reportMissingImports=false

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.gpu.linear import SparseLinear, while_packing
from gossamer.gpu.numbered import number_of
from gossamer.gpu.vllm import NAME
from gossamer.gpu.vllm_tally import Tally


@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """vLLM asks one for each linear, INT8 or in the model's own type; all of a model share a tally."""

    uses_meta_device = True

    def __init__(self, tally: Tally, is_int8: bool) -> None:
        self.tally, self.is_int8 = tally, is_int8
        self.num_parts, self.parts_read = 0, dict[str, set[Any]]()  # such as q, k and v; by parameter

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Places for the weights and scales of this GPU, without memory until all of them have been read."""
        rows, load = sum(output_partition_sizes), extra_weight_attrs["weight_loader"]
        dtype = torch.int8 if self.is_int8 else params_dtype
        w_NK = torch.empty(rows, input_size_per_partition, dtype=dtype, device="meta")
        load_weight = self._noting("weight", of_int8(load) if self.is_int8 else load)
        weight = ModelWeightParameter(data=w_NK, input_dim=1, output_dim=0, weight_loader=load_weight)
        layer.register_parameter("weight", weight)
        if self.is_int8:
            scale_N1 = torch.empty(rows, 1, dtype=torch.float32, device="meta")
            load_scale = self._noting("weight_scale", load)
            scale = ChannelQuantScaleParameter(data=scale_N1, output_dim=0, weight_loader=load_scale)
            layer.register_parameter("weight_scale", scale)
        initialize_online_processing(layer)
        config = get_current_vllm_config_or_none()
        is_made_up = config is not None and config.load_config.load_format == "dummy"
        self.num_parts = 0 if is_made_up else len(output_partition_sizes)
        self.tally.num_linears += 1

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what was loaded, where it lies, and let go of it. vLLM calls it twice.

        UnsupportedError for new weights of a linear that is packed, CheckpointError where the directory lacks
        some, MemoryError where memory ends.
        """
        if getattr(layer, "weight", None) is None:
            return
        if hasattr(layer, "sparse"):
            raise UnsupportedError(
                f"found new weights for a running model; --quantization {NAME} packs them once, in a size "
                "that their zeros decide: start vLLM anew"
            )
        self._check_whole(layer.prefix)
        w_NK, scales_N = layer.weight.data, None
        del layer.weight
        if self.is_int8:
            scales_N = layer.weight_scale.data.flatten()
            del layer.weight_scale
        with while_packing(layer.prefix, w_NK):
            layer.sparse = SparseLinear.from_weight(w_NK, scales_N)
        layer.register_buffer("number", number_of(layer.sparse), persistent=False)
        self.tally.add(w_NK, layer.sparse)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] of x [..., K], by one operator whatever the number of tokens, alike in all layers."""
        y = torch.ops.gossamer.numbered_linear(x, layer.number, layer.sparse.out_features)
        return y if bias is None else y + bias

    def _noting(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's function that fills a parameter, so that it is known which tensors came; None is all."""
        read = self.parts_read[name] = set()

        @functools.wraps(load)
        def noting(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
            part = shard[0] if shard else named.get("loaded_shard_id")
            read.update(part if isinstance(part, tuple) else [part])
            return load(param, loaded_weight, *shard, **named)

        return noting

    def _check_whole(self, prefix: str) -> None:
        """CheckpointError for what was not read: vLLM would take memory as it happens to be."""
        for name, read in self.parts_read.items():
            if None not in read and len(read) < self.num_parts:
                raise CheckpointError(
                    f"{prefix}.{name}: found {len(read)} of its {self.num_parts} tensors in the directory's "
                    "files; expected all of them: see `gossamer verify`"
                )


def of_int8(load: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's function that copies weights into place, which would convert others to INT8: for INT8 alone."""

    @functools.wraps(load)
    def checked(param: Tensor, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
        if loaded_weight.dtype != torch.int8:
            raise CheckpointError(
                f"found weights {tuple(loaded_weight.shape)} of {loaded_weight.dtype} in a W8A8 directory, "
                "of a linear that config.json does not ignore; expected torch.int8: see `gossamer verify`"
            )
        return load(param, loaded_weight, *shard, **named)

    return checked
