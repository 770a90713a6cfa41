"""Llama with biases of all linears through every stage and the engine; plain ones are what most tests use."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from llamas import save_random

CONFIG = LlamaConfig(
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
    attention_bias=True,
    mlp_bias=True,
)


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("llama") / "model")


def test_layers_equal_transformers(biased: Path) -> None:
    every_stage.check_layers(biased)


def test_smoothing_changes_no_layer(biased: Path) -> None:
    every_stage.check_smoothing(biased)


def test_the_engine_equals_transformers(biased: Path, tmp_path: Path) -> None:
    every_stage.check_engine(biased, tmp_path / "model.goss")


def test_every_stage(biased: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(biased, text_file, tmp_path)
    assert packed.metadata["version"] == "2"
    assert packed.vector("model.layers.1.mlp.gate_proj.bias").shape == (104,)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_each_flag_gives_its_linears_a_bias(attention: bool, feed_forward: bool) -> None:
    flags = {"attention_bias": attention, "mlp_bias": feed_forward}
    linears = (
        read_anatomy(CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"]} | flags).blocks[0].linears
    )
    expected = {"q", "k", "v", "o"} if attention else set()
    expected |= {"gate", "up", "down"} if feed_forward else set()
    assert {role for role, linear in linears.items() if linear.bias} == expected


def test_what_is_left_out_means_what_transformers_means_by_it() -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings = {key: value for key, value in CONFIG.to_dict().items() if key in sizes}
    anatomy = read_anatomy(settings | {"architectures": ["LlamaForCausalLM"]})
    theirs = LlamaConfig(**settings)
    assert anatomy.attention.num_kv_heads == theirs.num_key_value_heads
    assert anatomy.attention.head_dim == theirs.head_dim
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    assert anatomy.tie_word_embeddings == theirs.tie_word_embeddings
    assert anatomy.attention.rope is not None and theirs.rope_parameters is not None
    assert anatomy.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (anatomy.bos_token_id, anatomy.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
