"""Phi-3 through every stage and the engine: q, k and v are stored as one matrix, gate and up as another."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config

from architecture import every_stage
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError
from gossamer.modules.unfused import join, part
from gossamer.stages.quantize import Quantize, quantize
from gossamer.training.masks import model_mask_hash
from gossamer.training.whole_model import load_model
from llamas import save_random

CONFIG = Phi3Config(
    vocab_size=320,
    hidden_size=60,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=512,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=1,
)
SETTINGS = CONFIG.to_dict() | {"architectures": ["Phi3ForCausalLM"]}
QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(CONFIG, tmp_path_factory.mktemp("phi3") / "model")


def test_layers_equal_transformers(phi3: Path) -> None:
    every_stage.check_layers(phi3)


def test_smoothing_changes_no_layer(phi3: Path) -> None:
    every_stage.check_smoothing(phi3)


def test_the_engine_equals_transformers(phi3: Path, tmp_path: Path) -> None:
    every_stage.check_engine(phi3, tmp_path / "model.goss")


def test_a_window_equals_transformers(tmp_path: Path) -> None:
    directory = save_random(Phi3Config(**{**CONFIG.to_dict(), "sliding_window": 23}), tmp_path / "model")
    assert Checkpoint.open(directory).architecture.attention.window == 23
    every_stage.check_layers(directory)
    every_stage.check_engine(directory, tmp_path / "model.goss")


def test_a_window_that_holds_the_whole_context_is_none() -> None:
    for window, expected in ((511, 511), (512, None), (513, None), (None, None)):
        assert read_anatomy(SETTINGS | {"sliding_window": window}).attention.window == expected


def test_every_stage(phi3: Path, text_file: Path, tmp_path: Path) -> None:
    packed = every_stage.check_stages(phi3, text_file, tmp_path)
    assert packed.metadata["version"] == "1"
    stored = load_file(phi3 / "model.safetensors").keys()
    for name in ("50", "trained", "tuned"):
        assert load_file(tmp_path / name / "model.safetensors").keys() == stored
    quantized = load_file(tmp_path / "int8" / "model.safetensors")
    assert quantized[QKV].dtype == torch.int8 and quantized[f"{QKV}_scale"].shape == (120, 1)


def test_parts_are_the_rows_of_what_is_stored(phi3: Path) -> None:
    source, stored = Checkpoint.open(phi3), load_file(phi3 / "model.safetensors")
    q, k, v = (source.raw(QKV.replace("qkv", role)) for role in "qkv")
    assert (q.shape, k.shape, v.shape) == ((60, 60), (30, 60), (30, 60))
    np.testing.assert_array_equal(np.concatenate([q, k, v]), stored[QKV].numpy())
    gate, up = (source.raw(GATE_UP.replace("gate_up", role)) for role in ("gate", "up"))
    np.testing.assert_array_equal(np.concatenate([gate, up]), stored[GATE_UP].numpy())
    assert not {QKV, GATE_UP} & {*source.names}


def test_a_model_and_its_directory_have_one_mask_hash(phi3: Path) -> None:
    source = Checkpoint.open(phi3)
    assert model_mask_hash(load_model(source)) == model_mask_hash(source)


def test_weights_of_a_training_checkpoint_are_those_of_a_directory(phi3: Path) -> None:
    """Under the names that files have for them, and back."""
    model, stored = load_model(Checkpoint.open(phi3)), load_file(phi3 / "model.safetensors")
    joined = join(model, model.state_dict())
    assert joined.keys() == stored.keys()
    assert all(torch.equal(joined[name], weight) for name, weight in stored.items())
    again, state = part(model, joined), model.state_dict()
    assert again.keys() == state.keys() and QKV not in again
    assert all(torch.equal(again[name], weight) for name, weight in state.items())


@torch.no_grad()
def test_a_copy_of_a_model_has_its_own_linears(phi3: Path) -> None:
    model, ids_BT = load_model(Checkpoint.open(phi3)), every_stage.some_ids()
    before_BTV, copied = model(ids_BT).logits, copy.deepcopy(model)
    copied.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()
    assert torch.equal(model(ids_BT).logits, before_BTV)
    assert not torch.allclose(copied(ids_BT).logits, before_BTV)


def test_a_whole_stored_matrix_is_left_out_or_none_of_it(phi3: Path, text_file: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"num_calibration_samples": 4, "max_seq_length": 32}
    job = Quantize(
        str(phi3), str(tmp_path / "int8"), dataset=(str(text_file),), ignore=("*.1.*.k_proj",), **few
    )
    with pytest.raises(ConfigError, match=r"k_proj is stored in .*qkv_proj with .*q_proj, .*v_proj"):
        quantize(job)
    assert not (tmp_path / "int8").exists()
    all_of_it = ("*.1.self_attn.[qkv]_proj", "*.0.mlp.down_proj")
    quantize(Quantize(str(phi3), str(tmp_path / "int8"), dataset=(str(text_file),), ignore=all_of_it, **few))
    config = Checkpoint.open(tmp_path / "int8").config["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj", QKV.removesuffix(".weight")]
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert stored[QKV].dtype == torch.float32 and stored[GATE_UP].dtype == torch.int8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[2, 3, 4]])).logits).all()


@pytest.mark.parametrize("damage", ["missing", "rows", "columns"])
def test_a_stored_matrix_that_is_not_right_is_named(phi3: Path, tmp_path: Path, damage: str) -> None:
    tensors = load_file(phi3 / "model.safetensors")
    whole = tensors.pop(QKV)
    if damage != "missing":
        tensors[QKV] = (whole[:-1] if damage == "rows" else whole[:, :-1]).clone()
    (tmp_path / "config.json").write_text((phi3 / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=QKV if damage != "columns" else r"q_proj.*\[60, 59\]"):
        Checkpoint.open(tmp_path)


def test_what_is_left_out_means_what_transformers_means_by_it() -> None:
    sizes = ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    anatomy = read_anatomy({key: SETTINGS[key] for key in sizes} | {"vocab_size": 32064})
    theirs = Phi3Config()
    assert anatomy.attention.num_kv_heads == SETTINGS["num_attention_heads"]
    assert anatomy.max_position_embeddings == theirs.max_position_embeddings
    assert anatomy.norm_eps == theirs.rms_norm_eps
    assert anatomy.tie_word_embeddings == theirs.tie_word_embeddings
    assert anatomy.attention.window is theirs.sliding_window
    assert (anatomy.bos_token_id, anatomy.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'longrope'"),
        ({"rope_scaling": {"type": "su"}}, "'su'; supported: 'default'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'; supported: 'default'"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    assert read_anatomy(SETTINGS).attention.num_kv_heads == 3
    with pytest.raises(UnsupportedError, match=message):
        read_anatomy(SETTINGS | change)
