"""`quantize`: what transformers and compressed-tensors make of the directory, and what must not change."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gossamer.checkpoint.directory import Checkpoint
from gossamer.compress.int8 import fake_quantize_tokens
from gossamer.decoder import blocks, embed
from gossamer.errors import CalibrationError, ConfigError, UnsupportedError
from gossamer.layerwise.rounding import smooth
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, matching, quantize
from gossamer.training.whole_model import load_model
from llamas import walk_through

TinyLlama = Callable[[str], Path]
IDS_BT = torch.arange(2, 102).view(2, 50)


def small(model: Path, output: Path, text: Path) -> Quantize:
    """A job of 16 rows of 64 tokens."""
    return Quantize(
        str(model), str(output), dataset=(str(text),), num_calibration_samples=16, max_seq_length=64
    )


def pruned(model: Path, output: Path, text: Path) -> Path:
    options = {"dataset": (str(text),), "num_calibration_samples": 16, "max_seq_length": 64}
    prune(Prune(str(model), str(output), sparsity=0.7, **options))
    return output


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits.float()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("variant", ["llama2", "llama3", "sharded", "bf16", "fp16"])
def test_loads_in_transformers_with_zeros_kept_and_our_logits(
    variant: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    parent = pruned(tiny_llama(variant), tmp_path / "pruned", text_file)
    job = small(parent, tmp_path / "quantized", text_file)
    result = quantize(job)
    before, after = Checkpoint.open(parent), Checkpoint.open(job.output_dir)
    assert "sparsity_config" not in json.dumps(after.config)
    assert result.num_quantized == 14 and result.sparsity >= before.sparsity()
    for name in after.linears:
        assert after.dtype(f"{name}.weight") == "I8"
        assert (after.raw(f"{name}.weight")[before.zeros(f"{name}.weight")] == 0).all()
    theirs = AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32)
    assert distance(fake_quantized_logits(after), logits(theirs)) < 1e-5
    assert distance(logits(theirs), logits(load_model(before))) < 0.05


def fake_quantized_logits(source: Checkpoint) -> Tensor:
    """Our own forward: dequantized weights, activations rounded before every linear of the decoder."""
    model = copy.deepcopy(AutoModelForCausalLM.from_config(config_without_quantization(source)))
    for name, parameter in model.named_parameters():
        value = source.raw(name).astype(np.float32) if source.dtype(name) == "I8" else source.float32(name)
        if source.dtype(name) == "I8":
            value = value * source.float32(f"{name}_scale")
        parameter.data = torch.from_numpy(value.copy())
    for name in source.linears:
        model.get_submodule(name).register_forward_pre_hook(lambda _, x: fake_quantize_tokens(x[0]))
    return logits(model.eval())


def config_without_quantization(source: Checkpoint) -> object:
    from transformers import LlamaConfig

    return LlamaConfig.from_dict(
        {key: value for key, value in source.config.items() if key not in ("quantization_config", "dtype")}
    )


@pytest.mark.parametrize("variant", ["llama2", "llama3"])
def test_smoothing_changes_the_weights_but_not_the_float_layer(variant: str, tiny_llama: TinyLlama) -> None:
    source = Checkpoint.open(tiny_llama(variant))
    hidden_BTD = embed(source, IDS_BT)
    for block in blocks(source):
        weights = {n: w.clone() for n, w in block.layer.named_parameters()}
        weights["self_attn.o_proj.weight"][:, 3] = block.layer.self_attn.o_proj.weight.data[:, 3] = 0
        before = walk_through(block, hidden_BTD.clone())
        smooth(block, source, hidden_BTD, 0.8, [])
        assert distance(walk_through(block, hidden_BTD.clone()), before) < 1e-5
        for name, weight in block.layer.named_parameters():
            assert not torch.equal(weight, weights[name]), name
            assert torch.equal(weight == 0, weights[name] == 0), name
        hidden_BTD = before


def test_smoothing_strength_zero_and_one_and_beyond(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    dense = logits(load_model(Checkpoint.open(job.model)))
    for strength in (0.0, 1.0):
        quantize(replace(job, smoothing_strength=strength, overwrite=True))
        assert distance(logits(AutoModelForCausalLM.from_pretrained(job.output_dir)), dense) < 0.1
    with pytest.raises(ConfigError, match=r"1\.5"):
        quantize(replace(job, smoothing_strength=1.5, overwrite=True))


def test_ignored_linears_stay_float(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    patterns = ("*.layers.0.mlp.down_proj", "*.v_proj")
    job = replace(small(tiny_llama("bf16"), tmp_path / "out", text_file), ignore=patterns)
    result = quantize(job)
    child = Checkpoint.open(job.output_dir)
    assert result.num_quantized == 11 and len(result.ignored) == 3
    assert {name for name in child.linears if child.dtype(f"{name}.weight") == "BF16"} == set(result.ignored)
    loaded = AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32)
    dense = load_model(Checkpoint.open(job.model))
    assert distance(logits(loaded), logits(dense)) < 0.05


def test_patterns_that_match_nothing_or_everything_are_refused(tiny_llama: TinyLlama) -> None:
    names = Checkpoint.open(tiny_llama("llama2")).linears
    with pytest.raises(ConfigError, match="down_prj"):
        matching(names, ["*.down_prj"])
    with pytest.raises(ConfigError, match="nothing is left"):
        matching(names, ["*"])


def test_quantizing_twice_is_refused(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    quantize(job)
    with pytest.raises(UnsupportedError, match="already quantized"):
        quantize(small(Path(job.output_dir), tmp_path / "again", text_file))
    with pytest.raises(UnsupportedError, match="already quantized"):
        prune(Prune(job.output_dir, str(tmp_path / "again"), sparsity=0.5, dataset=(str(text_file),)))
    assert not (tmp_path / "again").exists()


def test_a_failing_layer_leaves_nothing(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    """40 tokens span the 48 inputs of no layer: without dampening the first factorization fails."""
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    few = replace(job, num_calibration_samples=1, max_seq_length=40, dampening_frac=0.0)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj"):
        quantize(few)
    assert list(tmp_path.iterdir()) == []


def test_real_model_loses_almost_nothing(shared_data: Path, reserved_slice: Path, tmp_path: Path) -> None:
    source = str(shared_data / "models" / "stories260k")
    text = str(shared_data / "text" / "tinystories-train-a.txt")
    options = {"dataset": (text,), "num_calibration_samples": 32, "max_seq_length": 512}
    quantize(Quantize(source, str(tmp_path / "out"), **options))
    result = evaluate(
        Evaluate(str(tmp_path / "out"), dataset=str(reserved_slice), baseline=source, limit=150)
    )
    assert result.recovery["perplexity"] > 0.99
