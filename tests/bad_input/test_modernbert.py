"""ModernBERTs that nothing here computes, and damaged ones: refused before their weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from bad_input.cases import PRUNE, Case, Tiny, by_name, check_refused
from encoders import save_encoder


def modern(
    settings: dict[str, Any] | None = None, tensors: Callable[[dict[str, Any]], Any] = lambda found: None
) -> Callable[[Path], object]:
    """A ModernBERT in the model's place, other settings in its config.json, and its tensors changed."""

    def put(model: Path) -> None:
        shutil.rmtree(model)
        save_encoder(model, "ModernBertForMaskedLM")
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        (model / "config.json").write_text(json.dumps(config | (settings or {})), encoding="utf-8")
        found = load_file(model / "model.safetensors")
        tensors(found)
        save_file(found, model / "model.safetensors", {"format": "pt"})

    return put


def cut(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda found: found.update({name: found[name][:-1].clone()})


TYPES = ["full_attention", "sliding_attention"] * 2
WQKV = "model.layers.1.attn.Wqkv.weight"
TABLE: list[Case] = [
    (
        "another activation",
        "llama2",
        modern({"hidden_activation": "gelu_new"}),
        PRUNE,
        ["gelu_new", "'gelu'"],
    ),
    (
        "stretched rope",
        "llama2",
        modern({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}),
        PRUNE,
        ["rope_type = 'yarn'", "'default'"],
    ),
    (
        "layers of a third type",
        "llama2",
        modern({"layer_types": [*TYPES[:3], "chunked_attention"]}),
        PRUNE,
        ["found layer_types", "chunked_attention", "full_attention and sliding_attention"],
    ),
    (
        "types of other layers",
        "llama2",
        modern({"layer_types": TYPES[:3]}),
        PRUNE,
        ["3 layer_types of 4 layers"],
    ),
    ("no window", "llama2", modern({"local_attention": -1}), PRUNE, ["local_attention is -1", "positive"]),
    (
        "a head that multiplies by a matrix of its own",
        "llama2",
        modern({"tie_word_embeddings": False}),
        PRUNE,
        ["tie_word_embeddings = False", "True"],
    ),
    (
        "biases that are not there",
        "llama2",
        modern({"attention_bias": True}),
        PRUNE,
        ["model.layers.0.attn", "bias", "missing"],
    ),
    (
        "biases of norms that are not there",
        "llama2",
        modern({"norm_bias": True}),
        PRUNE,
        ["norm.bias", "missing"],
    ),
    (
        "too few queries, keys and values",
        "llama2",
        modern(tensors=cut(WQKV)),
        PRUNE,
        [WQKV, "72 rows"],
    ),
    (
        "no gate",
        "llama2",
        modern(tensors=lambda found: found.pop("model.layers.2.mlp.Wi.weight")),
        PRUNE,
        ["model.layers.2.mlp.Wi.weight is missing", "[112, 24]"],
    ),
]


@by_name(TABLE)
def test_bad_input_is_refused_with_a_message(
    case: Case, tiny_llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(case, tiny_llama, tmp_path, capsys)
