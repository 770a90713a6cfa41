"""`inspect` tells what is there; `verify` passes sound models and names what is wrong with others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gossamer import cli
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, EngineError, FormatError
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def half_pruned(source: Path, output: Path) -> Path:
    """A derived directory, gossamer.json included, with every other weight of each linear 0."""
    parent = Checkpoint.open(source)
    with parent.derive(output, Inspect(str(source)), stage="prune") as target:
        for name in parent.linears:
            w_NK = parent.raw(f"{name}.weight").copy()
            w_NK[:, ::2] = 0
            target.write(f"{name}.weight", w_NK, parent.dtype(f"{name}.weight"))
        target.copy_rest()
    return output


def test_inspect_a_directory(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    directory = half_pruned(tiny_llama("bf16"), tmp_path / "half")
    result = inspect(Inspect(str(directory)))
    assert result.sparsity == pytest.approx(0.5) and result.bits_per_weight == 16
    assert [step.stage for step in result.provenance] == ["prune"]
    assert result.provenance[0].parent == Checkpoint.open(tiny_llama("bf16")).hash
    assert {matrix.values for matrix in result.matrices} == {"bf16"} and len(result.matrices) == 16
    assert result.num_parameters == sum(tensor.size for tensor in load_file_bits(directory).values())
    text = "\n".join(cli.markdown(table) for table in result.tables())
    assert "layers.1" in text and "50.0%" in text and "step 1: prune" in text
    json.dumps(asdict(result))


def load_file_bits(directory: Path) -> dict[str, np.ndarray]:
    source = Checkpoint.open(directory)
    return {name: source.raw(name) for name in source.names}


def test_inspect_a_packed_file(synthetic, tmp_path: Path) -> None:
    packed, result = Packed.open(synthetic.path), inspect(Inspect(str(synthetic.path)))
    assert result.num_bytes == synthetic.path.stat().st_size
    assert result.sparsity == pytest.approx(packed.sparsity(packed.decoder))
    assert result.bits_per_weight == pytest.approx(packed.bits_per_weight(packed.decoder))
    assert {(m.storage, m.values) for m in result.matrices} == {
        (storage, values) for storage in ("dense", "sparse") for values in ("f32", "bf16", "i8", "i4")
    }
    assert result.provenance[0].parent == "ab" * 32


def test_inspect_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(FormatError):
        inspect(Inspect(str(tmp_path / "file")))
    with pytest.raises(CheckpointError):
        inspect(Inspect(str(tmp_path)))


@pytest.mark.parametrize("variant", ["llama2", "llama3", "bf16"])
def test_sound_models_pass(variant: str, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    dense = tiny_llama(variant)
    child = half_pruned(dense, tmp_path / "half")
    names = [check.name for check in verify(Verify(str(child), str(dense))).checks]
    expected = [
        "tensors",
        "no sparsity_config",
        "masks",
        "zeros kept",
        "backends agree",
        "transformers agrees",
    ]
    assert names == expected
    pack(Pack(str(child), str(tmp_path / "model.goss")))
    result = verify(Verify(str(tmp_path / "model.goss"), str(child)))
    assert not any(check.skipped for check in result.checks)
    assert [check.name for check in result.checks][2:] == ["tensors", "zeros kept", "backends agree"]
    against_dense = verify(Verify(str(tmp_path / "model.goss"), str(dense), skip_engine=True))
    assert [check.skipped for check in against_dense.checks] == [False, False, True, False]


def test_int8_with_rounded_head_passes(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    pack(Pack(str(tiny_llama("llama3")), str(tmp_path / "model.goss"), head="i8"))
    verify(Verify(str(tmp_path / "model.goss"), str(tiny_llama("llama3"))))


def test_a_lost_zero_is_found(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    dense = tiny_llama("llama2")
    child = half_pruned(dense, tmp_path / "half")
    with pytest.raises(CheckpointError, match=r"lost \d+ of the zeros"):
        verify(Verify(str(dense), str(child)))
    pack(Pack(str(dense), str(tmp_path / "dense.goss")))
    with pytest.raises(FormatError, match=r"q_proj lost \d+ of the zeros"):
        verify(Verify(str(tmp_path / "dense.goss"), str(child)))


def test_another_shape_is_no_parent(tiny_llama: Callable[[str], Path], synthetic) -> None:
    with pytest.raises(FormatError, match=r"q_proj is \(30, 36\); in .* it is \(48, 48\)"):
        verify(Verify(str(synthetic.path), str(tiny_llama("llama2")), skip_engine=True))


def test_another_model_is_no_parent(tiny_llama: Callable[[str], Path], synthetic, shared_data: Path) -> None:
    for model in (tiny_llama("llama2"), synthetic.path):
        with pytest.raises((CheckpointError, FormatError), match=r"has 14 linears; .* 42, is no parent"):
            verify(Verify(str(model), str(shared_data / "models" / "stories3m"), skip_engine=True))


def test_changed_weights_are_found(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    child = half_pruned(tiny_llama("llama2"), tmp_path / "half")
    tensors = load_file(child / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1
    save_file(tensors, child / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight have the hash"):
        verify(Verify(str(child)))


def test_sparsity_config_is_found(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama("llama2"), tmp_path / "announced")
    config = json.loads((tmp_path / "announced" / "config.json").read_text())
    (tmp_path / "announced" / "config.json").write_text(json.dumps(config | {"sparsity_config": {}}))
    with pytest.raises(CheckpointError, match="sparsity_config"):
        verify(Verify(str(tmp_path / "announced")))


def test_damaged_file_is_found(synthetic, tmp_path: Path) -> None:
    content, packed = bytearray(synthetic.path.read_bytes()), Packed.open(synthetic.path)
    stored = packed.tensors["model.layers.0.mlp.up_proj.weight_sum"]
    content[stored.offset] ^= 1
    (tmp_path / "sum.goss").write_bytes(content)
    with pytest.raises(FormatError, match="up_proj: the row sums"):
        verify(Verify(str(tmp_path / "sum.goss"), skip_engine=True))


def test_another_engine_is_found(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference with another RoPE base must not agree: the check can fail."""
    pack(Pack(str(tiny_llama("llama2")), str(tmp_path / "model.goss")))
    original = Packed.open.__func__

    def other_base(cls: type[Packed], path: Path) -> Packed:
        packed = original(cls, path)
        packed.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0}
        return packed

    monkeypatch.setattr("gossamer.tools.verify.Packed.open", classmethod(other_base))
    with pytest.raises(EngineError, match="off torch's"):
        verify(Verify(str(tmp_path / "model.goss")))
