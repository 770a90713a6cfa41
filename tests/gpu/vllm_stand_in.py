"""As much of vLLM as our plugin touches, with the signatures of vLLM 0.32, where vLLM is not installed.

Parameters know how to load their share of a tensor, linears make them by their quantization's method, and
what is made on "meta" has memory, and is processed, when all of a layer has been read. One module stands for
all of vLLM's that are named in `MODULES`. `make vllm-test` runs the same tests on vLLM itself.
"""

import inspect
import logging
from functools import lru_cache, wraps
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = {
    "vllm": ("__version__",),
    "vllm.config": ("get_current_vllm_config_or_none",),
    "vllm.logger": ("init_logger",),
    "vllm.platforms": ("current_platform",),
    "vllm.model_executor": (),
    "vllm.model_executor.parameter": ("ModelWeightParameter", "ChannelQuantScaleParameter"),
    "vllm.model_executor.layers": (),
    "vllm.model_executor.layers.linear": (
        "LinearBase", "LinearMethodBase", "UnquantizedLinearMethod", "ColumnParallelLinear",
        "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear",
        "register_weight_loader_v2_supported_method",
    ),
    "vllm.model_executor.layers.attention_layer_base": ("AttentionLayerBase",),
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding", "ParallelLMHead"),
    "vllm.model_executor.layers.quantization": (
        "QUANTIZATION_METHODS", "get_quantization_config", "register_quantization_config",
    ),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
    "vllm.model_executor.model_loader": (),
    "vllm.model_executor.model_loader.reload": (),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "initialize_online_processing", "finalize_layerwise_processing",
    ),
}  # fmt: skip

__version__ = "0.32.0"
QUANTIZATION_METHODS = ["compressed-tensors"]
WEIGHT_LOADER_V2_SUPPORTED = ["UnquantizedLinearMethod"]
CONFIGS = {}
READING = WeakKeyDictionary()
current_platform = SimpleNamespace(is_cuda=lambda: False, get_device_capability=lambda: None)


class _Logger(logging.Logger):
    @lru_cache  # noqa: B019
    def warning_once(self, msg, *args, scope="local"):
        self.warning(msg, *args)


@lru_cache
def init_logger(name):
    return _Logger(name)


def get_tensor_model_parallel_rank():
    return 0


def get_tensor_model_parallel_world_size():
    return 1


def get_current_vllm_config_or_none():
    return None


# --- layers/quantization


class QuantizeMethodBase:
    uses_meta_device = False

    def create_weights(self, layer, *weight_args, **extra_weight_attrs):
        raise NotImplementedError

    def apply(self, layer, *args, **kwargs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        return


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}

    def get_name(self):
        raise NotImplementedError

    def get_supported_act_dtypes(self):
        raise NotImplementedError

    @classmethod
    def get_min_capability(cls):
        raise NotImplementedError

    @staticmethod
    def get_config_filenames():
        raise NotImplementedError

    @classmethod
    def from_config(cls, config):
        raise NotImplementedError

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
        return None

    def get_quant_method(self, layer, prefix):
        raise NotImplementedError


def register_quantization_config(quantization):
    def wrapper(quant_config_cls):
        if quantization in QUANTIZATION_METHODS:
            init_logger("vllm").warning("already exists and will be overwritten")
        else:
            QUANTIZATION_METHODS.append(quantization)
        assert issubclass(quant_config_cls, QuantizationConfig)
        CONFIGS[quantization] = quant_config_cls
        return quant_config_cls

    return wrapper


def get_quantization_config(quantization):
    return CONFIGS[quantization]


# --- parameter


class BasevLLMParameter(Parameter):
    def __new__(cls, data, **kwargs):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data, weight_loader):
        self.weight_loader = weight_loader
        self.tp_rank = get_tensor_model_parallel_rank()

    def load_row_parallel_weight(self, loaded_weight):
        assert self.data.shape == loaded_weight.shape
        self.data.copy_(loaded_weight)


class _ColumnvLLMParameter(BasevLLMParameter):
    def __init__(self, output_dim, **kwargs):
        self.output_dim = output_dim
        super().__init__(**kwargs)

    def _load(self, place, loaded_weight, rank):
        begin = rank * place.shape[self.output_dim]
        place.copy_(loaded_weight.narrow(self.output_dim, begin, place.shape[self.output_dim]))

    def load_column_parallel_weight(self, loaded_weight):
        self._load(self.data, loaded_weight, self.tp_rank)

    def load_merged_column_weight(self, loaded_weight, **kwargs):
        place = self.data.narrow(self.output_dim, kwargs["shard_offset"], kwargs["shard_size"])
        self._load(place, loaded_weight, self.tp_rank)

    def load_qkv_weight(self, loaded_weight, **kwargs):
        rank = self.tp_rank if kwargs["shard_id"] == "q" else self.tp_rank // kwargs["num_heads"]
        place = self.data.narrow(self.output_dim, kwargs["shard_offset"], kwargs["shard_size"])
        self._load(place, loaded_weight, rank)


class RowvLLMParameter(BasevLLMParameter):
    def __init__(self, input_dim, **kwargs):
        self.input_dim = input_dim
        super().__init__(**kwargs)

    def load_row_parallel_weight(self, loaded_weight):
        begin = self.tp_rank * self.data.shape[self.input_dim]
        self.data.copy_(loaded_weight.narrow(self.input_dim, begin, self.data.shape[self.input_dim]))


class ModelWeightParameter(_ColumnvLLMParameter, RowvLLMParameter):
    pass


class ChannelQuantScaleParameter(_ColumnvLLMParameter):
    pass


# --- model_loader/reload/layerwise


class _Counting(TorchDispatchMode):
    """Counts the numbers of a layer that are loaded: its share of a tensor."""

    def __init__(self, reading):
        super().__init__()
        self.reading = reading

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.reading.num += args[0].numel()
        return func(*args, **(kwargs or {}))


class _Reading:
    """A layer whose tensors are kept until there are as many numbers as it has; then it is made of them."""

    def __init__(self, layer):
        self.layer, self.read, self.num, self.done = layer, [], 0, False
        self.wrap()

    def wrap(self):
        for name, param in self.layer.named_parameters():
            if param.weight_loader.__name__ != "online_process_loader":
                param.weight_loader = self.keeping(name, param.weight_loader)

    def keeping(self, name, load):
        signature = inspect.signature(load)

        @wraps(load, assigned=("__doc__", "__annotations__"))
        def online_process_loader(*args, **kwargs):
            self.wrap()  # what was made since, such as a bias
            bound = signature.bind(*args, **kwargs)
            self.read.append((name, load, bound))
            with _Counting(self):
                load(*args, **kwargs)  # into what has no memory yet
            if self.num >= sum(it.numel() for it in self.layer.parameters()):
                self.finish()

        return online_process_loader

    def finish(self):
        for name, param in dict(self.layer.named_parameters()).items():
            if param.is_meta:
                real = torch.empty_like(param.data, device="cpu")
                real.__class__, real.__dict__ = param.__class__, param.__dict__.copy()
                setattr(self.layer, name, real)
        for name, load, bound in self.read:
            bound.arguments["param"] = getattr(self.layer, name)
            load(*bound.args, **bound.kwargs)
        self.done = True
        self.layer.quant_method.process_weights_after_loading(self.layer)


def initialize_online_processing(layer):
    READING[layer] = _Reading(layer)


def finalize_layerwise_processing(model, model_config):
    for layer in model.modules():
        if layer in READING and not READING[layer].done:
            READING[layer].finish()


# --- layers


class AttentionLayerBase:
    pass


class VocabParallelEmbedding(nn.Module):
    pass


class ParallelLMHead(VocabParallelEmbedding):
    pass


class LinearMethodBase(QuantizeMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        raise NotImplementedError

    def apply(self, layer, x, bias=None):
        raise NotImplementedError


class UnquantizedLinearMethod(LinearMethodBase):
    pass


def register_weight_loader_v2_supported_method(cls):
    WEIGHT_LOADER_V2_SUPPORTED.append(cls.__name__)
    return cls


class LinearBase(nn.Module):
    pass


class _Linear(LinearBase):
    def __init__(self, input_size, output_sizes, bias, quant_config, prefix):
        super().__init__()
        self.prefix = prefix
        self.tp_rank, self.tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert type(self.quant_method).__name__ in WEIGHT_LOADER_V2_SUPPORTED
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=output_sizes,
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.get_default_dtype(),
            weight_loader=self.weight_loader_v2,
        )
        self.bias = Parameter(torch.empty(sum(output_sizes)), requires_grad=False) if bias else None
        if bias:
            self.bias.weight_loader = self.weight_loader

    def weight_loader(self, param, loaded_weight):
        param.data.copy_(loaded_weight)

    def forward(self, input_):
        bias = self.bias if self.tp_rank == 0 or not isinstance(self, RowParallelLinear) else None
        return self.quant_method.apply(self, input_, bias), None


class ColumnParallelLinear(_Linear):
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
        share = output_size // get_tensor_model_parallel_world_size()
        super().__init__(input_size, [share], bias, quant_config, prefix)

    def weight_loader_v2(self, param, loaded_weight):
        param.load_column_parallel_weight(loaded_weight=loaded_weight)


class MergedColumnParallelLinear(_Linear):
    def __init__(self, input_size, output_sizes, bias=True, quant_config=None, prefix=""):
        self.shares = [size // get_tensor_model_parallel_world_size() for size in output_sizes]
        super().__init__(input_size, self.shares, bias, quant_config, prefix)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None):
        place = {
            "shard_offset": sum(self.shares[:loaded_shard_id]),
            "shard_size": self.shares[loaded_shard_id],
        }
        param.load_merged_column_weight(loaded_weight=loaded_weight, shard_id=loaded_shard_id, **place)


class QKVParallelLinear(_Linear):
    def __init__(
        self,
        hidden_size,
        head_size,
        total_num_heads,
        total_num_kv_heads=None,
        bias=True,
        quant_config=None,
        prefix="",
    ):
        size = get_tensor_model_parallel_world_size()
        kv_heads = max(1, total_num_kv_heads // size)
        self.replicas = max(1, size // total_num_kv_heads)
        heads = {"q": total_num_heads // size, "k": kv_heads, "v": kv_heads}
        self.shares = {name: num * head_size for name, num in heads.items()}
        super().__init__(hidden_size, list(self.shares.values()), bias, quant_config, prefix)

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id=None):
        before = "qkv".index(loaded_shard_id)
        offset, size = sum(list(self.shares.values())[:before]), self.shares[loaded_shard_id]
        param.load_qkv_weight(
            loaded_weight=loaded_weight,
            num_heads=self.replicas,
            shard_id=loaded_shard_id,
            shard_offset=offset,
            shard_size=size,
        )


class RowParallelLinear(_Linear):
    def __init__(self, input_size, output_size, bias=True, quant_config=None, prefix=""):
        share = input_size // get_tensor_model_parallel_world_size()
        super().__init__(share, [output_size], bias, quant_config, prefix)

    def weight_loader_v2(self, param, loaded_weight):
        param.load_row_parallel_weight(loaded_weight=loaded_weight)
