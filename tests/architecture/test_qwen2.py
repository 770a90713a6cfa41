"""Qwen2 through every stage and the engine: biases of queries, keys and values."""

from pathlib import Path

import pytest
from transformers import Qwen2Config

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import UnsupportedError
from gossamer.packed.reader import Packed
from llamas import save_random

CONFIG = Qwen2Config(
    vocab_size=320,
    hidden_size=60,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("qwen2") / "model")


def test_layers_equal_transformers(qwen2: Path) -> None:
    every_stage.check_layers(qwen2)


def test_smoothing_changes_no_layer(qwen2: Path) -> None:
    every_stage.check_smoothing(qwen2)


def test_the_engine_equals_transformers(qwen2: Path, tmp_path: Path) -> None:
    every_stage.check_engine(qwen2, tmp_path / "model.goss")


def test_layers_with_and_without_a_window(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1, "layer_types": None}
    config = Qwen2Config(**{**CONFIG.to_dict(), **windows})
    directory = save_random(config, tmp_path / "model")
    found = [block.attention.window for block in Checkpoint.open(directory).architecture.blocks]
    assert found == [None, 19]
    every_stage.check_layers(directory)
    every_stage.check_smoothing(directory)
    every_stage.check_engine(directory, tmp_path / "model.goss")
    assert Packed.open(tmp_path / "model.goss").metadata["version"] == "3"


def test_every_stage(qwen2: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(qwen2, text_file, tmp_path)
    assert packed.metadata["version"] == "2"
    biases = {name for name in packed.tensors if name.startswith("model.layers.1.") and name.endswith("bias")}
    assert biases == {f"model.layers.1.self_attn.{role}_proj.bias" for role in "qkv"}


def test_what_is_left_out_means_what_transformers_means_by_it() -> None:
    settings = CONFIG.to_dict() | {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 64}
    left_out = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "layer_types")
    left_out += ("rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    settings = {key: value for key, value in settings.items() if key not in left_out}
    anatomy, theirs = read_anatomy(settings | {"hidden_size": 128}), Qwen2Config()
    assert anatomy.attention.num_kv_heads == theirs.num_key_value_heads
    assert anatomy.attention.head_dim == 2
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    assert anatomy.tie_word_embeddings == theirs.tie_word_embeddings
    assert anatomy.attention.rope is not None and theirs.rope_parameters is not None
    assert anatomy.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (anatomy.bos_token_id, anatomy.eos_token_ids) == (None, ())
    many = read_anatomy(settings | {"hidden_size": 128, "num_key_value_heads": None})
    assert many.attention.num_kv_heads == 64


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention", "linear_attention"]},
        {"hidden_act": "gelu"},
    ],
)
def test_what_is_not_supported_is_refused(change: dict) -> None:
    settings = CONFIG.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
    assert read_anatomy(settings).attention.num_kv_heads == 2
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        read_anatomy(settings | change)
