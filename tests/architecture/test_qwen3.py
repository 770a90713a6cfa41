"""Qwen3 through every stage and the engine: norms of queries and keys, heads apart from the hidden size."""

from pathlib import Path

import pytest
from transformers import Qwen3Config

from architecture import every_stage
from gossamer import cli
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import UnsupportedError
from gossamer.packed.reader import Packed
from gossamer.tools.inspect import Inspect, inspect
from llamas import save_random

CONFIG = Qwen3Config(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=20,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("qwen3") / "model")


def test_layers_equal_transformers(qwen3: Path) -> None:
    every_stage.check_layers(qwen3)


def test_the_engine_equals_transformers(qwen3: Path, tmp_path: Path) -> None:
    every_stage.check_engine(qwen3, tmp_path / "model.goss")


def test_layers_with_and_without_a_window(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1, "layer_types": None}
    config = Qwen3Config(**{**CONFIG.to_dict(), **windows})
    directory = save_random(config, tmp_path / "model")
    found = [block.attention.window for block in Checkpoint.open(directory).architecture.blocks]
    assert found == [None, 19]
    every_stage.check_layers(directory)
    every_stage.check_smoothing(directory)
    every_stage.check_engine(directory, tmp_path / "model.goss")
    assert Packed.open(tmp_path / "model.goss").metadata["version"] == "3"
    [facts, *_] = inspect(Inspect(str(directory))).tables()
    assert "all in 1 of 2 layers, 19 in 1 of 2 layers" in cli.markdown(facts)


def test_every_stage(qwen3: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(qwen3, text_file, tmp_path)
    assert packed.metadata["version"] == "4"  # as the embedding is tied, and so one INT8 table
    assert packed.vector("model.layers.1.self_attn.q_norm.weight").shape == (20,)


def test_what_is_not_supported_is_refused() -> None:
    settings = CONFIG.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    assert read_anatomy(settings).attention.head_dim == 20
    left_out = ("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    config = {key: value for key, value in settings.items() if key not in left_out} | {
        "num_attention_heads": 64
    }
    anatomy, theirs = read_anatomy(config), Qwen3Config()
    assert anatomy.attention.head_dim == theirs.head_dim
    assert anatomy.attention.num_kv_heads == theirs.num_key_value_heads
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    layers = {"layer_types": ["full_attention", "linear_attention"]}
    for change in (layers, {"attention_bias": True}, {"hidden_act": "gelu"}):
        with pytest.raises(UnsupportedError, match=next(iter(change))):
            read_anatomy(settings | change)
