"""transformers' models with sparse linears, by the operator's definition for CPUs: the same tokens."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Phi3Config

import gossamer.gpu
from encoders import round_to_int8, save_encoder
from gossamer import cuda
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.schemes import FP8_DYNAMIC, W4A8
from gossamer.engine.llm import LLM
from gossamer.errors import UnsupportedError
from gossamer.gpu import GossamerConfig, SparseLinear, driver
from gossamer.gpu import transformers as ours
from gossamer.packed.from_checkpoint import Types, pack_checkpoint
from gossamer.stages.quantize import Quantize, quantize
from gossamer.training import trainer_contract
from gpu.emulated import needs_compiler
from llamas import save_random, save_tiny


def sparse_bf16(place: Path, zeros: float = 0.7) -> Path:
    """A random Llama in bfloat16, so many of its layers' weights zero."""
    save_tiny("bf16", place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[torch.rand(parameter.shape, generator=random) < zeros] = 0
    model.save_pretrained(place)
    return place


def load(place: Path, config: GossamerConfig | None = None, **how: Any) -> Any:
    config = GossamerConfig() if config is None else config
    return AutoModelForCausalLM.from_pretrained(place, quantization_config=config, **how)


def sparse_linears(model: nn.Module) -> list[SparseLinear]:
    return [it for it in model.modules() if isinstance(it, SparseLinear)]


def tokens_of(model: Any, ids: torch.Tensor, number: int = 200) -> list[int]:
    model.generation_config.eos_token_id = None
    made = model.generate(ids, max_new_tokens=number, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_bfloat16_model_is_the_same_model(keep_dense: bool, tmp_path: Path) -> None:
    place = sparse_bf16(tmp_path / "model")
    dense = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    sparse = load(place, GossamerConfig(keep_dense=keep_dense), dtype=torch.bfloat16)
    found = sparse_linears(sparse)
    assert len(found) == 14 and not any(it.is_dense for it in found)
    assert all((it.dense is not None) == keep_dense for it in found)
    assert isinstance(sparse.lm_head, nn.Linear) and not isinstance(sparse.lm_head, SparseLinear)
    ids = torch.tensor([[0, 5, 77, 200, 31]])
    with torch.no_grad():
        expected, logits = dense(ids).logits, sparse(ids).logits
    assert (logits - expected).abs().max() <= 2**-6 * expected.abs().max()
    assert tokens_of(sparse, ids) == tokens_of(dense, ids)


def test_a_w8a8_model_has_the_engines_logits_and_tokens(tmp_path: Path) -> None:
    place = round_to_int8(save_tiny("llama2", tmp_path / "model"), 0.7)
    sparse = load(place, dtype=torch.float32)
    assert len(sparse_linears(sparse)) == 14 and sparse.lm_head.weight.dtype == torch.float32
    pack_checkpoint(Checkpoint.open(place), tmp_path / "model.goss", types=Types(head="keep"))
    engine = LLM(tmp_path / "model.goss", 1, kv_cache_dtype="f32")
    ids = [0, 5, 77, 200, 31]
    with torch.no_grad():
        logits = sparse(torch.tensor([ids])).logits[0].numpy()
    expected = engine.logits(ids)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    made = list(ids)
    for _ in range(200):
        made.append(int(engine.logits(made)[-1].argmax()))
    assert tokens_of(sparse, torch.tensor([ids])) == made[len(ids) :]


@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_w4a8_model_that_quantize_wrote_has_the_engines_logits(
    keep_dense: bool, tiny_llama: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "num_calibration_samples": 16,
        "max_seq_length": 64,
        "dataset": (str(text_file),),
    }
    quantize(Quantize(str(tiny_llama("llama3")), str(tmp_path / "int4"), scheme="W4A8", **options))
    sparse = load(tmp_path / "int4", GossamerConfig(keep_dense=keep_dense), dtype=torch.float32)
    found = sparse_linears(sparse)
    assert len(found) == 14 and not any(it.is_dense for it in found)
    assert all(it.multipliers is not None and (it.dense is not None) == keep_dense for it in found)
    pack_checkpoint(Checkpoint.open(tmp_path / "int4"), tmp_path / "model.goss", types=Types(head="keep"))
    ids = [0, 5, 77, 200, 31]
    with torch.no_grad():
        logits = sparse(torch.tensor([ids])).logits[0].numpy()
    expected = LLM(tmp_path / "model.goss", 1, kv_cache_dtype="f32").logits(ids)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_group_scales_without_multipliers_are_refused_by_name(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """As other programs write them: any scale for any group."""
    place = round_to_int8(save_tiny("llama2", tmp_path / "model"), 0.7)
    tensors = load_file(place / "model.safetensors")
    for name in [it for it in tensors if it.endswith("weight_scale")]:
        weight = name.removesuffix("_scale")
        tensors[weight] = tensors[weight] // 19
        groups = (len(tensors[weight]), tensors[weight].shape[1] // 8)
        tensors[name] = torch.rand(groups, generator=torch.Generator().manual_seed(1)) + 0.1
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((place / "config.json").read_text()) | {"quantization_config": W4A8.config([], 8)}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedError, match=r"layers.0.self_attn.q_proj: the engine's INT4 has group scales"
    ):
        load(place, dtype=torch.float32)


def test_linears_that_a_w8a8_directory_leaves_out_stay_floats(tmp_path: Path) -> None:
    place = round_to_int8(save_tiny("llama2", tmp_path / "model"), 0.7)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", r"re:.*self_attn\.k_proj"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"layers.0.self_attn.k_proj: found weights of torch.float32"):
        load(place, dtype=torch.float32)


def test_phi3s_fused_linears_and_an_encoders_are_packed(tmp_path: Path) -> None:
    config = Phi3Config(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    save_random(config, tmp_path / "phi3", torch.bfloat16)
    names = {it for it, module in load(tmp_path / "phi3").named_modules() if isinstance(module, SparseLinear)}
    assert {it.rpartition(".")[2] for it in names} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}

    save_encoder(tmp_path / "bert", "BertModel")
    round_to_int8(tmp_path / "bert", 0.6)
    bert = AutoModel.from_pretrained(
        tmp_path / "bert", quantization_config=GossamerConfig(), dtype=torch.float32
    )
    assert len(sparse_linears(bert)) == 6 * bert.config.num_hidden_layers
    assert isinstance(bert.pooler.dense, nn.Linear)


def test_a_model_without_zeros_stays_dense_and_says_so(
    tiny_llama: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_llama("bf16"), dtype=torch.bfloat16)
    assert all(it.is_dense for it in sparse_linears(model))
    assert "14 of 14 linears have fewer than 45% zeros and stay dense: nothing is gained" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_floats_are_refused(dtype: torch.dtype, tiny_llama: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match=rf"q_proj: found weights of {dtype}; supported: bfloat16 "):
        load(tiny_llama("bf16"), dtype=dtype)


def test_another_family_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    save_random(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=12), tmp_path)
    with pytest.raises(UnsupportedError, match="found architecture Gemma2ForCausalLM"):
        load(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            FP8_DYNAMIC.config([]),
            "quantized as FP8_DYNAMIC; supported by gossamer.gpu.*: W8A8, W4A8, and models in",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"GPTQ \(4 bits\)"),
    ],
    ids=["FP8", "GPTQ"],
)
def test_another_quantization_is_refused(found: dict[str, Any], says: str, tmp_path: Path) -> None:
    place = save_tiny("bf16", tmp_path / "model")
    config = json.loads((place / "config.json").read_text()) | {"quantization_config": found}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=says):
        load(place)


def test_memory_that_ends_is_said_with_what_is_needed(
    tiny_llama: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SparseLinear, "from_weight", full)
    with pytest.raises(MemoryError, match=r"memory ended while .*q_proj was packed.* GB more"):
        load(tiny_llama("bf16"), dtype=torch.bfloat16)


def test_a_device_map_that_mixes_is_refused(tiny_llama: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="device_map with cpu, disk; supported: GPUs alone"):
        load(tiny_llama("bf16"), device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.skipif(not cuda.why_no_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("place", ["cuda", 0, {"": "cuda:1"}], ids=str)
def test_a_gpu_that_is_not_there_is_refused_with_what_is_in_the_way(
    place: Any, tiny_llama: Callable[[str], Path]
) -> None:
    with pytest.raises(UnsupportedError, match=r"device_map with .*; no GPU was found: CUDA's driver"):
        load(tiny_llama("bf16"), device_map=place)


@needs_compiler
def test_kernels_are_asked_for_before_a_weight_is_read(
    capabilities: list[tuple[int, int]], kernel_cache: Path, tiny_llama: Callable[[str], Path]
) -> None:
    """Of the GPUs that are named, or of all."""
    quantizer = ours.GossamerQuantizer(GossamerConfig())
    quantizer.validate_environment(device_map={"": torch.device("cuda:1")})
    assert [it.name[:6] for it in kernel_cache.iterdir()] == ["sm_90-"]
    quantizer.validate_environment(device_map="auto")
    assert sorted(it.name[:6] for it in kernel_cache.iterdir()) == ["sm_80-", "sm_90-"]
    with pytest.raises(UnsupportedError, match="device_map with cuda:2; supported: GPUs that are there, 2"):
        load(tiny_llama("bf16"), device_map="cuda:2")
    capabilities[0] = (7, 5)
    driver.gpu.cache_clear()
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5; supported: 8\.0 and later"):
        load(tiny_llama("bf16"), device_map="cuda")


def test_on_a_cpu_it_says_once_that_this_is_for_tests(
    tiny_llama: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    forget_warnings()
    for _ in range(2):
        load(tiny_llama("bf16"), dtype=torch.bfloat16)
    [words] = [it.getMessage() for it in caplog.records if "CPU" in it.getMessage()]
    assert words == "On a CPU gossamer.gpu.GossamerConfig is for tests: `gossamer serve` is fast there"


def test_versions_of_transformers_that_were_not_tested_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget_warnings()
    tested = (trainer_contract.OLDEST_TESTED, trainer_contract.NEWEST_TESTED)
    assert tuple(tuple(map(int, it.split(".")[:2])) for it in tested) == ours.TESTED
    for version in (*tested, "5.24.0", "5.24.0", "5.20.0.dev0"):
        monkeypatch.setattr(ours.transformers, "__version__", version)
        GossamerConfig()
    assert [it.getMessage() for it in caplog.records] == [
        f"Found transformers {it}; gossamer.gpu.GossamerConfig was tested with 5.19 to 5.23"
        for it in ("5.24.0", "5.20.0.dev0")
    ]
    monkeypatch.setattr(ours.transformers, "__version__", "5.18.2")
    with pytest.raises(
        UnsupportedError, match=r"found transformers 5\.18\.2; supported by .*: 5\.19 to 5\.23"
    ):
        GossamerConfig()


def forget_warnings() -> None:
    """Those that transformers' loggers gave once."""
    ours._log.warning_once.__func__.cache_clear()


def test_w8a8_without_our_config_is_loaded_as_before(tmp_path: Path) -> None:
    place = round_to_int8(save_tiny("llama2", tmp_path / "model"), 0.7)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    assert not sparse_linears(model)
    tokenizer = AutoTokenizer.from_pretrained(place)
    assert model(torch.tensor([tokenizer.encode("a")])).logits.isfinite().all()


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    """vLLM does so in each of its processes."""
    code = "import sys, gossamer.gpu; sys.exit(bool(sys.modules.keys() & {'torch', 'transformers'}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(gossamer.gpu, "nothing")  # noqa: B009
