"""Encoders through the stages that make them small."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import Encoder
from gossamer.errors import ConfigError, UnsupportedError
from gossamer.modules.decoder import blocks, embed
from gossamer.modules.encoder import normalized
from gossamer.runs.compress import Compress, compress
from gossamer.stages.evaluate import Evaluate, evaluate
from gossamer.stages.prune import Prune, prune
from gossamer.stages.quantize import Quantize, quantize
from gossamer.tools.inspect import Inspect, inspect
from gossamer.training.whole_model import load_model

NAMES = [
    "BertModel",
    "RobertaForMaskedLM",
    "XLMRobertaForSequenceClassification",
    "BertForTokenClassification",
    "ModernBertModel",
    "ModernBertForSequenceClassification",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    letters = np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], 4000)
    file.write_text(" ".join(letters), encoding="utf-8")
    return file


def job(model: Path, text: Path, **options: object) -> Prune:
    few = {"num_calibration_samples": 16, "max_seq_length": 24, "threads": 1}
    return Prune(str(model), output_dir=str(model) + "-out", dataset=(str(text),), **few | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    model, ids_BT = save_encoder(tmp_path, name), torch.randint(5, 31, (3, 20))
    source = Checkpoint.open(tmp_path)
    walked_BTD = embed(source, ids_BT)
    called_BTD, followed_BTD = walked_BTD.clone(), walked_BTD.clone()
    with torch.no_grad():
        for block in blocks(source):
            called_BTD = block(called_BTD)
            for _, pieces in block.walk(walked_BTD):
                list(pieces)
            for _, pieces in block.follow(followed_BTD):
                list(pieces)
        wanted_BTD = model.base_model(ids_BT).last_hidden_state
    for found_BTD in (called_BTD, walked_BTD, followed_BTD):
        if source.architecture.final_norm is not None:
            found_BTD = normalized(source, source.architecture.final_norm, found_BTD)
        torch.testing.assert_close(found_BTD, wanted_BTD, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_the_groups_are_those_of_transformers_linears(tmp_path: Path, name: str) -> None:
    save_encoder(tmp_path, name)
    ids_BT, source, seen = torch.randint(5, 31, (2, 11)), Checkpoint.open(tmp_path), {}
    model = load_model(source)  # with a linear for each that files hold as one
    for path, module in model.named_modules():
        if path in source.linears:
            module.register_forward_hook(lambda _, inputs, __, path=path: seen.update({path: inputs[0]}))
    with torch.no_grad():
        model(ids_BT)
        hidden_BTD, names = embed(source, ids_BT), []
        for block in blocks(source):
            for group, pieces in block.walk(hidden_BTD):
                x_BTK = torch.cat([*pieces])
                for linear in group:
                    torch.testing.assert_close(x_BTK, seen[linear], atol=2e-6, rtol=1e-5)
                names += group
    assert sorted(names) == sorted(source.linears)


@pytest.mark.parametrize("name", NAMES)
def test_prune_makes_a_directory_that_transformers_reads(tmp_path: Path, text: Path, name: str) -> None:
    model = tmp_path / "model"
    save_encoder(model, name)
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}), encoding="utf-8")
    result = prune(job(model, text, sparsity=0.5))
    before, after = Checkpoint.open(model), Checkpoint.open(result.output_dir)
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert 0.5 < result.quality["similarity"] < 1
    for name in set(before.names) - {f"{linear}.weight" for linear in before.linears}:
        if ".layer" not in f".{name}":
            np.testing.assert_array_equal(before.raw(name), after.raw(name))
    assert (Path(result.output_dir) / "1_Pooling" / "config.json").is_file()
    loaded = AutoModel.from_pretrained(result.output_dir)
    tensors = load_file(Path(result.output_dir) / "model.safetensors")
    layer = loaded.layers[0].mlp.Wi if hasattr(loaded, "layers") else loaded.encoder.layer[0].output.dense
    assert any(layer.weight.equal(tensor) for tensor in tensors.values())


def test_similarity_is_that_of_pooled_vectors(tmp_path: Path, text: Path) -> None:
    model = tmp_path / "model"
    save_encoder(model)
    result = prune(job(model, text, sparsity=0.6, reconstruct_epochs=0))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    rows = torch.tensor([2, *ids][: 16 * 24]).view(16, 24)
    rows[:, 0], rows[:, -1] = 2, 3
    vectors = []
    for path in (model, result.output_dir):
        with torch.no_grad():
            vectors.append(AutoModel.from_pretrained(path)(rows[14:]).last_hidden_state.mean(1))
    wanted = torch.nn.functional.cosine_similarity(*vectors).mean().item()
    assert result.quality["similarity"] == pytest.approx(wanted, abs=1e-5)


def test_an_unchanged_encoder_is_like_itself(tmp_path: Path, text: Path) -> None:
    save_encoder(tmp_path / "model")
    result = prune(job(tmp_path / "model", text, sparsity=0.0, reconstruct_epochs=0))
    assert result.quality["similarity"] == pytest.approx(1, abs=1e-6)
    assert max(result.errors) < 1e-9


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_quantize_keeps_zeros_and_the_function(tmp_path: Path, text: Path, scheme: str) -> None:
    model = tmp_path / "model"
    save_encoder(model)
    pruned = prune(job(model, text, sparsity=0.5)).output_dir
    options = {"num_calibration_samples": 16, "max_seq_length": 24, "threads": 1, "dataset": (str(text),)}
    result = quantize(Quantize(pruned, output_dir=str(tmp_path / "q"), scheme=scheme, **options))  # type: ignore[arg-type]
    assert result.num_quantized == 12
    assert {kind: strength for kind, strength in result.strengths.items() if kind != "o"} == dict.fromkeys(
        ("q", "k", "v", "up", "down"), 0.0
    )
    assert result.mean_error < (1e-3 if scheme == "W8A8" else 0.1)
    before, after = Checkpoint.open(pruned), Checkpoint.open(tmp_path / "q")
    for linear in before.linears:
        assert not (before.zeros(f"{linear}.weight") & ~after.zeros(f"{linear}.weight")).any()


def test_compress_teaches_an_embedding_model_its_own_vectors(tmp_path: Path, text: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    save_encoder(model)
    options = {"num_calibration_samples": 16, "max_seq_length": 24, "threads": 1, "dataset": (str(text),)}
    job = Compress(str(model), output_dir=str(output), sparsity=0.7, pretrain_dataset=(str(text),), **options)  # type: ignore[arg-type]
    job = replace(job, num_tokens=1000, freeze="embeddings")
    with pytest.raises(ConfigError, match=r"finetune teaches models for .* one for embedding: leave it out"):
        compress(replace(job, finetune_dataset=(str(text),)))
    assert not output.exists()
    result = compress(job)
    assert [stage for stage, _, _ in result.stages][-2:] == ["quantize", "pack"]
    assert result.sparsity == pytest.approx(0.7, abs=0.01)
    assert Encoder(result.packed, 1).encode("a b c").shape == (24,)


def test_inspect_tells_layers_and_evaluate_has_no_perplexity(tmp_path: Path, text: Path) -> None:
    save_encoder(tmp_path)
    found = inspect(Inspect(str(tmp_path)))
    assert {it.layer for it in found.matrices} == {"word_embeddings", "layer.0", "layer.1"}
    with pytest.raises(UnsupportedError, match="an encoder, which continues no text"):
        evaluate(Evaluate(str(tmp_path), dataset=str(text), threads=1))
