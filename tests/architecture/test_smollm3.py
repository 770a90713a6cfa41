"""SmolLM3 through every stage and the engine: layers that do not encode positions."""

from pathlib import Path
from typing import Any

import pytest
from transformers import SmolLM3Config

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from gossamer.errors import CheckpointError, UnsupportedError
from llamas import save_random

CONFIG = SmolLM3Config(
    vocab_size=320,
    hidden_size=60,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    no_rope_layer_interval=2,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=1,
)
SETTINGS = CONFIG.to_dict() | {"architectures": ["SmolLM3ForCausalLM"]}


@pytest.fixture(scope="module")
def smollm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("smollm3") / "model")


def test_layers_equal_transformers(smollm3: Path) -> None:
    every_stage.check_layers(smollm3)


def test_smoothing_changes_no_layer(smollm3: Path) -> None:
    every_stage.check_smoothing(smollm3)


def test_the_engine_equals_transformers(smollm3: Path, tmp_path: Path) -> None:
    every_stage.check_engine(smollm3, tmp_path / "model.goss")


def test_every_stage(smollm3: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(smollm3, text_file, tmp_path)
    assert packed.metadata["version"] == "4"  # as the embedding is tied, and so one INT8 table
    assert [block["rope"] for block in packed.native_config()["blocks"]] == [True, False, True]


def ropes(settings: dict[str, Any]) -> list[bool]:
    return [block.attention.rope is not None for block in read_anatomy(settings).blocks]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"no_rope_layers": [0, 1, 1, 0, 0]},
        {"no_rope_layers": [1, 1, 0, 1, 1, 0, 0]},
        {"no_rope_layers": None, "no_rope_layer_interval": 3},
        {"no_rope_layer_interval": 1},
        {"no_rope_layers": [0, 0, 0, 0, 0]},
    ],
)
def test_layers_without_rope_are_those_of_transformers(change: dict[str, Any]) -> None:
    left_out = ("no_rope_layers", "no_rope_layer_interval", "layer_types")
    settings = {key: value for key, value in SETTINGS.items() if key not in left_out}
    settings |= {"num_hidden_layers": 5, **change}
    expected = SmolLM3Config(**settings).no_rope_layers
    assert expected is not None and ropes(settings) == [bool(has) for has in expected[:5]]


def test_what_is_left_out_means_what_transformers_means_by_it() -> None:
    sizes = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    settings = {key: SETTINGS[key] for key in sizes} | {"hidden_size": 96, "num_attention_heads": 12}
    anatomy, theirs = read_anatomy(settings), SmolLM3Config()
    assert anatomy.attention.num_kv_heads == theirs.num_key_value_heads
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    assert anatomy.tie_word_embeddings == theirs.tie_word_embeddings
    assert anatomy.attention.rope is not None and theirs.rope_parameters is not None
    assert anatomy.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (anatomy.bos_token_id, anatomy.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    biased = read_anatomy(settings | {"attention_bias": True, "mlp_bias": True})
    assert all(linear.bias for linear in biased.blocks[0].linears.values())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_sliding_window": True}, UnsupportedError),
        ({"layer_types": ["sliding_attention"] * 3}, UnsupportedError),
        ({"hidden_act": "gelu"}, UnsupportedError),
        ({"no_rope_layers": [1, 0]}, CheckpointError),
        ({"no_rope_layers": [1, 0, "1"]}, CheckpointError),
        ({"no_rope_layers": 4}, CheckpointError),
        ({"no_rope_layers": None, "no_rope_layer_interval": 0}, CheckpointError),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    assert ropes(SETTINGS) == [True, False, True]
    with pytest.raises(error, match=list(change)[-1]):
        read_anatomy(SETTINGS | change)
