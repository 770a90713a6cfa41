"""Directories in, directories out: what is read is right, and what is written is whole or absent."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gossamer.architecture.families import read_anatomy
from gossamer.architecture.frequencies import Linear, inverse_frequencies
from gossamer.architecture.rope import Rope
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, ConfigError, UnsupportedError
from gossamer.job.options import option
from gossamer.modules.decoder import blocks, embed, write_block
from gossamer.training.whole_model import load_model
from llamas import VARIANTS, walk_through

Tiny = Callable[[str], Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Copy:
    """A stage that changes nothing."""

    model: str = option("")
    strength: float = option(0.5)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_by_layer_equals_transformers(tiny_llama: Tiny, tmp_path: Path, variant: str) -> None:
    source = Checkpoint.open(tiny_llama(variant))
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    ids_BT = torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(1))
    hidden_BTD = embed(source, ids_BT)
    with source.derive(tmp_path / "child", Copy(), stage="copy") as target:
        for block in blocks(source):
            walk_through(block, hidden_BTD)
            write_block(target, block)
        target.copy_rest()
    with torch.no_grad():
        expected = reference(ids_BT).logits
        torch.testing.assert_close(load_model(source)(ids_BT).logits, expected)
        found = reference.lm_head(reference.model.norm(hidden_BTD))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    child = Checkpoint.open(tmp_path / "child")
    assert all(np.array_equal(child.raw(name), source.raw(name)) for name in source.names)
    assert child.hash == source.hash or variant == "sharded"
    AutoModelForCausalLM.from_pretrained(child.path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_frequencies_equal_transformers(tiny_llama: Tiny, variant: str) -> None:
    source = Checkpoint.open(tiny_llama(variant))
    expected = AutoModelForCausalLM.from_pretrained(source.path).model.rotary_emb.inv_freq.numpy()
    heads = source.architecture.attention
    assert heads.rope is not None
    np.testing.assert_allclose(inverse_frequencies(heads.rope, heads.head_dim), expected, rtol=1e-6)


def test_old_style_rope_settings_are_read() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    rope = read_anatomy(config).attention.rope
    assert rope is not None
    assert rope == Rope(500000.0, Linear(4.0))
    with pytest.raises(CheckpointError, match="num_key_value_heads is '2'"):
        read_anatomy(config | {"num_key_value_heads": "2"})
    with pytest.raises(CheckpointError, match="rms_norm_eps"):
        read_anatomy(config | {"rms_norm_eps": "tiny"})
    with pytest.raises(UnsupportedError, match="hidden_act"):
        read_anatomy(config | {"hidden_act": "gelu"})


def test_manifest_records_stage_job_parent_and_lineage(tiny_llama: Tiny, tmp_path: Path) -> None:
    first = Checkpoint.open(tiny_llama("llama3"))
    for parent, name in ((first.path, "a"), (tmp_path / "a", "b")):
        with Checkpoint.open(parent).derive(tmp_path / name, Copy(strength=0.25), stage=name) as target:
            target.copy_rest()
    manifest = Checkpoint.open(tmp_path / "b").manifest
    assert manifest is not None
    assert manifest["job"] == {"model": "", "strength": 0.25}
    assert manifest["parent"]["hash"] == Checkpoint.open(tmp_path / "a").hash
    assert [entry["stage"] for entry in manifest["lineage"]] == ["a", "b"]
    assert manifest["lineage"][0]["parent"] == first.hash
    assert manifest["tensors"][Q_PROJ]["sparsity"] == 0.0


def test_lost_zeros_are_refused_and_nothing_is_left(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    with source.derive(tmp_path / "sparse", Copy(), stage="zero") as target:
        sparse = source.raw(Q_PROJ).copy()
        sparse[:, ::2] = -0.0
        target.write(Q_PROJ, sparse, "F32")
        target.copy_rest()
    parent = Checkpoint.open(tmp_path / "sparse")
    assert parent.zeros(Q_PROJ).mean() == 0.5
    assert target.sparsity == parent.sparsity() > 0
    with (
        pytest.raises(CheckpointError, match=r"q_proj\.weight lost 1152"),
        parent.derive(tmp_path / "dense", Copy(), stage="fill") as target,
    ):
        target.write(Q_PROJ, source.raw(Q_PROJ), "F32")
        target.copy_rest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sparse"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_stage_leaves_nothing(
    tiny_llama: Tiny, tmp_path: Path, error: type[BaseException]
) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    with pytest.raises(error), source.derive(tmp_path / "out", Copy(), stage="copy") as target:
        target.copy_rest()
        raise error
    assert not list(tmp_path.iterdir())


def test_a_failing_copy_leaves_nothing(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("shutil.copyfile", fail)
    with (
        pytest.raises(OSError, match="No space"),
        Checkpoint.open(tiny_llama("llama2")).derive(tmp_path / "out", Copy(), stage="x"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_the_same_directory(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    with source.derive(tmp_path / "out", Copy(), stage="copy") as target:
        with (
            pytest.raises(ConfigError, match=r"out\.partial is being written by another process"),
            source.derive(tmp_path / "out", Copy(), stage="copy"),
        ):
            pass
        target.copy_rest()
    assert Checkpoint.open(tmp_path / "out").hash == source.hash
    with source.derive(tmp_path / "out", Copy(), stage="copy", overwrite=True) as target:
        target.copy_rest()


def test_a_forgotten_tensor_is_refused(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    with (
        pytest.raises(CheckpointError, match="missing"),
        source.derive(tmp_path / "out", Copy(), stage="x") as target,
    ):
        target.write(Q_PROJ, source.raw(Q_PROJ), "F32")
    assert not list(tmp_path.iterdir())


def test_overwrite_replaces_whole_and_never_the_input(tiny_llama: Tiny, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama("llama2"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").write_text("old")
    with pytest.raises(ConfigError, match="--overwrite"), source.derive(tmp_path / "out", Copy(), stage="x"):
        pass
    with source.derive(tmp_path / "out", Copy(), stage="x", overwrite=True) as target:
        target.copy_rest()
    assert not (tmp_path / "out" / "stale.txt").exists()
    with (
        pytest.raises(ConfigError, match="input"),
        source.derive(source.path, Copy(), stage="x", overwrite=True),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_large_models_are_written_in_shards(
    tiny_llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.checkpoint.directory.SHARD_BYTES", 100_000)
    source = Checkpoint.open(tiny_llama("llama2"))
    with source.derive(tmp_path / "out", Copy(), stage="copy") as target:
        target.copy_rest()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert Checkpoint.open(tmp_path / "out").hash == source.hash
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
