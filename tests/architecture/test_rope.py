"""Every kind of rope against transformers: frequencies, scale, and what a configuration means."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from gossamer.architecture.frequencies import inverse_frequencies, rotary_scale
from gossamer.engine import LLM
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError
from llamas import save_random

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta outside": {"rope_theta": 3e4},
    "theta inside and outside": {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 3e4},
    "old and new": {
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "rope_parameters": {"rope_type": "linear", "factor": 5.0, "rope_theta": 5e5},
    },
    "type and rope_type": {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 3.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 3e4},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.5}, "rope_theta": 3e4},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
    "llama3, length left out": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "llama3, length outside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 96},
    "yarn": {"rope_parameters": YARN},
    "yarn, lengths inside and outside": {"rope_parameters": YARN, "original_max_position_embeddings": 96},
    "yarn, length left out": {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1e6},
    "yarn, attention_factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "yarn, nulls": {"rope_parameters": YARN | {"attention_factor": None, "beta_fast": None, "mscale": None}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    "yarn, mscale alone": {"rope_parameters": YARN | {"mscale": 2.0}},
    "yarn, mscale 0": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0}},
    "yarn, not truncated": {"rope_parameters": YARN | {"truncate": False}},
    "yarn, betas": {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 3, "truncate": False}},
    "yarn, no ramp": {"rope_parameters": YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False}},
    "yarn, small original": {"rope_parameters": YARN | {"original_max_position_embeddings": 4}},
    "yarn, factor 1": {"rope_parameters": YARN | {"factor": 1.0}},
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_scale_equal_transformers(name: str) -> None:
    heads = read_anatomy(SIZES | ROPES[name]).attention
    assert heads.rope is not None
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(SIZES | ROPES[name]))
    found = inverse_frequencies(heads.rope, heads.head_dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=2e-6)
    assert rotary_scale(heads.rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "longrope": (
        {"rope_scaling": {"type": "longrope"}},
        UnsupportedError,
        "'longrope'; supported: default, ",
    ),
    "su": ({"rope_scaling": {"type": "su"}}, UnsupportedError, "linear, llama3, yarn, dynamic"),
    "a list": ({"rope_scaling": {"type": ["yarn"]}}, UnsupportedError, "rope_type"),
    "no factor": ({"rope_scaling": {"type": "yarn"}}, CheckpointError, "factor is None"),
    "factor 0": ({"rope_scaling": {"type": "dynamic", "factor": 0}}, CheckpointError, "factor is 0"),
    "scale below 0": ({"rope_parameters": YARN | {"attention_factor": -1.0}}, CheckpointError, "attention_"),
    "base 1": ({"rope_parameters": YARN | {"rope_theta": 1.0}}, CheckpointError, "rope_theta is 1"),
    "half of a head": ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor = 0.5"),
    "half, inside": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary"),
    "by kind of layer": ({"rope_parameters": {"full_attention": YARN}}, UnsupportedError, "full_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name: str) -> None:
    change, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        read_anatomy(SIZES | change)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_extreme_numbers_make_numbers_or_are_refused(kind: str) -> None:
    """A file from anywhere raises no other error; the engine refuses frequencies that are not finite."""
    names = ("factor", "rope_theta", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor")
    names += ("mscale", "mscale_all_dim", "attention_factor")
    made, rng = 0, np.random.default_rng(0)
    for _ in range(300):
        numbers = {name: rng.choice([5e-324, 1e-30, 1e-7, 1.0, 1.0000000000000002, 9e29]) for name in names}
        rope: dict[str, Any] = {name: float(number) for name, number in numbers.items()}
        rope |= {"rope_type": kind, "original_max_position_embeddings": int(rng.choice([1, 4096, 2**31 - 1]))}
        try:
            heads = read_anatomy(SIZES | {"rope_scaling": rope}).attention
        except CheckpointError:
            continue
        assert heads.rope is not None
        with np.errstate(all="ignore"):
            assert inverse_frequencies(heads.rope, heads.head_dim).shape == (10,)
        assert np.isfinite(rotary_scale(heads.rope))
        made += 1
    assert made > 5


def save(name: str, path: Path) -> Path:
    return save_random(LlamaConfig.from_dict(SIZES | ROPES[name]), path)


def test_yarn_through_every_stage(text_file: Path, tmp_path: Path) -> None:
    model = save("yarn, attention_factor", tmp_path / "model")
    every_stage.check_layers(model)
    every_stage.check_engine(model, tmp_path / "dense.goss")
    packed = every_stage.check_stages(model, text_file, tmp_path)
    assert packed.metadata["version"] == "1"


def test_dynamic_equals_transformers_to_the_end_of_the_context(tmp_path: Path) -> None:
    """Beyond it transformers changes what earlier keys would have been; the engine ends there."""
    model = save("dynamic", tmp_path / "model")
    every_stage.check_layers(model)
    every_stage.check_engine(model, tmp_path / "dense.goss")
    llm = LLM(tmp_path / "dense.goss", 1, kv_cache_dtype="f32")
    ids = np.random.default_rng(0).integers(2, 320, 512).tolist()
    with torch.no_grad():
        expected_TV = every_stage.reference(model)(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(llm.logits(ids) - expected_TV).max() < 1e-4 * np.abs(expected_TV).max()
    with pytest.raises(ConfigError, match="1 to 512"):
        llm.logits([*ids, 2])
