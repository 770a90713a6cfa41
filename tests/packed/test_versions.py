"""Files of every version of the format are read for ever, and a version says no more than it can."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer import _native
from gossamer.architecture.families import read_anatomy
from gossamer.engine import LLM, Encoder, SamplingParams
from gossamer.errors import FormatError
from gossamer.packed.header import needed_version, vector_tensors
from gossamer.packed.reader import Packed
from gossamer.packed.writer import PackedWriter
from packed.conftest import CONFIG
from packed.damage import Header, join, split
from packed.make_files import COMMON, FILES, IDS, MODELS, contents, storages

QWEN3, MISTRAL = FILES / "v2-qwen3-floats.goss", FILES / "v3-mistral-integers.goss"
INT8_TABLE = FILES / "v4-i8-integers.goss"
BLOCKS = FILES / "v5-blocks-integers.goss"
BERT = FILES / "v6-bert-floats.goss"
Q_NORM = "model.layers.1.self_attn.q_norm.weight"
# Of the largest logit. AMX multiplies float32 as two bfloat16 (native/kernels/x86/floats.cpp).
TOLERANCE = 1e-4 if _native.isa() == "amx" else 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_each_version_is_read_as_when_it_was_written(name: str) -> None:
    """Weights to the bit; logits to the bit where all matrices are integers, as their sums are exact."""
    path = FILES / f"{name}.goss"
    expected = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    packed = Packed.open(path)
    packed.check()
    assert path.stat().st_size < 61_000 and packed.metadata["version"] == name[1]
    assert packed.config == COMMON | MODELS[name][0]
    found = contents(packed)
    assert found["sha256"] == expected["sha256"]
    assert found["sha256"].keys() == packed.matrices.keys() | vector_tensors(packed.architecture).keys()
    kinds = {(packed.matrices[linear].storage, packed.matrices[linear].values) for linear in packed.decoder}
    assert kinds == {(storage, values) for storage in storages(name) for values in MODELS[name][1]}
    for which in ("alone", "last"):
        if name.endswith("integers"):
            assert found[which] == expected[which]
        else:
            difference = np.abs(np.array(found[which]) - expected[which]).max()
            assert difference <= TOLERANCE * np.abs(expected[which]).max()


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("integers")])
def test_a_file_with_a_tokenizer_answers(name: str) -> None:
    path = FILES / f"{name}.goss"
    if name.startswith("v6"):
        assert np.isfinite(Encoder(path, 1).encode("def f")).all()
        return
    [answer] = LLM(path, 1).generate("def f", SamplingParams(max_tokens=4))
    assert answer.text


def test_what_nobody_had_to_change_is_still_written_as_version_1(tmp_path: Path) -> None:
    """So that a program which knows only version 1 reads new files of the models that it knows."""
    windows = Packed.open(MISTRAL).config
    none = windows | {"sliding_window": None}
    for config, version in ((CONFIG, "1"), (Packed.open(QWEN3).config, "2"), (windows, "3"), (none, "1")):
        writer = PackedWriter(tmp_path / "model.goss", config=json.dumps(config))
        assert writer._metadata["version"] == version  # pyright: ignore[reportPrivateUsage]
        anatomy = read_anatomy(config)
        assert needed_version(anatomy, "bf16") == version and needed_version(anatomy, "i8") == "4"
        assert (
            needed_version(anatomy, "bf16", blocks=True) == needed_version(anatomy, "i8", blocks=True) == "5"
        )
    bert = read_anatomy(Packed.open(BERT).config)
    assert needed_version(bert, "bf16") == needed_version(bert, "i8", blocks=True) == "6"


@pytest.mark.parametrize(
    ("version", "path", "needed"),
    [
        ("1", QWEN3, "qwen3, which takes version 2"),
        ("2", MISTRAL, "mistral, which takes version 3"),
        ("3", INT8_TABLE, "embedding of i8, which takes version 4"),
        ("4", BLOCKS, "matrices in blocks, which takes version 5"),
        ("5", BERT, "bert, which takes version 6"),
    ],
)
def test_a_version_with_a_model_that_it_cannot_say_is_refused(
    version: str, path: Path, needed: str, tmp_path: Path
) -> None:
    header, data = split(path)
    header["__metadata__"]["version"] = version
    with pytest.raises(FormatError, match=f"version {version} with (an? )?{needed}"):
        Packed.open(join(tmp_path / "old.goss", header, data))


def test_windows_count_in_the_files_of_version_3() -> None:
    """Without them, the last of the tokens has other logits, and the first the same."""
    for path in (MISTRAL, FILES / "v3-qwen3-floats.goss"):
        packed = Packed.open(path)
        config = packed.native_config()
        blocks = [block | {"window": 0} for block in config["blocks"]]
        with_them, without = (
            _native.Model(packed.buffer, packed.native_tensors(), native, 1)
            for native in (config, config | {"blocks": blocks})
        )
        found_TV, all_TV = (
            model.forward([model.new_sequence(len(IDS))], [np.array(IDS, np.int32)], True)
            for model in (with_them, without)
        )
        np.testing.assert_array_equal(found_TV[:3], all_TV[:3])
        assert np.abs(found_TV[-1] - all_TV[-1]).max() > 1e-3


def resize(header: Header, name: str, num_bytes: int) -> None:
    """Give a vector another length; the tensors behind it move along."""
    begin, end = header[name]["data_offsets"]
    moved = num_bytes - (end - begin)
    for tensor, entry in header.items():
        if tensor != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset + moved for offset in entry["data_offsets"]]
    header[name] = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [begin, begin + num_bytes]}


def test_a_head_norm_of_another_width_is_refused(tmp_path: Path) -> None:
    header, data = split(QWEN3)
    begin, end = header[Q_NORM]["data_offsets"]
    resize(header, Q_NORM, end - begin + 64)
    path = join(tmp_path / "wide.goss", header, data[:end] + bytes(64) + data[end:])
    with pytest.raises(FormatError, match=rf"wide\.goss: tensor {Q_NORM} is F32 \[32\]; expected F32 \[16\]"):
        Packed.open(path)


def test_a_missing_head_norm_is_refused(tmp_path: Path) -> None:
    header, data = split(QWEN3)
    begin, end = header[Q_NORM]["data_offsets"]
    resize(header, Q_NORM, 0)
    del header[Q_NORM]
    with pytest.raises(FormatError, match=rf"lacks tensor '{Q_NORM}'"):
        Packed.open(join(tmp_path / "without.goss", header, data[:begin] + data[end:]))


def test_the_engine_refuses_them_too() -> None:
    """It believes nothing that Python said, as its arguments could come from elsewhere."""
    packed = Packed.open(QWEN3)
    tensors: dict[str, Any] = packed.native_tensors()
    dtype, _, offset, num_bytes = tensors[Q_NORM]
    wide = tensors | {Q_NORM: (dtype, (32,), offset, num_bytes + 64)}
    without = {name: tensor for name, tensor in tensors.items() if name != Q_NORM}
    for damaged in (wide, without):
        with pytest.raises(FormatError, match=Q_NORM):
            _native.Model(packed.buffer, damaged, packed.native_config(), 1, "f32")
