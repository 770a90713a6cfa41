"""Checkpoints of every kind become one file that decodes to their tensors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gossamer import _native
from gossamer.architecture.anatomy import EMBEDDING
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine.model import OpenModel
from gossamer.errors import CheckpointError, ConfigError, FormatError, UnsupportedError
from gossamer.job.report import Event
from gossamer.packed.cache import cached_pack
from gossamer.packed.from_checkpoint import expands_int8_fast
from gossamer.packed.reader import Packed
from gossamer.stages.pack import Pack, pack
from gossamer.tokens.tokenizer import Tokenizer

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def prune_by_hand(source: Path, output: Path, sparsity: float = 0.7, together: int = 1) -> Path:
    """Copy a one-file float32 directory with zeros in its linears, `together` neighbours at a time."""
    shutil.copytree(source, output)
    tensors, rng = load_file(output / "model.safetensors"), np.random.default_rng(1)
    for name in Checkpoint.open(source).linears:
        rows, columns = tensors[f"{name}.weight"].shape
        zero = rng.random((rows, -(-columns // together))) < sparsity
        tensors[f"{name}.weight"][zero.repeat(together, axis=1)[:, :columns]] = 0
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return output


def quantize_by_hand(source: Path, output: Path, ignore: tuple[str, ...] = (), config: Any = W8A8) -> Path:
    """Copy a one-file float32 directory with its decoder linears rounded to int8, zeros kept."""
    shutil.copytree(source, output)
    tensors = load_file(output / "model.safetensors")
    for name in Checkpoint.open(source).linears:
        if name not in ignore:
            w_NK = tensors[f"{name}.weight"]
            scale_N1 = np.maximum(np.abs(w_NK).max(axis=1, keepdims=True), 1e-6) / np.float32(127)
            tensors[f"{name}.weight"] = np.rint(w_NK / scale_N1).astype(np.int8)
            tensors[f"{name}.weight_scale"] = scale_N1
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    text = json.loads((output / "config.json").read_text()) | {"quantization_config": config}
    (output / "config.json").write_text(json.dumps(text))
    return output


@pytest.fixture(scope="session")
def quantized(tiny_llama: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama2 at 70% zeros in int8, except the last down_proj."""
    directory = tmp_path_factory.mktemp("quantized")
    pruned = prune_by_hand(tiny_llama("llama2"), directory / "pruned")
    return quantize_by_hand(pruned, directory / "int8", ("model.layers.1.mlp.down_proj",))


def packed_from(source: Path, output: Path, **options: Any) -> Packed:
    pack(Pack(str(source), str(output), **options))
    return Packed.open(output)


@pytest.mark.parametrize("variant", ["llama2", "llama3", "linear", "sharded", "bf16", "fp16"])
def test_dense_directories(variant: str, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama(variant))
    packed = packed_from(source.path, tmp_path / "model.goss")
    for name in packed.matrices:
        assert packed.matrices[name].values == ("bf16" if variant == "bf16" else "f32")
        assert packed.matrices[name].storage == "dense"
        assert np.array_equal(packed.linear(name), source.float32(f"{name}.weight"))
    for name, shape in source.architecture.tensor_shapes.items():
        if len(shape) == 1:
            assert np.array_equal(packed.vector(name), source.float32(name))
    tied = source.architecture.tie_word_embeddings
    assert packed.head == (EMBEDDING if tied else "lm_head") and tied == (variant == "llama3")
    assert packed.architecture == source.architecture and packed.metadata["parent"] == source.hash
    text = (source.path / "tokenizer.json").read_bytes()
    assert packed.tokenizer_json is not None and len(packed.tokenizer_json) < len(text)
    assert json.loads(packed.tokenizer_json) == json.loads(text)
    assert packed.tokenizer_config == json.loads((source.path / "tokenizer_config.json").read_text())


def test_pruned_directory_keeps_its_zeros(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    source = Checkpoint.open(prune_by_hand(tiny_llama("llama2"), tmp_path / "pruned"))
    result = pack(Pack(str(source.path), str(tmp_path / "model.goss")))
    packed = Packed.open(tmp_path / "model.goss")
    assert result.sparsity == pytest.approx(source.sparsity()) and 0.65 < result.sparsity < 0.75
    assert {packed.matrices[name].storage for name in packed.decoder} == {"sparse"}
    assert packed.matrices["lm_head"].storage == packed.matrices[EMBEDDING].storage == "dense"
    assert ("q_proj", "sparse", "f32", 2) in [tuple(asdict(group).values())[:4] for group in result.stored]
    for name in packed.decoder:
        assert np.array_equal(packed.linear(name), source.float32(f"{name}.weight"))


def test_quantized_directory(quantized: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(quantized)
    events: list[Event] = []
    result = pack(Pack(str(quantized), str(tmp_path / "model.goss"), storage="smallest"), events.append)
    packed = Packed.open(tmp_path / "model.goss")
    for name in packed.decoder:
        matrix = packed.matrices[name]
        if name == "model.layers.1.mlp.down_proj":
            assert (matrix.storage, matrix.values) == ("sparse", "f32")
            assert np.array_equal(packed.linear(name), source.float32(f"{name}.weight"))
        else:
            assert (matrix.storage, matrix.values) == ("sparse", "i8")
            assert np.array_equal(packed.stored(name), source.raw(f"{name}.weight"))
            assert np.array_equal(packed.scale(name), source.float32(f"{name}.weight_scale")[:, 0])
    assert {event.message for event in events} == set(packed.matrices)
    assert all(event.metrics["storage"] == packed.matrices[event.message].storage for event in events)
    assert result.head == "i8" and "stored" in asdict(result)


def test_rounded_head_and_its_reported_error(quantized: Path, tmp_path: Path) -> None:
    result = pack(Pack(str(quantized), str(tmp_path / "model.goss")))
    w_VD, rounded_VD = (
        Checkpoint.open(quantized).float32("lm_head.weight"),
        Packed.open(tmp_path / "model.goss").linear("lm_head"),
    )
    step_V = np.abs(w_VD).max(axis=1) / 127
    assert (np.abs(w_VD - rounded_VD) <= 0.5001 * step_V[:, None]).all()
    [head] = result.rounded
    off_VD, sizes_V = w_VD - rounded_VD, np.linalg.norm(w_VD, axis=1)
    assert head.error == pytest.approx(np.linalg.norm(off_VD) / np.linalg.norm(w_VD), rel=1e-5)
    errors_V = np.linalg.norm(off_VD, axis=1) / sizes_V
    assert head.worst_row_error == pytest.approx(errors_V.max(), rel=1e-5)
    assert (head.part, head.values, head.worst) == ("head", "i8", f"lm_head, row {errors_V.argmax()}")
    assert any("The head: weights moved by" in line for line in result.closing)
    smallest = pack(Pack(str(quantized), str(tmp_path / "smallest.goss"), storage="smallest"))
    assert result.dense_for_speed == (not expands_int8_fast()) and not smallest.dense_for_speed
    assert any("--storage smallest" in line for line in result.closing) == result.dense_for_speed
    assert smallest.num_bytes < result.num_bytes or not result.dense_for_speed


@pytest.mark.parametrize(
    ("variant", "head", "expected"),
    [
        ("llama2", "auto", "f32"),
        ("llama2", "i8", "i8"),
        ("llama3", "auto", "f32 (the embedding)"),
        ("llama3", "i8", "i8 (the embedding)"),
    ],
)
def test_head_of_float_models(
    variant: str,
    head: Literal["auto", "i8"],
    expected: str,
    tiny_llama: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    result = pack(Pack(str(tiny_llama(variant)), str(tmp_path / "model.goss"), head=head))
    assert result.head == expected and (not result.rounded) == (head == "auto")


def test_head_of_quantized_models(quantized: Path, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    assert packed_from(quantized, tmp_path / "kept.goss", head="keep").matrices["lm_head"].values == "f32"
    tied = quantize_by_hand(tiny_llama("llama3"), tmp_path / "tied")
    packed = packed_from(tied, tmp_path / "tied.goss")
    assert packed.head == EMBEDDING and packed.matrices[EMBEDDING].values == "i8"
    assert packed.metadata["version"] == "4"
    kept = packed_from(tied, tmp_path / "kept-tied.goss", head="keep")
    assert kept.head == EMBEDDING and kept.matrices[EMBEDDING].values == "f32"
    assert kept.metadata["version"] == "1"


@pytest.mark.parametrize(
    ("options", "embedding", "head", "version"),
    [
        ({"embedding": "keep"}, "f32", "i8", "1"),  # two tables, as older programs read them
        ({"embedding": "i4"}, "i4", "i4", "4"),
        ({"embedding": "i4", "head": "i8"}, "i4", "i8", "4"),
        ({"embedding": "i8", "head": "keep"}, "i8", "f32", "4"),
        ({"head": "i4"}, "i4", "i4", "4"),
    ],
)
def test_tied_tables_of_chosen_types(
    options: Any, embedding: str, head: str, version: str, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """What is tied and of one type is stored once."""
    tied = quantize_by_hand(tiny_llama("llama3"), tmp_path / "tied")
    packed = packed_from(tied, tmp_path / "tied.goss", **options)
    assert packed.matrices[EMBEDDING].values == embedding and packed.matrices[packed.head].values == head
    assert (packed.head == EMBEDDING) == (embedding == head) and packed.metadata["version"] == version
    w_VD, step = Checkpoint.open(tied).float32(f"{EMBEDDING}.weight"), {"f32": 0, "i8": 0.013, "i4": 0.2}
    for name, values in ((EMBEDDING, embedding), (packed.head, head)):
        error = np.linalg.norm(packed.linear(name) - w_VD) / np.linalg.norm(w_VD)
        assert error <= step[values] and (error > 0) == (values != "f32")


def test_an_untied_embedding_is_rounded_where_asked(quantized: Path, tmp_path: Path) -> None:
    kept = packed_from(quantized, tmp_path / "kept.goss")
    assert kept.matrices[EMBEDDING].values == "f32" and kept.metadata["version"] == "1"
    packed = packed_from(quantized, tmp_path / "i8.goss", embedding="i8")
    assert packed.matrices[EMBEDDING].values == "i8" and packed.head == "lm_head"
    assert packed.file_bytes < kept.file_bytes


def test_linears_in_int4(quantized: Path, tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a float directory and of one in int8: zeros stay, and weights move little."""
    pruned = prune_by_hand(tiny_llama("llama2"), tmp_path / "pruned")
    for directory in (pruned, quantized):
        source, packed = (
            Checkpoint.open(directory),
            packed_from(directory, tmp_path / f"{directory.name}.goss", linears="i4"),
        )
        assert {packed.matrices[name].values for name in packed.decoder} == {"i4"}
        assert packed.matrices["lm_head"].values == "i8"
        for name in packed.decoder:
            w_NK = source.float32(f"{name}.weight")
            if source.dtype(f"{name}.weight") == "I8":
                w_NK *= source.float32(f"{name}.weight_scale")
            found_NK = packed.linear(name)
            assert not found_NK[w_NK == 0].any()
            assert np.linalg.norm(found_NK - w_NK) <= 0.16 * np.linalg.norm(w_NK)


def test_the_bytes_of_all_parts_are_those_of_the_file(quantized: Path, tmp_path: Path) -> None:
    result = pack(Pack(str(quantized), str(tmp_path / "model.goss")))
    packed = Packed.open(tmp_path / "model.goss")
    assert sum(result.parts.values()) == result.num_bytes == packed.file_bytes
    assert result.parts["head"] == packed.matrix_bytes("lm_head")
    assert result.parts["tokenizer"] == packed.tensors["tokenizer.json"].nbytes
    assert "linears" in [row[0] for row in result.tables()[1].rows]


def test_a_packed_tokenizer_gives_the_same_ids(
    tiny_llama: Callable[[str], Path], shared_data: Path, tmp_path: Path
) -> None:
    """Minified, and deflated too beside an embedding of integers."""
    text = (shared_data / "text" / "c4.txt").read_bytes()[:20_000].decode(errors="ignore")
    text += "naïve \u2028 \U0001f600 \t\n <|endoftext|>"
    for directory in (tiny_llama("llama3"), shared_data / "models" / "stories3m"):
        expected = Tokenizer.open(directory).encode(text)
        for embedding in ("keep", "i8"):
            packed_from(directory, tmp_path / "model.goss", embedding=embedding, overwrite=True)
            assert OpenModel.open(tmp_path / "model.goss", 1).tokenizer.encode(text) == expected


def changed(**changes: Any) -> dict[str, Any]:
    """W8A8 with settings of its weights or inputs changed (`weights__num_bits=4`), or of the whole."""
    config = json.loads(json.dumps(W8A8))
    for key, value in changes.items():
        part, _, setting = key.partition("__")
        (config["config_groups"]["group_0"][part] if setting else config)[setting or part] = value
    return config


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (changed(quant_method="gptq"), "quant_method = 'gptq'"),
        (changed(format="pack-quantized"), "format = 'pack-quantized'"),
        (changed(weights__num_bits=4), "weights.num_bits = 4"),
        (changed(weights__type="float"), "weights.type = 'float'"),
        (changed(weights__strategy="group"), "weights.strategy = 'group'"),
        (changed(weights__dynamic=True), "weights.dynamic = True"),
        (changed(weights__symmetric=False), "weights.symmetric = False"),
        (changed(input_activations__dynamic=False), "input_activations.dynamic = False"),
        (changed(input_activations__strategy="tensor"), "input_activations.strategy = 'tensor'"),
        (changed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (changed(config_groups={}), "config_groups"),
        (changed(config_groups={"group_0": "int8"}), "the group 'int8'"),
        (changed(config_groups={"g": {"weights": "int8"}}), "weights.num_bits = 'int8'"),
        ("bitsandbytes", "bitsandbytes"),
        (changed(quant_method="gptq", bits=4), "the weights are quantized: GPTQ (4 bits)"),
    ],
)
def test_other_quantizations_are_unsupported(
    config: Any, found: str, quantized: Path, tmp_path: Path
) -> None:
    shutil.copytree(quantized, tmp_path / "foreign")
    text = json.loads((quantized / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(text))
    with pytest.raises(UnsupportedError, match="supported: compressed-tensors int-quantized W8A8") as caught:
        pack(Pack(str(tmp_path / "foreign"), str(tmp_path / "model.goss")))
    assert found in str(caught.value) and not (tmp_path / "model.goss").exists()


def test_settings_left_out_have_their_usual_values(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "terse")
    config = json.loads((quantized / "config.json").read_text())
    for part in ("weights", "input_activations"):
        del config["quantization_config"]["config_groups"]["group_0"][part]["symmetric"]
    (tmp_path / "terse" / "config.json").write_text(json.dumps(config))
    assert packed_from(tmp_path / "terse", tmp_path / "model.goss").matrices["lm_head"].values == "i8"


def test_int8_without_a_quantization_config(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "bare")
    text = json.loads((quantized / "config.json").read_text())
    del text["quantization_config"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="int8 without a quantization_config"):
        pack(Pack(str(tmp_path / "bare"), str(tmp_path / "model.goss")))


def test_output_that_exists(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "model.goss"
    output.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        pack(Pack(str(tiny_llama("llama2")), str(output)))
    assert output.read_bytes() == b"mine"
    assert packed_from(tiny_llama("llama2"), output, overwrite=True).matrices
    with pytest.raises(ConfigError, match="is a directory"):
        pack(Pack(str(tiny_llama("llama2")), str(tmp_path), overwrite=True))


def test_damaged_weights_leave_no_file(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama("llama2"), tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        pack(Pack(str(tmp_path / "damaged"), str(tmp_path / "out" / "model.goss")))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_without_tokenizer_json(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama("llama2"), tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        pack(Pack(str(tmp_path / "bare"), str(tmp_path / "model.goss")))


def test_chat_template_travels(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_llama("llama2"), tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }} \u2013 Grüße")
    assert (
        packed_from(tmp_path / "chat", tmp_path / "model.goss").chat_template == "{{ messages }} \u2013 Grüße"
    )


def test_cache(tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    shutil.copytree(tiny_llama("llama2"), source)
    events: list[Event] = []
    first = cached_pack(source, events.append)
    assert events[-1].metrics["bytes"] == first.stat().st_size
    written = first.stat().st_mtime_ns
    assert cached_pack(source, events.append) == first and first.stat().st_mtime_ns == written
    first.write_bytes(first.read_bytes()[:-64])
    assert cached_pack(source) == first and Packed.open(first).matrices
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    second = cached_pack(source)
    assert second != first and Packed.open(second).generation_config == {"eos_token_id": 7}
    with pytest.raises(CheckpointError):
        cached_pack(tmp_path)


def test_a_packed_file_is_no_checkpoint(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    packed_from(tiny_llama("llama2"), tmp_path / "model.goss")
    with pytest.raises(CheckpointError, match=r"model\.goss"):
        pack(Pack(str(tmp_path / "model.goss"), str(tmp_path / "again.goss")))
    with pytest.raises(FormatError, match="no packed model"):
        Packed.open(tiny_llama("llama2") / "model.safetensors")


@pytest.mark.parametrize(
    ("isa", "storage", "expected"), [("avx2", "auto", "dense"), ("avx2", "smallest", "sparse")]
)
def test_int8_stays_dense_where_that_is_faster(
    isa: str, storage: str, expected: str, quantized: Path, tmp_path: Path
) -> None:
    """Below AVX-512 a sparse INT8 layer costs more than it saves; the file may be for another CPU."""
    arguments = ["pack", str(quantized), "-o", str(tmp_path / "m.goss"), "--storage", storage]
    environment = os.environ | {"GOSSAMER_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-m", "gossamer", *arguments], env=environment, check=True)
    matrices = Packed.open(tmp_path / "m.goss").matrices
    assert matrices["model.layers.0.mlp.up_proj"].storage == expected


@pytest.mark.parametrize(
    ("isa", "purpose", "together", "zeros", "expected"),
    [
        ("avx512", "decode", 4, 0.7, "blocks"),
        ("avx512", "decode", 1, 0.7, "sparse"),
        ("avx512", "both", 1, 0.7, "sparse"),
        ("avx512", "both", 1, 0.92, "blocks"),
        ("avx512", "both", 1, 0.85, "sparse"),
        ("avx512", "prompts", 1, 0.85, "blocks"),
        ("avx512", "prompts", 1, 0.7, "sparse"),
        ("avx512-bf16", "prompts", 1, 0.85, "blocks"),
        ("amx", "prompts", 1, 0.92, "sparse"),
        ("avx2", "prompts", 4, 0.7, "dense"),
    ],
)
def test_int8_is_stored_for_its_purpose(
    isa: str,
    purpose: str,
    together: int,
    zeros: float,
    expected: str,
    tiny_llama: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Blocks where they are smaller, or where prompts gain and the machine's products skip."""
    if not _native.levels()[isa]:
        pytest.skip(f"no {isa} here")
    pruned = prune_by_hand(tiny_llama("llama2"), tmp_path / "pruned", zeros, together)
    source = quantize_by_hand(pruned, tmp_path / "int8")
    arguments = ["pack", str(source), "-o", str(tmp_path / "m.goss"), "--for", purpose]
    environment = os.environ | {"GOSSAMER_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-m", "gossamer", *arguments], env=environment, check=True, capture_output=True
    )
    matrices = Packed.open(tmp_path / "m.goss").matrices
    assert matrices["model.layers.0.mlp.down_proj"].storage == expected
    skips = isa in ("avx512", "avx512-bf16")
    assert (b"do not skip zeros on this CPU" in found.stdout) == (not skips and purpose != "decode")
