"""`prune` on random Llamas of every variant and on the two real models."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gossamer.checkpoint.directory import Checkpoint, companions
from gossamer.compress import hessian
from gossamer.data.calibration import calibration_ids
from gossamer.errors import CalibrationError, ConfigError, GossamerError
from gossamer.job.report import Event
from gossamer.layerwise.quality import in_words
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tokens.tokenizer import Tokenizer

TinyLlama = Callable[[str], Path]


def small(model: Path, output: Path, text: Path, sparsity: float = 0.5) -> Prune:
    """A job of 16 rows of 64 tokens by SparseGPT, where nothing is trained."""
    return Prune(
        str(model),
        str(output),
        sparsity=sparsity,
        method="sparsegpt",
        dataset=(str(text),),
        num_calibration_samples=16,
        max_seq_length=64,
    )


def left_nothing(output: Path) -> bool:
    return not output.exists() and not output.with_name(output.name + ".partial").exists()


@pytest.mark.parametrize("variant", ["llama2", "llama3", "sharded", "bf16", "fp16"])
def test_every_variant_gets_exact_zeros_and_loads_in_transformers(
    variant: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    job = small(tiny_llama(variant), tmp_path / "pruned", text_file, 0.6)
    result = prune(job, events.append)
    parent, child = Checkpoint.open(job.model), Checkpoint.open(job.output_dir)
    for name in child.names:
        assert child.dtype(name) == parent.dtype(name)
        if name.removesuffix(".weight") in child.linears:
            zeros = np.count_nonzero(child.zeros(name))
            assert abs(zeros - round(0.6 * child.raw(name).size)) <= (variant == "fp16")  # may underflow
        else:
            np.testing.assert_array_equal(child.raw(name), parent.raw(name))
    assert result.sparsity == pytest.approx(0.6, abs=1e-3) and len(result.errors) == 2
    assert events[-1].done == events[-1].total == 14
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.output_dir, output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    record = json.loads((Path(job.output_dir) / "gossamer.json").read_text())
    assert record["job"]["sparsity"] == 0.6 and record["data"][0]["sha256"]


def test_pruning_again_keeps_zeros_and_counts_them(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    first = small(tiny_llama("llama3"), tmp_path / "half", text_file, 0.5)
    second = small(Path(first.output_dir), tmp_path / "more", text_file, 0.7)
    prune(first)
    prune(second)
    half, more = Checkpoint.open(first.output_dir), Checkpoint.open(second.output_dir)
    for name in more.linears:
        zeros = more.zeros(f"{name}.weight")
        assert (zeros | ~half.zeros(f"{name}.weight")).all()
        assert np.count_nonzero(zeros) == round(0.7 * zeros.size)
    with pytest.raises(ConfigError, match=r"0\.6,.*0\.6999"):
        prune(small(Path(second.output_dir), tmp_path / "less", text_file, 0.6))
    assert left_nothing(tmp_path / "less")


@pytest.mark.parametrize("variant", ["llama2", "llama3"])
def test_errors_and_perplexities_are_those_of_transformers_on_the_last_eighth_of_the_rows(
    variant: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama(variant), tmp_path / "pruned", text_file)
    result = prune(job)
    ids_BT = calibration_ids(Checkpoint.open(job.model), job)[-2:]
    outputs: list[Any] = []
    for model in (job.model, job.output_dir):
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(loaded(ids_BT, labels=ids_BT, output_hidden_states=True))
    before, after = (output.loss.exp().item() for output in outputs)
    found = result.quality["parent_perplexity"], result.quality["perplexity"]
    assert found == pytest.approx((before, after), rel=1e-4)
    parent_BTD, ours_BTD = (output.hidden_states[1] for output in outputs)
    expected = ((ours_BTD - parent_BTD).norm(dim=-1) / parent_BTD.norm(dim=-1)).square().mean()
    assert result.errors[0] == pytest.approx(expected.item(), rel=1e-4)
    metrics = json.loads((Path(job.output_dir) / "gossamer.json").read_text())["metrics"]
    assert metrics["errors"] == result.errors and metrics["perplexity"] == result.quality["perplexity"]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_outside_its_range_is_refused(
    sparsity: float, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        prune(small(tiny_llama("llama2"), tmp_path / "out", text_file, sparsity))
    assert left_nothing(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"num_calibration_samples": 0},
        {"num_calibration_samples": 1},
        {"max_seq_length": 1},
        {"block_size": 0},
        {"dampening_frac": -1.0},
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    options: dict[str, Any], tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ConfigError, match=flag):
        prune(replace(small(tiny_llama("llama2"), tmp_path / "out", text_file), **options))
    assert left_nothing(tmp_path / "out")


def test_short_calibration_text_is_refused(tiny_llama: TinyLlama, text_file: Path, tmp_path: Path) -> None:
    job = replace(small(tiny_llama("llama2"), tmp_path / "out", text_file), num_calibration_samples=9999)
    with pytest.raises(CalibrationError, match=f"{9999 * 64}"):
        prune(job)
    assert left_nothing(tmp_path / "out")


@pytest.fixture(scope="module")
def twins(tiny_llama: TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two equal neurons in the second layer: the Hessian of its down_proj is singular without dampening."""
    model = tmp_path_factory.mktemp("twins") / "model"
    shutil.copytree(tiny_llama("llama2"), model)
    weights = load_file(model / "model.safetensors")
    for projection in ("gate_proj", "up_proj"):
        weight_NK = weights[f"model.layers.1.mlp.{projection}.weight"]
        weight_NK[7] = weight_NK[4]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return model


def test_a_singular_hessian_takes_more_dampening_and_that_is_said(
    twins: Path, text_file: Path, tmp_path: Path
) -> None:
    """Ten times the least; quantize does the same, and only for the linear that needs it."""
    quantizing = Quantize(
        str(twins),
        str(tmp_path / "rounded"),
        dataset=(str(text_file),),
        num_calibration_samples=16,
        max_seq_length=64,
        dampening_frac=0.0,
        smoothing_strength=0.0,  # any other makes the twins differ
    )
    pruning = replace(small(twins, tmp_path / "out", text_file), sparsity=0.0, dampening_frac=0.0)
    pruning = replace(pruning, method="sparsegpt")
    for stage, job in ((prune, pruning), (quantize, quantizing)):
        events: list[Event] = []
        stage(job, events.append)  # type: ignore[operator]
        [said] = [event.message for event in events if event.lasting]
        assert said.startswith("model.layers.1.mlp.down_proj: took a dampening_frac of 0.01")
        record = json.loads((Path(job.output_dir) / "gossamer.json").read_text())
        assert record["metrics"]["dampening"] == {"model.layers.1.mlp.down_proj": 0.01}


@pytest.mark.parametrize("method", ["admm", "sparsegpt", "wanda", "magnitude", "quantize"])
def test_activations_that_overflow_are_laid_to_their_linear_and_row(
    method: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """A token that one row has, alone in its embedding's sixth place, times a norm's weight near infinity."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama("llama2"), model)
    job = small(model, tmp_path / "out", text_file)
    ids_BT = calibration_ids(Checkpoint.open(model), job)
    first = 14 if method == "magnitude" else 0  # which computes no inputs: errors tell, of held-out rows
    row, token = next(
        (row, token)
        for row in reversed(range(first, 16))
        for token in ids_BT[row].tolist()
        if (ids_BT[first:] == token).any(1).sum() == 1
    )
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 5] = 0.0
    weights["model.embed_tokens.weight"][token, 5] = 1.0
    weights["model.layers.0.input_layernorm.weight"][5] = 3e38
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    words = Tokenizer.open(model).decode(ids_BT[row, 1:16].tolist())
    linears = "what follows layer 0" if method == "magnitude" else "model.layers.0.self_attn.q_proj, .*v_proj"
    message = (
        rf"{linears}: the inputs .* in row {row} of the calibration text \(it begins {re.escape(repr(words))}"
    )
    with pytest.raises(CalibrationError, match=message):
        if method == "quantize":
            options = {"num_calibration_samples": 16, "max_seq_length": 64}
            quantize(Quantize(job.model, job.output_dir, dataset=job.dataset, **options))
        else:
            prune(replace(job, method=method))
    assert left_nothing(tmp_path / "out")


@pytest.mark.parametrize("reconstruct_epochs", [0, 2])
def test_the_report_has_the_figures_and_is_not_taken_along(
    reconstruct_epochs: int, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama("llama2"), tmp_path / "pruned", text_file)
    job = replace(job, reconstruct_epochs=reconstruct_epochs)
    result = prune(job)
    text = (tmp_path / "pruned" / "report.md").read_text()
    assert f"calibrated on: {in_words(result.quality)[1]}." in text
    assert all(f" {error:.4f} |" in text for error in result.errors)
    assert ("| gained |" in text) == bool(reconstruct_epochs)
    assert "| layer | q | k | v | o | gate | up | down |" in text and "| sparsity | 0.5 |" in text
    assert "](errors.png)" in text
    assert (tmp_path / "pruned" / "errors.png").stat().st_size > 5000
    options = {"num_calibration_samples": 16, "max_seq_length": 64}
    second = Quantize(job.output_dir, str(tmp_path / "rounded"), dataset=job.dataset, **options)
    quantize(second)
    metrics = json.loads((tmp_path / "rounded" / "gossamer.json").read_text())["metrics"]
    text = (tmp_path / "rounded" / "report.md").read_text()
    assert all(f"{error:.2e}" in text for error in metrics["linear_errors"].values())
    assert len(metrics["linear_errors"]) == 14
    assert not {"report.md", "errors.png"} & {file.name for file in companions(Path(job.output_dir))}


def test_a_layer_that_no_dampening_helps_is_named_and_leaves_nothing(
    twins: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian, "LADDER", (1e-18, 1e-17))
    job = replace(small(twins, tmp_path / "out", text_file), sparsity=0.0, dampening_frac=0.0)
    with pytest.raises(
        CalibrationError,
        match=r"model\.layers\.1\.mlp\.down_proj.* of 0, 1e-21, 1e-20:.*--num-calibration-samples",
    ):
        prune(job)
    assert left_nothing(tmp_path / "out")


def test_an_output_that_exists_is_kept_unless_told_otherwise(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama("llama2"), tmp_path / "out", text_file)
    prune(job)
    before = (tmp_path / "out" / "gossamer.json").read_bytes()
    with pytest.raises(ConfigError, match="--overwrite"):
        prune(job)
    assert (tmp_path / "out" / "gossamer.json").read_bytes() == before
    prune(replace(job, sparsity=0.25, overwrite=True))
    assert Checkpoint.open(tmp_path / "out").sparsity() == pytest.approx(0.25, abs=1e-3)


def test_magnitude_keeps_the_largest_weights_as_they_are(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = replace(small(tiny_llama("llama2"), tmp_path / "out", text_file), method="magnitude")
    prune(job)
    parent, child = Checkpoint.open(job.model), Checkpoint.open(job.output_dir)
    for name in child.linears:
        before, after = parent.float32(f"{name}.weight"), child.float32(f"{name}.weight")
        kept = after != 0
        np.testing.assert_array_equal(after[kept], before[kept])
        assert abs(before[kept]).min() >= abs(before[~kept]).max()


def test_wanda_leaves_what_it_keeps_as_it_is_and_compares_within_outputs(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """The first layer's q, against the formula on what transformers gives that layer."""
    job = replace(small(tiny_llama("llama2"), tmp_path / "out", text_file, 0.6), method="wanda")
    prune(job)
    parent, child = Checkpoint.open(job.model), Checkpoint.open(job.output_dir)
    for name in child.linears:
        before, after = parent.float32(f"{name}.weight"), child.float32(f"{name}.weight")
        np.testing.assert_array_equal(after[after != 0], before[after != 0])
        assert np.count_nonzero(after == 0) == round(0.6 * after.size)
    loaded: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    q_proj = loaded.model.layers[0].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        loaded(calibration_ids(parent, job)[:-2])
    score_NK = q_proj.weight.detach().abs() * seen[0].flatten(0, 1).norm(dim=0)
    kept_NK = torch.from_numpy(child.float32("model.layers.0.self_attn.q_proj.weight") != 0)
    for score_K, kept_K in zip(score_NK, kept_NK, strict=True):
        assert score_K[kept_K].min() >= score_K[~kept_K].max() * (1 - 1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda", "magnitude"])
def test_every_method_gives_a_pattern_and_keeps_zeros(
    method: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    first = replace(small(tiny_llama("bf16"), tmp_path / "quarter", text_file, 0.25), method=method)
    job = replace(
        first, model=first.output_dir, output_dir=str(tmp_path / "out"), sparsity=0.5, pattern="2:4"
    )
    prune(first)
    prune(job)
    before, after = Checkpoint.open(first.output_dir), Checkpoint.open(job.output_dir)
    for name in after.linears:
        came_in, zeros = before.zeros(f"{name}.weight"), after.zeros(f"{name}.weight")
        assert (zeros | ~came_in).all()
        groups, groups_before = zeros.reshape(-1, 4).sum(1), came_in.reshape(-1, 4).sum(1)
        np.testing.assert_array_equal(groups, np.maximum(groups_before, 2))


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda", "magnitude"])
def test_every_method_gives_blocks_and_keeps_them(
    method: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """A block of which only a part is zero has an input that no row has a weight for: it was always zero."""
    first = replace(small(tiny_llama("bf16"), tmp_path / "half", text_file, 0.5), method=method)
    first = replace(first, pattern="1x4")
    prune(first)
    prune(replace(first, model=first.output_dir, output_dir=str(tmp_path / "out"), sparsity=0.7))
    before, after = Checkpoint.open(first.output_dir), Checkpoint.open(tmp_path / "out")
    for sparsity, checkpoint in ((0.5, before), (0.7, after)):
        for name in checkpoint.linears:
            zeros = checkpoint.zeros(f"{name}.weight")
            whole = zeros.reshape(-1, 4).all(1)
            assert not (zeros & ~zeros.all(0)).reshape(-1, 4)[~whole].any()
            assert abs(whole.mean() - sparsity) < 3 / len(whole)
    for name in after.linears:
        assert after.zeros(f"{name}.weight")[before.zeros(f"{name}.weight")].all()


@pytest.mark.parametrize("reconstruct_epochs", [0, 1])
def test_a_pattern_stays_through_reconstruction_and_pruning_again(
    reconstruct_epochs: int, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = replace(
        small(tiny_llama("llama3"), tmp_path / "out", text_file, 0.75),
        pattern="1:4",
        reconstruct_epochs=reconstruct_epochs,
    )
    prune(job)
    again = replace(job, model=job.output_dir, output_dir=str(tmp_path / "again"))
    prune(again)
    for name in (child := Checkpoint.open(job.output_dir)).linears:
        zeros = child.zeros(f"{name}.weight")
        assert (zeros.reshape(-1, 4).sum(1) == 3).all()
        np.testing.assert_array_equal(Checkpoint.open(again.output_dir).zeros(f"{name}.weight"), zeros)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "2:4", "sparsity": 0.7}, r"2:4 fixes the sparsity at 0\.5, and --sparsity is 0\.7"),
        ({"pattern": "1:4", "sparsity": 0.5}, r"1:4 fixes the sparsity at 0\.75, and --sparsity is 0\.5"),
        (
            {"pattern": "2:4", "sparsity_profile": "auto"},
            r"--sparsity-profile auto gives linears different shares .* --pattern 2:4 fixes them all at 0\.5",
        ),
        ({"pattern": "2:4", "sparsity_profile": "owl"}, "--sparsity-profile owl gives .* leave out one"),
        ({"sparsity_profile": "owl", "owl_m": 0.0}, "--owl-m is 0 .* above 0"),
        ({"sparsity_profile": "owl", "owl_lambda": 1.0}, "--owl-lambda 1; expected"),
        ({"sparsity_profile": "owl", "owl_lambda": float("nan")}, "--owl-lambda nan; expected"),
        ({"pattern": "4:2"}, "--pattern is 4:2; expected unstructured; 1xM such as 1x4"),
        ({"pattern": "7:14"}, r"q_proj has \d+ inputs, of which --pattern 7:14 makes no whole groups"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(
    options: dict[str, Any], words: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(GossamerError, match=words):
        prune(replace(small(tiny_llama("llama2"), tmp_path / "out", text_file), **options))
    assert left_nothing(tmp_path / "out")


@pytest.mark.parametrize("profile", ["owl", "auto"])
def test_a_profile_shares_out_exactly_the_zeros_asked_for_and_records_how(
    profile: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = replace(small(tiny_llama("llama3"), tmp_path / "out", text_file, 0.6), sparsity_profile=profile)
    events: list[Event] = []
    result = prune(job, events.append)
    child = Checkpoint.open(job.output_dir)
    zeros = {name: child.zeros(f"{name}.weight") for name in child.linears}
    for name, share in result.budget.items():
        assert np.count_nonzero(zeros[name]) == round(share * zeros[name].size)
    assert sum(map(np.count_nonzero, zeros.values())) == round(0.6 * sum(it.size for it in zeros.values()))
    metrics = json.loads((Path(job.output_dir) / "gossamer.json").read_text())["metrics"]
    assert metrics["budget"] == result.budget and list(result.budget) == child.linears
    table = result.tables()[-1]
    assert table.columns == ("layer", "q", "k", "v", "o", "gate", "up", "down") and len(table.rows) == 2
    assert table.rows[1][7] == f"{result.budget[child.linears[-1]]:.1%}"
    layers = [set(row[1:]) for row in table.rows]
    assert all(len(shares) == 1 for shares in layers) if profile == "owl" else len(layers[0]) > 3
    assert [event.message for event in events if event.stage == "budget"] == ["layer 0", "layer 1"]


def test_owl_keeps_more_of_the_layer_with_more_outliers(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "outliers"
    shutil.copytree(tiny_llama("llama2"), model)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if "layers.1.mlp" in name:
            weight[::8] *= 30
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    job = replace(
        small(model, tmp_path / "out", text_file, 0.5),
        method="wanda",
        sparsity_profile="owl",
        owl_lambda=0.1,
    )
    budget = prune(job).budget
    first, second = (budget[f"model.layers.{layer}.mlp.up_proj"] for layer in range(2))
    assert (first, second) == pytest.approx((0.6, 0.4), abs=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "wanda", "magnitude"])
def test_auto_keeps_zeros_that_came_in_with_every_method(
    method: Any, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    """One linear comes with 90% zeros, and keeps at least those."""
    model = tmp_path / "sparse"
    shutil.copytree(tiny_llama("llama2"), model)
    weights, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name][:, : int(0.9 * weights[name].shape[1])] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    job = replace(
        small(model, tmp_path / "out", text_file, 0.6),
        method=method,
        sparsity_profile="auto",
    )
    prune(job)
    before, after = Checkpoint.open(model), Checkpoint.open(job.output_dir)
    num_zeros = num_weights = 0
    for linear in after.linears:
        zeros = after.zeros(f"{linear}.weight")
        assert (zeros | ~before.zeros(f"{linear}.weight")).all()
        num_zeros, num_weights = num_zeros + np.count_nonzero(zeros), num_weights + zeros.size
    assert num_zeros == round(0.6 * num_weights)


def test_admm_counts_zeros_exactly_and_keeps_those_that_came_in(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    half = replace(small(tiny_llama("llama3"), tmp_path / "half", text_file, 0.5), method="admm")
    more = replace(half, model=half.output_dir, output_dir=str(tmp_path / "more"), sparsity=0.7)
    prune(half)
    prune(more)
    before, after = Checkpoint.open(half.output_dir), Checkpoint.open(more.output_dir)
    for name in after.linears:
        zeros = after.zeros(f"{name}.weight")
        assert (zeros | ~before.zeros(f"{name}.weight")).all()
        assert np.count_nonzero(zeros) == round(0.7 * zeros.size)


@pytest.mark.parametrize("variant", ["llama2", "bf16"])
def test_reconstruction_keeps_masks_and_types_and_repeats_itself(
    variant: str, tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama(variant), tmp_path / "as-pruned", text_file, 0.6)
    job = replace(job, num_calibration_samples=64)  # of fewer rows a layer is learned by heart
    trained = replace(job, output_dir=str(tmp_path / "trained"), reconstruct_epochs=2)
    as_pruned, result = prune(job), prune(trained)
    assert all(min(errors) < errors[0] for errors in result.reconstruction)
    assert result.errors == pytest.approx([min(errors) for errors in result.reconstruction], rel=1e-4)
    assert result.reconstruction[0][0] == pytest.approx(as_pruned.errors[0], rel=1e-5)
    parent, child = Checkpoint.open(job.model), Checkpoint.open(trained.output_dir)
    first = Checkpoint.open(job.output_dir).linears[0]
    mask = Checkpoint.open(job.output_dir).zeros(f"{first}.weight")
    np.testing.assert_array_equal(child.zeros(f"{first}.weight"), mask)
    for name in child.names:
        assert child.dtype(name) == parent.dtype(name)
    norms = [name for name in child.names if "norm" in name and "layers" in name]
    assert any((child.float32(name) != parent.float32(name)).any() for name in norms)
    again = replace(trained, output_dir=str(tmp_path / "again"))
    prune(again)
    for name in child.names:
        np.testing.assert_array_equal(Checkpoint.open(again.output_dir).raw(name), child.raw(name))


def test_reconstruction_that_fails_leaves_layers_as_pruned_and_says_so(
    tiny_llama: TinyLlama, text_file: Path, tmp_path: Path
) -> None:
    job = small(tiny_llama("llama2"), tmp_path / "as-pruned", text_file)
    failing = replace(
        job, output_dir=str(tmp_path / "failed"), reconstruct_epochs=1, reconstruct_learning_rate=1e3
    )
    events: list[Event] = []
    as_pruned, result = prune(job), prune(failing, events.append)
    said = [event.message for event in events if event.lasting]
    assert len(said) == 2 and "layer 0 stays as pruned" in said[0]
    assert result.quality["perplexity"] == pytest.approx(as_pruned.quality["perplexity"], rel=1e-3)
    for name in (found := Checkpoint.open(failing.output_dir)).names:
        if "layers.0" in name:
            np.testing.assert_array_equal(found.raw(name), Checkpoint.open(job.output_dir).raw(name))


@pytest.mark.parametrize(
    ("model", "sparsity", "bound"),
    [
        ("stories260k", 0.5, 21.85),
        ("stories260k", 0.7, 126.9),
        ("stories3m", 0.5, 11.8),
        ("stories3m", 0.7, 31.0),
    ],
)
def test_no_worse_than_llm_compressor(
    model: str, sparsity: float, bound: float, shared_data: Path, reserved_slice: Path, tmp_path: Path
) -> None:
    """The setting of shared/data/README.md: 128 rows of 512 tokens, perplexity on the reserved slice.

    llm-compressor has 21.85 and 126.9 there, and 19.26 and 101.1 for stories3m; ADMM alone is far below.
    """
    calibration = str(shared_data / "text" / "tinystories-train-a.txt")
    source = str(shared_data / "models" / model)
    options = {"dataset": (calibration,), "max_seq_length": 512, "reconstruct_epochs": 0}
    job = Prune(source, str(tmp_path / "out"), sparsity=sparsity, **options)
    torch.set_num_threads(os.cpu_count() or 1)
    prune(job)
    torch.set_num_threads(1)
    result = evaluate(Evaluate(job.output_dir, dataset=str(reserved_slice)))
    assert result.perplexity is not None and result.perplexity <= bound
