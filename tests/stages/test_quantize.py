"""`quantize`: what transformers and compressed-tensors make of the directory, and what must not change."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.schemes import SCHEMES, dequantized
from gossamer.compress import hessian
from gossamer.compress.target import token_error
from gossamer.data.calibration import calibration_ids
from gossamer.engine import LLM
from gossamer.errors import CalibrationError, ConfigError, UnsupportedError
from gossamer.job.report import Event
from gossamer.layerwise.rounding import NUMBERS, smooth
from gossamer.layerwise.through_rounding import as_read_by_head
from gossamer.modules.decoder import TORCH_DTYPE, blocks, embed
from gossamer.packed.reader import Packed
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.pack import Pack, pack
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, matching, quantize
from gossamer.tools.verify import Verify, verify
from gossamer.training.whole_model import load_model
from llamas import save_random, walk_through

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


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("variant", ["llama2", "llama3", "sharded", "bf16", "fp16"])
def test_loads_in_transformers_with_zeros_kept_and_our_logits(
    variant: str, scheme: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    parent = pruned(tiny_llama(variant), tmp_path / "pruned", text_file)
    job = replace(small(parent, tmp_path / "quantized", text_file), scheme=scheme)
    result = quantize(job)
    before, after = Checkpoint.open(parent), Checkpoint.open(job.output_dir)
    assert "sparsity_config" not in json.dumps(after.config)
    assert result.num_quantized == 14 and result.sparsity >= before.sparsity()
    for name in after.linears:
        assert after.dtype(f"{name}.weight") == SCHEMES[scheme].dtype
        assert after.zeros(f"{name}.weight")[before.zeros(f"{name}.weight")].all()
        scale = torch.from_numpy(after.float32(f"{name}.weight_scale").copy())
        dtype = TORCH_DTYPE[before.dtype(f"{name}.weight")]
        assert torch.equal(scale.to(dtype).float(), scale)  # loading the model in its type changes none
        if scheme == "W4A8":
            assert np.abs(after.raw(f"{name}.weight")).max() <= 7
    theirs = AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32)
    assert distance(fake_quantized_logits(after), logits(theirs)) < 1e-5
    bound = {"W8A8": 0.05, "W4A8": 0.4, "FP8_DYNAMIC": 0.2}[scheme]
    assert distance(logits(theirs), logits(load_model(before))) < bound
    assert set(result.errors) == {"q", "k", "v", "o", "gate", "up", "down"} and len(result.worst) == 3
    recorded = (after.manifest or {})["metrics"]
    assert recorded["errors"] == result.errors and len(recorded["linear_errors"]) == 14


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("variant", ["llama3", "bf16"])
def test_prune_can_round_in_the_same_pass(
    variant: str, scheme: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """The first layer has the mask of a run that does not round; what is loaded gives the reported error."""
    source = Checkpoint.open(tiny_llama(variant))
    options = {"dataset": (str(text_file),), "num_calibration_samples": 16, "max_seq_length": 64}
    job = Prune(str(source.path), str(tmp_path / "both"), sparsity=0.6, scheme=scheme, **options)
    result, plain = prune(job), replace(job, output_dir=str(tmp_path / "plain"), scheme="none")
    prune(plain)
    after, unrounded = Checkpoint.open(job.output_dir), Checkpoint.open(plain.output_dir)
    assert result.sparsity >= 0.6 - 1e-3
    for name in after.linears:
        assert after.dtype(f"{name}.weight") == SCHEMES[scheme].dtype
        if ".layers.0." in name:
            assert after.zeros(f"{name}.weight")[unrounded.zeros(f"{name}.weight")].all()
    theirs = AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32)
    assert distance(fake_quantized_logits(after), logits(theirs)) < 1e-5
    held_BT = calibration_ids(source, job)[-2:]
    with torch.no_grad():
        ours, parents = (
            model(held_BT, output_hidden_states=True).hidden_states[1]
            for model in (theirs, load_model(source))
        )
    assert token_error(ours.float(), parents.float()).item() == pytest.approx(result.errors[0], rel=0.05)
    if SCHEMES[scheme].in_engine:
        file = str(tmp_path / "both.goss")
        pack(Pack(job.output_dir, file))
        verify(Verify(file, parent=job.output_dir))


def test_a_layer_pruned_and_rounded_in_one_pass_is_trained_towards_the_parent(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """Held-out rows gain by it, zeros and grid stay, and what is loaded gives the reported error."""
    source = Checkpoint.open(tiny_llama("bf16"))
    options = {"dataset": (str(text_file),), "num_calibration_samples": 16, "max_seq_length": 64}
    job = Prune(str(source.path), str(tmp_path / "untrained"), sparsity=0.6, scheme="W4A8", **options)
    untrained = prune(job)
    trained = prune(replace(job, output_dir=str(tmp_path / "trained"), rounded_epochs=2))
    assert not untrained.rounded_reconstruction and len(trained.rounded_reconstruction) == 2
    assert all(min(errors) < errors[0] for errors in trained.rounded_reconstruction)
    assert trained.errors[-1] < untrained.errors[-1] and trained.sparsity >= 0.6 - 1e-3
    assert "as rounded" in str(trained.tables())
    theirs = AutoModelForCausalLM.from_pretrained(trained.output_dir, dtype=torch.float32)
    assert distance(fake_quantized_logits(Checkpoint.open(trained.output_dir)), logits(theirs)) < 1e-5
    with pytest.raises(ConfigError, match="--rounded-epochs is 2; expected 0, or more beside a --scheme"):
        prune(replace(job, scheme="none", rounded_epochs=2))


def fake_quantized_logits(source: Checkpoint) -> Tensor:
    """Our own forward: dequantized weights, activations rounded before every linear of the decoder."""
    model = copy.deepcopy(AutoModelForCausalLM.from_config(config_without_quantization(source)))
    for name, parameter in model.named_parameters():
        value = source.float32(name)
        if source.dtype(name) in ("I8", "F8_E4M3"):
            value = dequantized(value, source.float32(f"{name}_scale"))
        parameter.data = torch.from_numpy(value.copy())
    [rounding] = [
        NUMBERS[name].activations
        for name, scheme in SCHEMES.items()
        if not scheme.difference(source.config["quantization_config"])
    ]
    for name in source.linears:
        if source.dtype(f"{name}.weight") in ("I8", "F8_E4M3"):
            model.get_submodule(name).register_forward_pre_hook(lambda _, x: rounding(x[0]))
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
    for beyond in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="expected auto or a number from 0 to 1"):
            quantize(replace(job, smoothing_strength=beyond, overwrite=True))
    with pytest.raises(ConfigError, match="at least 2: an eighth"):
        quantize(replace(job, num_calibration_samples=1, overwrite=True))


def test_strength_zero_leaves_norms_and_values_as_they_are(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """A strength of 0 divided by the weights' maxima once, which is smoothing too."""
    source = Checkpoint.open(tiny_llama("bf16"))
    block = next(blocks(source))
    before = {name: weight.clone() for name, weight in block.layer.named_parameters()}
    smoothed = smooth(block, source, embed(source, IDS_BT), 0.0, [])
    assert [found.strength for found in smoothed] == [0.0] * 4
    for name, weight in block.layer.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_auto_smooths_what_has_outliers_and_errs_no_more_than_any_one_strength(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """One hidden channel is made 60 times as large in the norms, which its weights take back."""
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    model = load_model(Checkpoint.open(job.model))
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[5] *= 60
        for linear in (*list(layer.self_attn.children())[:3], layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[:, 5] /= 60
    with_outliers = tmp_path / "outliers"
    shutil.copytree(job.model, with_outliers)
    model.save_pretrained(with_outliers)
    results = {}
    for strength in ("auto", 0.0, 0.5, 1.0):
        changed = replace(job, model=str(with_outliers), smoothing_strength=strength, overwrite=True)
        results[strength] = quantize(changed)
    auto = results.pop("auto")
    assert min(auto.strengths[kind] for kind in ("q", "k", "v", "gate", "up")) > 0
    assert auto.mean_error < 0.2 * results[0.0].mean_error
    assert auto.mean_error < 1.1 * min(result.mean_error for result in results.values())


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


def test_a_failing_layer_leaves_nothing(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of 40 tokens (the other is held out) spans the 48 inputs of no layer: factorization fails."""
    monkeypatch.setattr(hessian, "LADDER", (1e-18,))
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    few = replace(job, num_calibration_samples=2, max_seq_length=40, dampening_frac=0.0)
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


@pytest.mark.parametrize("variant", ["llama3", "bf16", "fp16"])
def test_w4a8_is_packed_as_it_is_and_runs_with_transformers_logits(
    variant: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    parent = pruned(tiny_llama(variant), tmp_path / "pruned", text_file)
    job = replace(small(parent, tmp_path / "int4", text_file), scheme="W4A8")
    quantize(job)
    source = Checkpoint.open(job.output_dir)
    assert source.config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 8
    pack(Pack(job.output_dir, str(tmp_path / "model.goss"), storage="smallest"))
    packed = Packed.open(tmp_path / "model.goss")
    for name in source.linears:
        scale_NG = source.float32(f"{name}.weight_scale")
        assert packed.matrices[name].values == "i4"
        expected = dequantized(source.raw(f"{name}.weight"), scale_NG)
        np.testing.assert_array_equal(packed.linear(name), expected)
    verify(Verify(str(tmp_path / "model.goss"), parent=job.output_dir))
    ids = list(range(2, 90))
    theirs = AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32)
    with torch.no_grad():
        expected_TV = theirs(torch.tensor([ids])).logits[0]
    found_TV = torch.from_numpy(LLM(tmp_path / "model.goss", 1, kv_cache_dtype="f32").logits(ids))
    assert distance(found_TV, expected_TV) < 0.05


def test_fp8_is_refused_by_pack_with_what_runs_instead(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = replace(small(tiny_llama("bf16"), tmp_path / "fp8", text_file), scheme="FP8_DYNAMIC")
    quantize(replace(job, ignore=("*.v_proj",)))
    with pytest.raises(UnsupportedError, match=r"FP8_DYNAMIC, which vLLM.*W8A8 or W4A8"):
        pack(Pack(job.output_dir, str(tmp_path / "model.goss")))
    assert not (tmp_path / "model.goss").exists()


def test_w4a8_refuses_widths_that_no_group_divides_unless_ignored(text_file: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=102, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    job = replace(small(save_random(config, tmp_path / "odd"), tmp_path / "out", text_file), scheme="W4A8")
    with pytest.raises(UnsupportedError, match=r"down_proj has 102 inputs.*use W8A8.*--ignore"):
        quantize(job)
    assert quantize(replace(job, ignore=("*.down_proj",))).num_quantized == 6


def test_real_model_in_int4_after_pruning(shared_data: Path, reserved_slice: Path, tmp_path: Path) -> None:
    source = str(shared_data / "models" / "stories260k")
    text = str(shared_data / "text" / "tinystories-train-a.txt")
    options = {"dataset": (text,), "num_calibration_samples": 32, "max_seq_length": 512}
    prune(Prune(source, str(tmp_path / "pruned"), sparsity=0.5, **options))
    quantize(Quantize(str(tmp_path / "pruned"), str(tmp_path / "out"), scheme="W4A8", **options))
    job = Evaluate(
        str(tmp_path / "out"), dataset=str(reserved_slice), baseline=str(tmp_path / "pruned"), limit=100
    )
    assert evaluate(job).recovery["perplexity"] > 0.8


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("variant", ["llama2", "bf16"])
def test_training_through_the_rounding_keeps_zeros_and_is_what_transformers_loads(
    variant: str, scheme: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    parent = pruned(tiny_llama(variant), tmp_path / "pruned", text_file)
    job = replace(small(parent, tmp_path / "rounded", text_file), scheme=scheme, ignore=("*.0.mlp.up_proj",))
    # INT8 leaves a twentieth of what INT4 does to win, by small steps and more of them.
    rate = {"W8A8": 1e-4, "W4A8": 3e-3, "FP8_DYNAMIC": 3e-4}[scheme]
    trained = replace(job, output_dir=str(tmp_path / "trained"), reconstruct_epochs=6)
    trained = replace(trained, reconstruct_learning_rate=rate)
    assert quantize(job).reconstruction == []
    result = quantize(trained)
    assert len(result.reconstruction) == 2 and all(len(errors) == 7 for errors in result.reconstruction)
    assert all(min(errors) <= errors[0] for errors in result.reconstruction)
    assert any(min(errors) < errors[0] for errors in result.reconstruction)
    before, rounded, after = (Checkpoint.open(each) for each in (parent, job.output_dir, trained.output_dir))
    for name in after.linears:
        assert after.zeros(f"{name}.weight")[before.zeros(f"{name}.weight")].all()
        assert after.dtype(f"{name}.weight") == rounded.dtype(f"{name}.weight")
    first = f"{after.linears[0]}.weight"
    np.testing.assert_array_equal(after.raw(f"{first}_scale"), rounded.raw(f"{first}_scale"))
    assert any((after.raw(name) != rounded.raw(name)).any() for name in after.names)
    theirs = AutoModelForCausalLM.from_pretrained(trained.output_dir, dtype=torch.float32)
    assert distance(fake_quantized_logits(after), logits(theirs)) < 1e-5
    text = (tmp_path / "trained" / "report.md").read_text()
    assert "| as rounded | trained | gained |" in text
    if scheme != "FP8_DYNAMIC":
        pack(Pack(trained.output_dir, str(tmp_path / "model.goss")))
        verify(Verify(str(tmp_path / "model.goss"), parent=trained.output_dir))


def test_the_error_that_training_reports_is_that_of_what_is_stored(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """The last hidden states of the model that transformers loads, against the unrounded model's."""
    job = replace(small(tiny_llama("bf16"), tmp_path / "out", text_file), scheme="W4A8", reconstruct_epochs=2)
    result = quantize(job)
    source = Checkpoint.open(job.model)
    held_BT = calibration_ids(source, job)[-2:]
    found = []
    for model in (
        AutoModelForCausalLM.from_pretrained(job.output_dir, dtype=torch.float32),
        load_model(source),
    ):
        states: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda *call, to=states: to.append(call[2]))
        with torch.no_grad():
            model(held_BT)
        found.append(states[0] if isinstance(states[0], Tensor) else states[0][0])
    lacks_BTD = (found[0].float() - found[1].float()) @ as_read_by_head(source)
    error = (lacks_BTD.square().sum(-1) / found[1].float().square().sum(-1)).mean().item()
    assert error == pytest.approx(min(result.reconstruction[-1]), rel=1e-3)


def test_half_of_the_error_is_as_the_head_reads_it(tiny_llama: TinyLlama) -> None:
    """On directions at random, what the final norm's weights and the head make of one counts as itself."""
    model = load_model(source := Checkpoint.open(tiny_llama("llama3")))
    d_TD = torch.randn(5000, source.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_T = model.lm_head(d_TD * model.model.norm.weight).square().sum(-1)
    square_T = d_TD.square().sum(-1)
    expected_T = (square_T + logits_T * (square_T.sum() / logits_T.sum())) / 2
    found_T = (d_TD @ as_read_by_head(source)).square().sum(-1)
    assert torch.allclose(found_T, expected_T, rtol=0.03)


def test_training_that_fails_leaves_layers_as_rounded_and_says_so(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = replace(small(tiny_llama("bf16"), tmp_path / "rounded", text_file), scheme="W4A8")
    failing = replace(
        job, output_dir=str(tmp_path / "failed"), reconstruct_epochs=1, reconstruct_learning_rate=1e4
    )
    events: list[Event] = []
    quantize(job)
    quantize(failing, events.append)
    said = [event.message for event in events if event.lasting]
    assert len(said) == 2 and "layer 0 stays as rounded" in said[0]
    rounded, failed = Checkpoint.open(job.output_dir), Checkpoint.open(failing.output_dir)
    for name in rounded.names:
        np.testing.assert_array_equal(failed.raw(name), rounded.raw(name))
