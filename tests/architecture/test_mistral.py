"""Mistral through every stage and the engine: tokens that see a window of the last positions, or all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.evaluation.backends import open_backend
from gossamer.packed.from_checkpoint import pack_checkpoint
from gossamer.packed.reader import Packed
from llamas import save_random

CONFIG = MistralConfig(
    vocab_size=320,
    hidden_size=60,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=640,
    sliding_window=21,
    bos_token_id=0,
    eos_token_id=1,
)


def changed(**settings: object) -> MistralConfig:
    return MistralConfig(**{**CONFIG.to_dict(), **settings})


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("mistral") / "model")


def test_layers_equal_transformers(mistral: Path) -> None:
    every_stage.check_layers(mistral)


def test_smoothing_changes_no_layer(mistral: Path) -> None:
    every_stage.check_smoothing(mistral)


def test_the_engine_equals_transformers(mistral: Path, tmp_path: Path) -> None:
    every_stage.check_engine(mistral, tmp_path / "model.goss")


def test_every_stage(mistral: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(mistral, text_file, tmp_path)
    assert packed.metadata["version"] == "3"
    assert [block["window"] for block in packed.native_config()["blocks"]] == [21, 21, 21]


def test_without_a_window_it_is_a_model_of_version_1(tmp_path: Path) -> None:
    directory = save_random(changed(sliding_window=None), tmp_path / "model")
    every_stage.check_layers(directory)
    every_stage.check_engine(directory, tmp_path / "model.goss")
    packed = Packed.open(tmp_path / "model.goss")
    assert packed.metadata["version"] == "1" and packed.architecture.attention.window is None


@pytest.mark.parametrize("window", [1, 2, 89, 90, 91, 255, 256, 300, 500])
def test_windows_of_every_size_equal_transformers(window: int, tmp_path: Path) -> None:
    """Rows of 90 in the layers; 500 tokens, longer than a chunk of the engine's cache, in the engine."""
    directory = save_random(changed(sliding_window=window), tmp_path / "model")
    every_stage.check_layers(directory)
    pack_checkpoint(Checkpoint.open(directory), tmp_path / "model.goss")
    ids = torch.randint(0, 320, (500,), generator=torch.Generator().manual_seed(window))
    with torch.no_grad():
        expected_TV = every_stage.reference(directory)(ids[None]).logits[0].numpy()
    found_TV = LLM(tmp_path / "model.goss", 2, kv_cache_dtype="f32").logits(ids.tolist())
    assert np.abs(found_TV - expected_TV).max() < 1e-4 * np.abs(expected_TV).max()


def test_what_is_left_out_means_what_transformers_means_by_it() -> None:
    left_out = ("head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    left_out += ("sliding_window", "rope_parameters", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    settings = {key: value for key, value in CONFIG.to_dict().items() if key not in left_out}
    settings |= {"architectures": ["MistralForCausalLM"], "num_attention_heads": 16, "hidden_size": 128}
    anatomy, theirs = read_anatomy(settings), MistralConfig()
    assert anatomy.attention.num_kv_heads == theirs.num_key_value_heads
    assert anatomy.attention.head_dim == 8
    assert anatomy.attention.window == theirs.sliding_window
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    assert anatomy.tie_word_embeddings == theirs.tie_word_embeddings
    assert anatomy.attention.rope is not None and theirs.rope_parameters is not None
    assert anatomy.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (anatomy.bos_token_id, anatomy.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    many = read_anatomy(settings | {"num_key_value_heads": None})
    assert many.attention.num_kv_heads == 16


def test_what_is_not_supported_is_refused() -> None:
    settings = CONFIG.to_dict() | {"architectures": ["MistralForCausalLM"]}
    assert read_anatomy(settings).attention.window == 21
    for change in ({"hidden_act": "gelu"}, {"layer_types": ["sliding_attention"] * 3}):
        with pytest.raises(UnsupportedError, match=next(iter(change))):
            read_anatomy(settings | change)
    for window in (0, -1, 2.5, "21", True):
        with pytest.raises(CheckpointError, match="sliding_window"):
            read_anatomy(settings | {"sliding_window": window})


def test_both_backends_answer_prompts_of_several_lengths_alike(mistral: Path) -> None:
    """transformers gets them as one batch with padding on the left, past which the windows must reach."""
    prompts = [
        "Once upon a time",
        "a",
        "def f(x): return x",
        "One, two, three, four, five, six, seven.",
    ]
    torch_backend, engine = (open_backend(str(mistral), name, 2, "f32") for name in ("torch", "engine"))
    assert torch_backend.complete(prompts, "", 60) == engine.complete(prompts, "", 60)
