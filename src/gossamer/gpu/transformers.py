"""Sparse linears in transformers' models: `from_pretrained(directory, quantization_config=GossamerConfig())`.

The directory stays what it is, bfloat16 or W8A8 with its zeros stored. Its linears are loaded as they are,
and packed where they lie, one after another: so the most memory is that of the dense model.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.architecture.families import read_anatomy
from gossamer.errors import UnsupportedError
from gossamer.gpu.directory import left_in_floats, matches
from gossamer.gpu.linear import LEAST_ZEROS, SparseLinear, while_packing

METHOD = "gossamer"
_log = logging.getLogger(__name__)


class GossamerConfig(QuantizationConfigMixin):
    """How the linears of a directory are to be held on the device."""

    def __init__(self, keep_dense: bool = False, ignored: Sequence[str] | None = None, **_: Any) -> None:
        """`keep_dense`: twice, for prompts at a dense product's speed.

        `ignored`: of a W8A8 directory, what it says of linears that are not INT8; None of one in bfloat16.
        """
        self.quant_method = METHOD  # type: ignore[assignment]
        self.keep_dense, self.ignored = keep_dense, ignored

    def for_directory(self, found: Any) -> "GossamerConfig":
        """The same for a directory with this `quantization_config`; UnsupportedError unless it is W8A8."""
        found = found if isinstance(found, dict) else found.to_dict()
        if found.get("quant_method") == METHOD:
            return self
        return GossamerConfig(self.keep_dense, left_in_floats(found))


class LoadedInt8(nn.Module):
    """A linear as a W8A8 directory has it, until it is packed."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        shape, device = of.weight.shape, of.weight.device
        self.weight = _fixed(torch.empty(shape, dtype=torch.int8, device=device))
        self.weight_scale = _fixed(torch.empty(shape[0], 1, dtype=torch.float32, device=device))
        self.bias = of.bias


class GossamerQuantizer(HfQuantizer):
    """transformers' way to replace a model's linears."""

    def __init__(self, config: GossamerConfig, **how: Any) -> None:
        super().__init__(config, **how)
        self._config = config

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """UnsupportedError for weights that would lie in files or on several kinds of devices."""
        places = set(device_map.values()) if isinstance(device_map, dict) else set[Any]()
        if places & {"disk", "cpu"} and len(places) > 1:
            raise UnsupportedError(
                f"found a device_map with {', '.join(sorted(map(str, places)))}; supported: GPUs alone"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The types of W8A8's tensors are their modules'."""
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for path, name, linear in [*_linears(model)]:
            if self._is_int8(f"{path}.{name}"):
                setattr(model.get_submodule(path), name, LoadedInt8(linear))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        dense = total = 0
        for path, name in [(parent, name) for parent, name, _ in _linears(model)]:  # which keeps no weights
            parent = model.get_submodule(path)
            sparse = self._packed(f"{path}.{name}", getattr(parent, name))
            setattr(parent, name, sparse)
            dense, total = dense + sparse.is_dense, total + 1
        if dense:
            _log.warning(
                "%d of %d linears have fewer than %.0f%% zeros and stay dense: nothing is gained",
                dense, total, 100 * LEAST_ZEROS,
            )  # fmt: skip
        return model

    def _packed(self, name: str, linear: nn.Linear | LoadedInt8) -> SparseLinear:
        weight: Tensor = linear.weight.data
        scales = linear.weight_scale.data[:, 0] if isinstance(linear, LoadedInt8) else None
        if scales is None and weight.dtype != torch.bfloat16:
            raise UnsupportedError(
                f"{name}: found weights of {weight.dtype}; supported: bfloat16 (dtype=torch.bfloat16), W8A8"
            )
        bias = None if linear.bias is None else linear.bias.data
        with while_packing(name, weight):
            return SparseLinear.from_weight(weight, scales, bias, keep_dense=self._config.keep_dense)

    def _is_int8(self, name: str) -> bool:
        ignored = self._config.ignored
        return ignored is not None and not any(matches(it, name) for it in ignored)

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return False


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, str, Any]]:
    """(parent's path, name in it, linear) of the layers; UnsupportedError for a family that is not known."""
    anatomy = read_anatomy(json.loads(model.config.to_json_string(use_diff=False)), "the model")
    prefixes = tuple({anatomy.prefix(index) for index in range(anatomy.num_layers)})
    for path, module in model.named_modules():
        if path.startswith(prefixes) and isinstance(module, nn.Linear | LoadedInt8):
            parent, _, name = path.rpartition(".")
            yield parent, name, module


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


_merge = AutoHfQuantizer.merge_quantization_configs


def _merged(found: Any, given: Any) -> Any:
    """transformers has no hook for running in another way what a directory's own method made."""
    return given.for_directory(found) if isinstance(given, GossamerConfig) else _merge(found, given)


register_quantization_config(METHOD)(GossamerConfig)
register_quantizer(METHOD)(GossamerQuantizer)
AutoHfQuantizer.merge_quantization_configs = staticmethod(_merged)  # type: ignore[method-assign]
