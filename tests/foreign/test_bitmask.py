"""Sparse checkpoints whose weights are stored as masks and values are written out again, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from gossamer import cli
from gossamer.errors import GossamerError
from gossamer.stages.import_model import Import, import_model
from gossamer.tools.verify import Verify, verify
from llamas import save_random

CONFIG = LlamaConfig(  # of widths that do not fill the last byte of a row's mask
    vocab_size=320,
    hidden_size=44,
    intermediate_size=102,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=10,
    bos_token_id=0,
    eos_token_id=1,
)
COMPRESSION = {"format": "dense", "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def sparse(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of which half of the decoder's weights are zero, and all of one matrix."""
    path = save_random(CONFIG, tmp_path / "sparse", request.param)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if "_proj" in name:
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def compress(source: Path, path: Path, key: str = "quantization_config") -> Path:
    """The directory as compressed-tensors 0.10 wrote it."""
    path.mkdir()
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        kept, module = weight != 0, name.removesuffix(".weight")
        counts = kept.sum(1)
        packed = np.packbits(kept.numpy(), axis=1, bitorder="little")
        tensors |= {
            f"{module}.shape": torch.tensor(weight.shape),
            f"{module}.bitmask": torch.from_numpy(packed),
            f"{module}.compressed": weight[kept],
            f"{module}.row_offsets": counts.cumsum(0) - counts,
        }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: COMPRESSION}))
    return path


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_directory_comes_back(key: str, sparse: Path, tmp_path: Path) -> None:
    expected = load_file(sparse / "model.safetensors")
    dtype: Any = "bf16" if expected["model.norm.weight"].dtype == torch.bfloat16 else "f32"
    import_model(Import(str(compress(sparse, tmp_path / "small", key)), str(tmp_path / "out"), dtype=dtype))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, weight in found.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name])
    assert "config" not in str(json.loads((tmp_path / "out" / "config.json").read_text()).keys())
    verify(Verify(str(tmp_path / "out"), parent=str(sparse)))
    ids = torch.arange(60).reshape(1, 60)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (sparse, tmp_path / "out")]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


MODULE = "model.layers.0.self_attn.q_proj"


def flip_a_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.bitmask"][3, 0] ^= 1


def move_a_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.row_offsets"][2] += 1


def drop_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.compressed"] = tensors[f"{MODULE}.compressed"][:-1].clone()


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.shape"] = torch.tensor([40, 60])


def endless(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.shape"] = torch.tensor([1 << 40, 1 << 40])


def negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.shape"] = torch.tensor([-40, 44])


def drop_offsets(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{MODULE}.row_offsets"]


def drop_another(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def as_integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.compressed"] = tensors[f"{MODULE}.compressed"].to(torch.int8)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.compressed"][5] = float("nan")


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a bit of a mask": (flip_a_bit, "masks of .*q_proj have"),
    "an offset": (move_a_row, "begin elsewhere"),
    "a weight too few": (drop_a_weight, "compressed weights"),
    "another width": (narrow, "do not fit its shape"),
    "sizes beyond the file": (endless, "do not fit its shape"),
    "negative sizes": (negative, "sizes of a matrix"),
    "a part missing": (drop_offsets, "row_offsets is missing"),
    "a tensor missing": (drop_another, r"model\.norm\.weight is missing"),
    "integers": (as_integers, "compressed is I8"),
    "no number": (not_a_number, "holds NaN"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("sparse", [torch.float32], indirect=True, ids=["f32"])
def test_what_does_not_fit_together_is_refused(name: str, sparse: Path, tmp_path: Path, capsys: Any) -> None:
    change, words = DAMAGE[name]
    small = compress(sparse, tmp_path / "small")
    tensors = load_file(small / "model.safetensors")
    change(tensors)
    save_file(tensors, small / "model.safetensors", {"format": "pt"})
    with pytest.raises(GossamerError, match=words):
        import_model(Import(str(small), str(tmp_path / "out")))
    assert cli.call(["import", str(small), "-o", str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "sparse"]


@pytest.mark.parametrize("sparse", [torch.float32], indirect=True, ids=["f32"])
def test_quantized_and_plain_directories_are_named(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(GossamerError, match="need no import"):
        import_model(Import(str(sparse), str(tmp_path / "out")))
    small = compress(sparse, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {}}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(GossamerError, match="a quantized model"):
        import_model(Import(str(small), str(tmp_path / "out")))
