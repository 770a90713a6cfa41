"""Sparse linears in transformers' models: `from_pretrained(directory, quantization_config=GossamerConfig())`.

The directory stays what it is, bfloat16, W8A8 or W4A8 with its zeros stored. Its linears are loaded as they
are, and packed where they lie, one after another: so the most memory is that of the dense model, and what
`packing_bytes` says of a linear.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.schemes import W4A8, W8A8, read_scheme, row_scales_and_multipliers, scale_shape
from gossamer.errors import UnsupportedError
from gossamer.gpu import found, hosts
from gossamer.gpu.directory import left_in_floats, matches
from gossamer.gpu.linear import SparseLinear, nothing_gained, while_packing

METHOD, OURS = "gossamer", "gossamer.gpu.GossamerConfig"
TESTED = (5, 19), (5, 23)  # of transformers
_log = logging.get_logger(__name__)


class GossamerConfig(QuantizationConfigMixin):
    """How the linears of a directory are to be held on the device."""

    def __init__(self, keep_dense: bool = False, stored: Mapping[str, Any] | None = None, **_: Any) -> None:
        """`keep_dense`: twice, for prompts at a dense product's speed.

        `stored`: the directory's own `quantization_config`; None of one in bfloat16. UnsupportedError where
        transformers is too old.
        """
        hosts.check_version("transformers", transformers.__version__, TESTED, OURS, _log.warning_once)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.keep_dense, self.stored = keep_dense, stored

    def for_directory(self, found: Any) -> "GossamerConfig":
        """The same for a directory with this `quantization_config`; UnsupportedError for other schemes."""
        found = found if isinstance(found, dict) else found.to_dict()
        if found.get("quant_method") == METHOD:
            return self
        left_in_floats(found, [W8A8, W4A8], by=OURS)
        return GossamerConfig(self.keep_dense, found)


class LoadedIntegers(nn.Module):
    """A linear as a W8A8 or W4A8 directory has it, until it is packed; scales [N, 1], or of groups [N, G]."""

    def __init__(self, of: nn.Linear, scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        device = of.weight.device
        self.weight = _fixed(torch.empty(of.weight.shape, dtype=torch.int8, device=device))
        self.weight_scale = _fixed(torch.empty(scale_shape, dtype=torch.float32, device=device))
        self.bias = of.bias


class GossamerQuantizer(HfQuantizer):
    """transformers' way to replace a model's linears."""

    def __init__(self, config: GossamerConfig, **how: Any) -> None:
        super().__init__(config, **how)
        self._config = config

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """UnsupportedError for weights that would lie in files, on several kinds of devices, or on no GPU.

        Kernels are compiled and loaded here, as `check_kernels` has it, before a weight is read.
        """
        places = {str(it) for it in device_map.values()} if isinstance(device_map, dict) else set[str]()
        if places & {"disk", "cpu"} and len(places) > 1:
            raise UnsupportedError(
                f"found a device_map with {', '.join(sorted(places))}; supported: GPUs alone"
            )
        why = found.why_no_gpu()
        count = 0 if why else torch.cuda.device_count()
        if isinstance(device_map, str):  # such as auto, which takes all
            places = {str(index) for index in range(count)}
        for place in sorted(it for it in places if it.isdecimal() or it.startswith("cuda")):
            index = place.rpartition(":")[2]
            if int(index if index.isdecimal() else 0) >= count:
                there = f"no GPU was found: {why}" if why else f"supported: GPUs that are there, {count}"
                raise UnsupportedError(f"found a device_map with {place}; {there}")
            found.check_kernels(int(index) if index.isdecimal() else None)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The types of quantized tensors are their modules'."""
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for path, name, linear in [*_linears(model)]:
            if self._is_quantized(f"{path}.{name}"):
                scales = scale_shape(self._directory, linear.weight.shape)
                setattr(model.get_submodule(path), name, LoadedIntegers(linear, scales))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        dense = total = 0
        for path, name in [(parent, name) for parent, name, _ in _linears(model)]:  # which keeps no weights
            parent = model.get_submodule(path)
            sparse = self._packed(f"{path}.{name}", getattr(parent, name))
            setattr(parent, name, sparse)
            dense, total = dense + sparse.is_dense, total + 1
        if dense:
            _log.warning("%s", nothing_gained(dense, total))
        if model.device.type == "cpu":
            _log.warning_once(hosts.slow_on_cpu(OURS))
        return model

    def _packed(self, name: str, linear: nn.Linear | LoadedIntegers) -> SparseLinear:
        weight: Tensor = linear.weight.data
        scales_N = multiplier_NS = None
        if isinstance(linear, LoadedIntegers):
            scales_N, multiplier_NS = self._scales(name, weight.shape[1], linear.weight_scale.data)
        elif weight.dtype != torch.bfloat16:
            raise UnsupportedError(
                f"{name}: found weights of {weight.dtype}; supported: bfloat16 (dtype=torch.bfloat16), W8A8 "
                "and W4A8"
            )
        bias = None if linear.bias is None else linear.bias.data
        keep_dense = self._config.keep_dense
        with while_packing(name, weight, is_int4=multiplier_NS is not None, keep_dense=keep_dense):
            return SparseLinear.from_weight(
                weight, scales_N, bias, multiplier_NS=multiplier_NS, keep_dense=keep_dense
            )

    def _scales(self, name: str, inputs: int, scale_NG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of rows [N] and, of INT4, multipliers [N, S]; UnsupportedError where there are none."""
        if read_scheme(self._directory, name) is W8A8:
            return scale_NG[:, 0], None
        found = row_scales_and_multipliers(scale_NG.cpu().numpy(), inputs, name)
        scale_N, multiplier_NS = (torch.from_numpy(it).to(scale_NG.device) for it in found)
        return scale_N, multiplier_NS

    def _is_quantized(self, name: str) -> bool:
        stored = self._config.stored
        return stored is not None and not any(matches(it, name) for it in stored.get("ignore") or ())

    @property
    def _directory(self) -> dict[str, Any]:
        return {"quantization_config": self._config.stored}

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
        if path.startswith(prefixes) and isinstance(module, nn.Linear | LoadedIntegers):
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
