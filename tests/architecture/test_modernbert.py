"""ModernBERT as an anatomy: its tensors, configurations and layers, held against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ModernBertConfig

from encoders import save_encoder
from gossamer.architecture.encoder import TASKS
from gossamer.architecture.families import read_anatomy
from gossamer.architecture.rope import Rope
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.fused import fused_matrices
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError
from gossamer.layerwise.rounding import smooth
from gossamer.modules.decoder import blocks, embed
from gossamer.modules.encoder import normalized
from gossamer.training.whole_model import load_model
from llamas import walk_through

SWITCHES: list[dict[str, Any]] = [
    {},
    {
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": False,
    },
    {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    {"local_attention": 7, "global_attn_every_n_layers": 2},
]
# As the first ModernBERT's authors published it, shortened to two layers.
PUBLISHED = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 20000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 5,
    "position_embedding_type": "absolute",
    "reference_compile": True,
    "sparse_prediction": False,
    "vocab_size": 50368,
}


@pytest.mark.parametrize("ending", TASKS)
@pytest.mark.parametrize("switches", SWITCHES)
def test_names_and_shapes_are_those_of_transformers(
    tmp_path: Path, switches: dict[str, Any], ending: str
) -> None:
    config = {"num_labels": 5} if ending in ("ForSequenceClassification", "ForTokenClassification") else {}
    save_encoder(tmp_path, f"ModernBert{ending}", **config, **switches)
    source, tensors = Checkpoint.open(tmp_path), load_file(tmp_path / "model.safetensors")
    anatomy = source.architecture
    shapes = {name: [*entry.shape] for name, entry in source.entries.items()}
    for fused in fused_matrices(anatomy):
        parts = [shapes.pop(f"{part}.weight") for part in fused.parts]
        shapes[f"{fused.name}.weight"] = [sum(rows for rows, _ in parts), parts[0][1]]
        if biases := [shapes.pop(f"{part}.bias", None) for part in fused.parts if f"{part}.bias" in shapes]:
            shapes[f"{fused.name}.bias"] = [sum(size for [size] in biases if size)]
    assert shapes == {name: [*tensor.shape] for name, tensor in tensors.items()}
    assert anatomy.is_encoder and (anatomy.task, anatomy.max_position_embeddings) == (TASKS[ending], 66)


@pytest.mark.parametrize("switches", SWITCHES)
def test_layers_and_their_smoothing_compute_what_transformers_computes(
    tmp_path: Path, switches: dict[str, Any]
) -> None:
    model, ids_BT = save_encoder(tmp_path, "ModernBertModel", **switches), torch.randint(5, 31, (2, 60))
    source = Checkpoint.open(tmp_path)
    hidden_BTD, folds = embed(source, ids_BT), 0
    for block in blocks(source):
        called_BTD, before = block(hidden_BTD), block.linear("o").weight.clone()
        folds += len(smooth(block, source, hidden_BTD, 0.8, []))
        assert not block.linear("o").weight.equal(before)
        torch.testing.assert_close(walk_through(block, hidden_BTD), called_BTD, rtol=1e-4, atol=1e-5)
    norm = source.architecture.final_norm
    assert norm is not None and folds == 16
    with torch.no_grad():
        wanted_BTD = model(ids_BT).last_hidden_state
        torch.testing.assert_close(load_model(source)(ids_BT).last_hidden_state, wanted_BTD)
    torch.testing.assert_close(normalized(source, norm, hidden_BTD), wanted_BTD, rtol=1e-4, atol=1e-5)


def test_what_was_published_means_what_transformers_takes_it_to_mean() -> None:
    found, wanted = read_anatomy(PUBLISHED), ModernBertConfig.from_dict(PUBLISHED)
    heads = [block.attention for block in found.blocks]
    assert [it.window for it in heads] == [None, 129, 129, None, 129]
    for it, layer_type in zip(heads, wanted.layer_types, strict=True):
        assert it.rope == Rope(wanted.rope_parameters[layer_type]["rope_theta"])
    saved = json.loads(wanted.to_json_string()) | {"architectures": PUBLISHED["architectures"]}
    assert read_anatomy(saved) == found
    assert read_anatomy({"architectures": ["ModernBertModel"]}).num_layers == 22


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"hidden_activation": "silu"},
            UnsupportedError,
            "found hidden_activation = 'silu'; supported: 'gelu'",
        ),
        ({"classifier_activation": "relu"}, UnsupportedError, "found classifier_activation = 'relu'"),
        ({"tie_word_embeddings": False}, UnsupportedError, "found tie_word_embeddings = False"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, UnsupportedError, "found rope_scaling"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4}}},
            UnsupportedError,
            "found rope_type = 'yarn'; supported: 'default'",
        ),
        ({"num_attention_heads": 256}, UnsupportedError, "head_dim 3 is odd"),
        ({"layer_types": ["chunked_attention"] * 5}, UnsupportedError, "found layer_types"),
        ({"architectures": ["ModernBertForMultipleChoice"]}, UnsupportedError, "ModernBertForMultipleChoice"),
        ({"layer_types": ["full_attention"] * 4}, CheckpointError, "4 layer_types of 5 layers"),
        ({"num_attention_heads": 7}, CheckpointError, "does not divide by 7 heads"),
        ({"classifier_pooling": "max"}, CheckpointError, "classifier_pooling is 'max'; expected cls or mean"),
        ({"local_attention": 0}, CheckpointError, "local_attention is 0"),
        ({"norm_bias": "no"}, CheckpointError, "norm_bias is 'no'; expected true or false"),
        ({"global_rope_theta": "wide"}, CheckpointError, "global_rope_theta is 'wide'"),
        ({"rope_parameters": {"sliding_attention": 5}}, CheckpointError, "sliding_attention is 5"),
    ],
)
def test_other_modernberts_are_refused(
    change: dict[str, object], error: type[GossamerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_anatomy(PUBLISHED | change)
