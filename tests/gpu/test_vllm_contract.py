"""What vLLM asks of the plugin and what the plugin asks of vLLM: of vLLM itself where it is installed.

Elsewhere vllm_stand_in.py is in its place.
"""

import importlib
import importlib.util
import inspect
import logging
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.checkpoint.schemes import FP8_DYNAMIC, W4A8, W8A8
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.gpu import vllm as entry
from gossamer.gpu.linear import SparseLinear
from gpu import vllm_stand_in
from gpu.test_layout import random_weights

REAL = importlib.util.find_spec("vllm") is not None
OURS = ("gossamer.gpu.vllm_config", "gossamer.gpu.vllm_linear", "gossamer.gpu.vllm_tally")
HIDDEN, HEAD = 200, 12  # neither they nor their halves are in 16s or 128s


@pytest.fixture(autouse=True, scope="module")
def _vllm() -> Iterator[None]:
    """vLLM, or what stands for it while these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        if not REAL:
            for name in vllm_stand_in.MODULES:
                patch.setitem(sys.modules, name, vllm_stand_in)
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in OURS:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out(monkeypatch, 0, 1)


def share_out(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """What vLLM would learn of torch's process groups."""
    for module in ("linear", "parameter"):
        place = of_vllm("layers.linear" if module == "linear" else module)
        monkeypatch.setattr(place, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(place, "get_tensor_model_parallel_world_size", lambda: size)


def of_vllm(name: str) -> ModuleType:
    return importlib.import_module(f"vllm.model_executor.{name}")


def linears() -> ModuleType:
    return of_vllm("layers.linear")


@pytest.fixture
def config() -> Any:
    from gossamer.gpu.vllm_config import SparseConfig

    made = SparseConfig.from_config(W8A8.config(["model.layers.3.mlp.down_proj"]))
    made.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
    }  # fmt: skip
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Levels and words of what the plugin says in vLLM's log."""
    records: list[tuple[int, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append((record.levelno, record.getMessage()))

    logger = importlib.import_module("vllm.logger").init_logger(entry.LOGGER)
    monkeypatch.setattr(logger, "handlers", [Keep()])
    logger.setLevel(logging.INFO)
    return records


def tensors(rows: int, columns: int = HIDDEN, *, zeros: float = 0.7) -> tuple[Tensor, Tensor]:
    """Weights int8 [N, K] and scales [N, 1] as a W8A8 directory has them."""
    scale_N1 = torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)) / 10 + 0.001
    return torch.from_numpy(random_weights(rows, columns, zeros=zeros)), scale_N1


def load(layer: nn.Module, *parts: tuple[Tensor, Tensor], ids: tuple[Any, ...] = ()) -> nn.Module:
    """As vLLM's loader does it: by the parameters that the layer had at first, tensor after tensor."""
    places = dict(layer.named_parameters())
    shards = [(it,) for it in ids] or [()]
    for (w_NK, scale_N1), shard in zip(parts, shards, strict=True):
        places["weight"].weight_loader(places["weight"], w_NK, *shard)
        places["weight_scale"].weight_loader(places["weight_scale"], scale_N1, *shard)
    return finish(layer)


def finish(layer: nn.Module) -> nn.Module:
    """What vLLM does after the last tensor: layers that lack something, and then all of them once more."""
    of_vllm("model_loader.reload.layerwise").finalize_layerwise_processing(layer, None)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def qkv(config: Any, *, bias: bool = False) -> nn.Module:
    return linears().QKVParallelLinear(
        HIDDEN, HEAD, 4, 2, bias=bias, quant_config=config, prefix="model.layers.0.self_attn.qkv_proj"
    )


def down(config: Any, *, bias: bool = False) -> nn.Module:
    prefix = "model.layers.0.mlp.down_proj"
    return linears().RowParallelLinear(HIDDEN, 40, bias=bias, quant_config=config, prefix=prefix)


def ours(*parts: tuple[Tensor, Tensor], inputs: slice = slice(None)) -> SparseLinear:
    """One linear of ours with the outputs of all parts."""
    w_NK, scale_N1 = (torch.cat(it) for it in zip(*parts, strict=True))
    return SparseLinear.from_weight(w_NK[:, inputs], scale_N1.flatten())


def x_TK(tokens: int = 5, inputs: int = HIDDEN) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(tokens))


def test_importing_the_entry_point_imports_neither_vllm_nor_torch() -> None:
    """Every vLLM that finds this package does it in every process."""
    program = "import sys, gossamer.gpu.vllm; print({'vllm', 'torch', 'numpy'} & set(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "set()"


def test_the_package_says_where_vllm_finds_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    points = {
        name: point.split(":") for name, point in project["entry-points"]["vllm.general_plugins"].items()
    }
    assert [getattr(importlib.import_module(it[0]), it[1]) for it in points.values()] == [entry.register]


def test_registering_twice_is_registering_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older vLLMs warn of what is registered again."""
    quantization, names = of_vllm("layers.quantization"), []
    register = quantization.register_quantization_config
    monkeypatch.setattr(
        quantization, "register_quantization_config", lambda name: names.append(name) or register(name)
    )
    if "gossamer" in quantization.QUANTIZATION_METHODS:
        quantization.QUANTIZATION_METHODS.remove("gossamer")
    entry.register()
    entry.register()
    from gossamer.gpu.vllm_config import SparseConfig

    assert names == ["gossamer"] and quantization.QUANTIZATION_METHODS.count("gossamer") == 1
    assert quantization.get_quantization_config("gossamer") is SparseConfig


@pytest.mark.parametrize("user", [None, "compressed-tensors", "fp8"])
@pytest.mark.parametrize(
    "found", [W8A8.config([]), {"quant_method": "gptq", "bits": 4}], ids=["W8A8", "GPTQ"]
)
def test_nothing_is_claimed_that_nobody_gave_us(user: str | None, found: dict[str, Any]) -> None:
    from gossamer.gpu.vllm_config import SparseConfig

    assert SparseConfig.override_quantization_method(found, user, hf_config=None) is None


def test_a_directory_of_ours_is_claimed_for_who_asks() -> None:
    """vLLM adds words of its own to what the directory says."""
    from gossamer.gpu.vllm_config import SparseConfig

    found = W8A8.config([]) | {"total_num_heads": 4, "total_num_kv_heads": 2}
    assert SparseConfig.override_quantization_method(found, "gossamer", hf_config=None) == "gossamer"
    assert SparseConfig.from_config(found).get_name() == "gossamer"


REFUSED = {
    "W4A8": (
        W4A8.config([]),
        "quantized as W4A8; supported by vLLM's --quantization gossamer: W8A8, and models in bfloat16",
    ),
    "FP8": (
        FP8_DYNAMIC.config([]),
        "quantized as FP8_DYNAMIC; supported by vLLM's --quantization gossamer: W8A8",
    ),
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, r"GPTQ \(4 bits\)"),
    "cache": (W8A8.config([]) | {"kv_cache_scheme": {"num_bits": 8}}, "a kv_cache_scheme"),
}


@pytest.mark.parametrize(("found", "says"), REFUSED.values(), ids=REFUSED)
def test_other_schemes_are_refused_by_name(found: dict[str, Any], says: str) -> None:
    from gossamer.gpu.vllm_config import SparseConfig

    with pytest.raises(UnsupportedError, match=says):
        SparseConfig.override_quantization_method(found, "gossamer", hf_config=None)
    with pytest.raises(UnsupportedError, match=says):
        SparseConfig.from_config(found)


def test_a_model_that_is_not_quantized_needs_no_file() -> None:
    """vLLM asks for names of files, and without any makes one without arguments."""
    from gossamer.gpu.vllm_config import SparseConfig

    assert SparseConfig.get_config_filenames() == []
    assert SparseConfig().get_supported_act_dtypes() == [torch.bfloat16]
    assert SparseConfig([]).get_supported_act_dtypes() == [torch.bfloat16, torch.float32]


def test_it_goes_to_other_processes(config: Any) -> None:
    other = pickle.loads(pickle.dumps(config))
    assert (other.ignored, other.tally) == (config.ignored, config.tally)


def test_what_vllm_computes_itself(config: Any) -> None:
    """Embeddings, the head, attention, and linears that the directory ignores."""
    embeddings, attention = of_vllm("layers.vocab_parallel_embedding"), of_vllm("layers.attention_layer_base")
    attending = type("Attending", (nn.Module, attention.AttentionLayerBase), {})
    attending.__abstractmethods__ = frozenset()
    for kind in (embeddings.VocabParallelEmbedding, embeddings.ParallelLMHead, attending):
        assert config.get_quant_method(kind.__new__(kind), "model.layers.0.self_attn") is None
    kind = linears().RowParallelLinear
    ignored = config.get_quant_method(kind.__new__(kind), "model.layers.3.mlp.down_proj")
    assert type(ignored) is linears().UnquantizedLinearMethod


def test_what_has_weights_and_is_no_linear_is_refused(config: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.experts: found Module; supported"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.experts")


def test_a_fused_linear_of_which_a_part_is_ignored_is_refused(config: Any) -> None:
    config.ignored = ["model.layers.0.self_attn.k_proj"]
    with pytest.raises(
        UnsupportedError, match=r"self_attn.k_proj: not quantized, but other parts of .*qkv_proj"
    ):
        qkv(config)
    config.ignored = ["re:.*self_attn"]
    kind = linears().QKVParallelLinear
    method = config.get_quant_method(kind.__new__(kind), "model.layers.0.self_attn.qkv_proj")
    assert type(method) is linears().UnquantizedLinearMethod


def test_fused_linears_are_their_parts(config: Any) -> None:
    """In the order in which they come, whatever it is; bit for bit."""
    q, k, v = tensors(4 * HEAD), tensors(2 * HEAD), tensors(2 * HEAD, zeros=0.2)
    layer = load(qkv(config), v, q, k, ids=("v", "q", "k"))
    y = layer(x_TK())[0]
    assert torch.equal(y, ours(q, k, v)(x_TK()))
    assert torch.equal(y, torch.cat([ours(it)(x_TK()) for it in (q, k, v)], dim=1))


def test_gate_and_up(config: Any) -> None:
    gate, up, prefix = tensors(44), tensors(44, zeros=0.9), "model.layers.0.mlp.gate_up_proj"
    kind = linears().MergedColumnParallelLinear
    layer = load(kind(HIDDEN, [44, 44], bias=False, quant_config=config, prefix=prefix), gate, up, ids=(0, 1))
    assert torch.equal(layer(x_TK())[0], ours(gate, up)(x_TK()))


def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not quantized is of the model's type, and has no scales."""
    from gossamer.gpu.vllm_config import SparseConfig

    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    layer = qkv(SparseConfig())
    places = dict(layer.named_parameters())
    assert places.keys() == {"weight"} and places["weight"].dtype == torch.bfloat16
    parts = {shard: tensors(rows * HEAD)[0].bfloat16() for shard, rows in (("q", 4), ("k", 2), ("v", 2))}
    for shard, w_NK in parts.items():
        places["weight"].weight_loader(places["weight"], w_NK, shard)
    finish(layer)
    expected = SparseLinear.from_weight(torch.cat([*parts.values()]))
    assert not layer.sparse.is_dense
    assert torch.equal(layer(x := x_TK().bfloat16())[0], expected(x))


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_biases_are_added(config: Any, first: str) -> None:
    """vLLM makes them after our weights, and reads them when they come."""
    w_NK, scale_N1 = part = tensors(40)
    layer = down(config, bias=True)
    places = dict(layer.named_parameters())
    given = {"weight": w_NK, "bias": torch.arange(40.0), "weight_scale": scale_N1}
    for name in (first, *(given.keys() - {first})):
        places[name].weight_loader(places[name], given[name])
    finish(layer)
    assert torch.equal(layer(x_TK())[0], ours(part)(x_TK()) + given["bias"])


@pytest.mark.parametrize("size", [2, 4])
def test_outputs_are_shared_out(config: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of 24 or 12 rows of q; k and v have 2 heads, which 4 GPUs have twice."""
    q, k, v = tensors(4 * HEAD), tensors(2 * HEAD), tensors(2 * HEAD)
    for rank in range(size):
        share_out(monkeypatch, rank, size)
        layer = load(qkv(config), q, k, v, ids=("q", "k", "v"))
        parts = []
        for tensor, heads in ((q, 4), (k, 2), (v, 2)):
            rows = HEAD * max(1, heads // size)
            begin = rows * (rank * heads // size if heads < size else rank)
            parts.append(tuple(it[begin : begin + rows] for it in tensor))
        assert torch.equal(layer.quant_method.apply(layer, x_TK()), ours(*parts)(x_TK()))


def test_inputs_are_shared_out(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 inputs each; the first GPU adds the bias, in vLLM's code."""
    part = tensors(40)
    for rank, inputs in enumerate((slice(0, 100), slice(100, 200))):
        share_out(monkeypatch, rank, 2)
        layer = load(down(config), part)
        x = x_TK()[:, inputs]
        assert torch.equal(layer.quant_method.apply(layer, x), ours(part, inputs=inputs)(x))


def test_nothing_dense_is_left(config: Any) -> None:
    """There is no memory for it before it is read, and none after."""
    layer = down(config)
    assert layer.quant_method.uses_meta_device and all(it.is_meta for it in layer.parameters())
    load(layer, part := tensors(40))
    assert not dict(layer.named_parameters())
    expected = dict(ours(part).named_buffers())
    assert {name.removeprefix("sparse.") for name in layer.state_dict()} == expected.keys()
    assert all(torch.equal(getattr(layer.sparse, name), it) for name, it in expected.items())


def test_weights_of_another_type_are_refused(config: Any) -> None:
    """vLLM would convert them, of a linear that should be among the ignored ones."""
    layer = down(config)
    with pytest.raises(
        CheckpointError, match=r"\(40, 200\) of torch.bfloat16 in a W8A8 .*; expected torch.int8"
    ):
        load(layer, (torch.ones(40, HIDDEN, dtype=torch.bfloat16), torch.ones(40, 1)))


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("weight", "qkv_proj.weight: found 0 of its 3 tensors"),
        ("weight_scale", "qkv_proj.weight_scale: found 0 of its 3 tensors"),
        ("k", "qkv_proj.weight: found 2 of its 3 tensors"),
        ("everything", "qkv_proj.weight: found 0 of its 3 tensors"),
    ],
)
def test_a_directory_that_lacks_some_is_refused(config: Any, lacks: str, says: str) -> None:
    """vLLM lets it pass for methods such as ours, whose memory is made when all is read."""
    layer = qkv(config)
    places = dict(layer.named_parameters())
    for shard, rows in (("q", 48), ("k", 24), ("v", 24)):
        for name, tensor in zip(("weight", "weight_scale"), tensors(rows), strict=True):
            if lacks not in (name, shard, "everything"):
                places[name].weight_loader(places[name], tensor, shard)
    with pytest.raises(CheckpointError, match=says):
        finish(layer)


def test_weights_that_vllm_makes_up_are_taken(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--load-format dummy`, by which people measure speed."""
    asked = SimpleNamespace(load_config=SimpleNamespace(load_format="dummy"))
    from gossamer.gpu import vllm_linear

    monkeypatch.setattr(vllm_linear, "get_current_vllm_config_or_none", lambda: asked)
    assert finish(down(config)).sparse.out_features == 40


def test_memory_that_ends_is_said_with_what_is_needed(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SparseLinear, "from_weight", full)
    with pytest.raises(
        MemoryError, match=r"memory ended while model.layers.0.mlp.down_proj was packed.* GB more"
    ):
        load(down(config), tensors(40))


def test_new_weights_of_a_running_model_are_refused(config: Any) -> None:
    layer = load(down(config), tensors(40))
    layer.weight = nn.Parameter(torch.ones(40, HIDDEN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"new weights for a running model.*start vLLM anew"):
        layer.quant_method.process_weights_after_loading(layer)


def test_torch_compiles_it_to_one_operator(config: Any) -> None:
    """Whatever the number of tokens, which is a symbol; and one graph serves layers of other weights, too.

    vLLM keeps graphs, and takes them for a directory that was pruned anew.
    """
    layer, other = load(down(config), tensors(40)), load(down(config), tensors(40, zeros=0.9))
    assert layer.sparse.values.shape != other.sparse.values.shape
    kept: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        kept.append(graph)
        return graph.forward

    compiled = torch.compile(layer.quant_method.apply, backend=keep, dynamic=True, fullgraph=True)
    for tokens in (5, 9):
        assert torch.equal(compiled(layer, x_TK(tokens)), layer.quant_method.apply(layer, x_TK(tokens)))
    [graph] = kept
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.gossamer.numbered_linear]
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    given = [other.number if "number" in name else x_TK() if "x" in name else 5 for name in names]
    assert torch.equal(graph(*given)[0], ours(tensors(40, zeros=0.9))(x_TK()))


def test_torch_finds_nothing_wrong_with_the_operator(config: Any) -> None:
    layer = load(down(config), tensors(40))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.gossamer.numbered_linear.default
    found = torch.library.opcheck(operator, (x_TK(), layer.number, 40), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_what_was_packed_is_said_once(config: Any, said: list[tuple[int, str]]) -> None:
    layers = [down(config), qkv(config)]
    load(layers[0], tensors(40))
    assert not said
    load(layers[1], tensors(48), tensors(24), tensors(24), ids=("q", "k", "v"))
    assert [level for level, _ in said] == [logging.INFO, logging.WARNING]
    assert said[0][1] == "Packed 2 linears of 0.0 MB into 0.0 MB"
    assert "On a CPU" in said[1][1] and "`gossamer serve`" in said[1][1]


def test_a_dense_model_is_told_that_nothing_is_gained(config: Any, said: list[tuple[int, str]]) -> None:
    layer = load(down(config), dense := tensors(40, zeros=0.0))
    assert layer.sparse.is_dense and torch.equal(layer(x_TK())[0], ours(dense)(x_TK()))
    [words] = [words for level, words in said if level == logging.WARNING and "zeros" in words]
    assert words == "1 of 1 linears have fewer than 45% zeros and stay dense: nothing is gained there"


@pytest.mark.parametrize("version", ["0.34.0", "1.0", "0.32.1.dev5+gabc", "dev"])
def test_a_vllm_that_was_not_tested_is_named_once(version: str, said: list[tuple[int, str]]) -> None:
    from gossamer.gpu.vllm_config import check_version

    for _ in range(2):
        check_version(version)
    words = f"Found vLLM {version}; --quantization gossamer was tested with 0.22 to 0.33"
    assert said == [(logging.WARNING, words)]


def test_versions_that_were_tested_and_that_are_too_old(said: list[tuple[int, str]]) -> None:
    from gossamer.gpu.vllm_config import check_version

    for version in ("0.22.0", "0.27.1", "0.33.5+cpu"):
        check_version(version)
    assert not said
    with pytest.raises(UnsupportedError, match=r"found vLLM 0.21.0; supported.*: 0.22 to 0.33"):
        check_version("0.21.0")


@pytest.mark.usefixtures("small_kernels")
def test_kernels_are_compiled_before_a_weight_is_read(
    kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what vLLM knows of the GPU, which takes no context of CUDA; on other platforms nothing is."""
    from gossamer.gpu.vllm_config import SparseConfig

    platform, capability = importlib.import_module("vllm.platforms").current_platform, [9, 0]
    monkeypatch.setattr(
        platform, "get_device_capability", lambda: SimpleNamespace(major=capability[0], minor=capability[1])
    )
    SparseConfig()
    assert not kernel_cache.exists()
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    SparseConfig()
    [kept] = kernel_cache.iterdir()
    assert kept.name.startswith("sm_90-") and not torch.cuda.is_initialized()
    capability[0] = 7
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.0; supported: 8\.0 and later"):
        SparseConfig.from_config(W8A8.config([]))


def test_it_takes_what_vllm_gives(config: Any) -> None:
    """All that vLLM's own classes leave to us is there, and takes arguments by vLLM's names."""
    from gossamer.gpu.vllm_linear import SparseLinearMethod

    base = of_vllm("layers.quantization.base_config").QuantizationConfig
    for ours, theirs in ((type(config), base), (SparseLinearMethod, linears().LinearMethodBase)):
        for name in vars(ours).keys() & {name for it in theirs.__mro__ for name in vars(it)}:
            if callable(getattr(ours, name)) and not name.startswith("__"):
                asked = inspect.signature(getattr(theirs, name)).parameters.values()
                named = {it.name: None for it in asked if it.kind == it.POSITIONAL_OR_KEYWORD}
                inspect.signature(getattr(ours, name)).bind(**named)


@pytest.mark.skipif(not REAL, reason="no vLLM here: `make vllm-test` compares with one")
def test_the_stand_in_has_the_signatures_of_vllm() -> None:
    """Each of its parameters is one of vLLM's, in vLLM's order."""
    for module, names in vllm_stand_in.MODULES.items():
        for name in names:
            theirs, stand_in = getattr(importlib.import_module(module), name), getattr(vllm_stand_in, name)
            assert inspect.isclass(theirs) == inspect.isclass(stand_in), name
            pairs = {name: (theirs, stand_in)} if inspect.isfunction(stand_in) else {}
            for method in vars(stand_in) if inspect.isclass(stand_in) else ():
                if inspect.isroutine(getattr(stand_in, method)) and (
                    method[0] != "_" or method == "__init__"
                ):
                    pairs[f"{name}.{method}"] = getattr(theirs, method), getattr(stand_in, method)
            for place, (their, our) in pairs.items():
                asked, given = (list(inspect.signature(it).parameters) for it in (their, our))
                assert [it for it in asked if it in given] == given, place
