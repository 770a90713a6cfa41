"""One table of integers for look-up and head: the engine against NumPy, and damage to what it is made of."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer import _native
from gossamer.architecture.anatomy import EMBEDDING
from gossamer.errors import FormatError
from gossamer.packed.header import DEFLATED
from gossamer.packed.reader import Packed
from gossamer.packed.writer import PackedWriter
from gossamer.stages.pack import Pack, pack
from gossamer.tools.inspect import Inspect, inspect
from gossamer.tools.verify import Verify, verify
from packed.damage import join, set_entry, split, with_bytes
from packed.make_files import FILES, IDS

TABLES = {values: FILES / f"v4-{values}-integers.goss" for values in ("i8", "i4")}
LOGITS = """
import sys
import numpy as np
from gossamer import _native
from gossamer.packed.reader import Packed
packed = Packed.open(sys.argv[1])
model = _native.Model(packed.buffer, packed.native_tensors(), packed.native_config(), 2, "f32")
ids = np.arange(packed.architecture.vocab_size, dtype=np.int32)[:120]
np.save(sys.argv[2], model.forward([model.new_sequence(len(ids))], [ids], True))
"""


def forward(packed: Packed, ids: Any, **config: Any) -> np.ndarray:
    native = packed.native_config() | config
    model = _native.Model(packed.buffer, packed.native_tensors(), native, 1, "f32")
    return model.forward([model.new_sequence(len(ids))], [np.asarray(ids, np.int32)], True)


def rewritten(source: Packed, path: Path, embedding: np.ndarray) -> Packed:
    """A copy of a file with a float32 embedding for look-up, and its integer table as the head."""
    with PackedWriter(path, config=json.dumps(source.config)) as writer:
        writer.floats(EMBEDDING, embedding)
        for name, matrix in source.matrices.items():
            to = "lm_head" if name == EMBEDDING else name
            if matrix.values == "i8":
                writer.int8(to, source.stored(name), source.scale(name), matrix.storage)
            else:
                packed_NK = source._weights(name)  # pyright: ignore[reportPrivateUsage]
                writer.int4(to, packed_NK, source.multiplier(name), source.scale(name), matrix.storage)
        for name in (name for name in source.architecture.tensor_shapes if "norm" in name):
            writer.vector(name, source.vector(name))
    return Packed.open(path)


@pytest.mark.parametrize("values", TABLES)
def test_rows_are_looked_up_as_the_specification_reads_them(values: str, tmp_path: Path) -> None:
    """NumPy's rows, handed to the engine as float32, give the same bits as its look-up in the panels."""
    packed = Packed.open(TABLES[values])
    assert packed.head == EMBEDDING and packed.matrices[EMBEDDING].values == values
    floats = rewritten(packed, tmp_path / "floats.goss", packed.linear(EMBEDDING))
    assert floats.metadata["version"] == "1" and floats.head == "lm_head"
    ids = np.arange(packed.architecture.vocab_size)[:120]
    np.testing.assert_array_equal(forward(packed, ids), forward(floats, ids))
    moved = rewritten(packed, tmp_path / "moved.goss", packed.linear(EMBEDDING) * np.float32(1.001))
    assert not np.array_equal(forward(packed, ids), forward(moved, ids))


@pytest.mark.parametrize("values", TABLES)
def test_every_level_gives_the_same_bits(values: str, tmp_path: Path) -> None:
    found = []
    for isa in (level for level, runs in _native.levels().items() if runs):
        output = tmp_path / f"{isa}.npy"
        environment = os.environ | {"GOSSAMER_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", LOGITS, str(TABLES[values]), str(output)]
        subprocess.run(command, env=environment, check=True)
        found.append(np.load(output))
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("values", TABLES)
def test_a_step_reads_one_row_for_look_up(values: str, tmp_path: Path) -> None:
    packed = Packed.open(TABLES[values])
    floats = rewritten(packed, tmp_path / "floats.goss", packed.linear(EMBEDDING))
    steps = [
        _native.Model(it.buffer, it.native_tensors(), it.native_config(), 1, "f32").bytes_per_step
        for it in (packed, floats)
    ]
    width = packed.architecture.hidden_size
    row = width + 4 if values == "i8" else width // 2 + 4 + -(-width // 128)
    assert steps[1] - steps[0] == 4 * width - row


def test_a_sparse_table_is_refused_by_reader_and_engine(tmp_path: Path) -> None:
    header, data = split(TABLES["i8"])
    set_entry(header, EMBEDDING, storage="sparse")
    with pytest.raises(FormatError, match="stored as 'sparse' 'i8'; expected dense f32, bf16, i8, i4"):
        Packed.open(join(tmp_path / "sparse.goss", header, data))
    packed = Packed.open(TABLES["i8"])
    sparse = next(n for n, m in packed.matrices.items() if m.storage == "sparse")
    shape = {key: packed.native_config()["linears"][sparse][key] for key in ("rows", "columns")}
    wrong = {"embedding": sparse, "vocab_size": shape["rows"], "hidden_size": shape["columns"]}
    with pytest.raises(FormatError):
        forward(packed, IDS, **wrong)


@pytest.mark.parametrize("values", TABLES)
def test_damaged_tables_are_refused(values: str, tmp_path: Path) -> None:
    """Sums tie the weights together; scales must be finite, multipliers 1 to 16."""
    packed, rng = Packed.open(TABLES[values]), np.random.default_rng(3)
    scale = packed.tensors[f"{EMBEDDING}.weight_scale"].offset
    damages = [(scale + 8, np.float32(bad).tobytes()) for bad in (np.nan, np.inf, -1)]
    if values == "i4":
        damages.append((packed.tensors[f"{EMBEDDING}.weight_multiplier"].offset, b"\x11"))
    weights = packed.tensors[f"{EMBEDDING}.weight"]
    for place in rng.integers(weights.nbytes, size=20):
        before = int(packed.buffer[weights.offset + place])
        damages.append((weights.offset + int(place), bytes([before ^ 1 << int(rng.integers(8))])))
    for offset, replaced in damages:
        damaged = with_bytes(TABLES[values], tmp_path / "damaged.goss", offset, replaced)
        with pytest.raises(FormatError, match=EMBEDDING):
            damaged.check()
        with pytest.raises(FormatError, match=EMBEDDING):
            forward(damaged, IDS)


def test_a_damaged_deflated_tokenizer_is_refused(tmp_path: Path) -> None:
    packed = Packed.open(TABLES["i8"])
    text, stored = packed.tokenizer_json, packed.tensors[DEFLATED]
    assert text is not None and json.loads(text)["model"] and stored.nbytes < len(text)
    for place, replaced in ((0, b"\xff"), (40, bytes(16)), (stored.nbytes - 1, b"\1"), (0, bytes(64))):
        damaged = with_bytes(TABLES["i8"], tmp_path / "z.goss", stored.offset + place, replaced)
        with pytest.raises(FormatError, match=r"z\.goss: tokenizer\.json\.zlib"):
            _ = damaged.tokenizer_json


@pytest.mark.parametrize("values", TABLES)
def test_verify_and_inspect_know_the_table(
    values: Any, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    """The engine agrees with transformers' model of the rounded weights; the parts are the file's bytes."""
    file = tmp_path / "model.goss"
    pack(Pack(str(tiny_llama("llama3")), str(file), embedding=values))
    checks = verify(Verify(str(file), parent=str(tiny_llama("llama3")))).checks
    assert {"tensors", "backends agree"} <= {check.name for check in checks if not check.skipped}
    parts = inspect(Inspect(str(file))).parts
    assert parts is not None and sum(parts.values()) == file.stat().st_size
    assert parts["embedding and head"] == Packed.open(file).matrix_bytes(EMBEDDING)


@pytest.mark.parametrize("values", TABLES)
def test_flipped_bytes_never_crash(values: str, tmp_path: Path) -> None:
    """Anywhere in the file: a model or a FormatError, for the reader and for the engine."""
    content, rng, refused = TABLES[values].read_bytes(), np.random.default_rng(5), 0
    path = tmp_path / "flipped.goss"
    for _ in range(150):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            packed = Packed.open(path)
            _ = packed.tokenizer_json
            packed.check()
            forward(packed, IDS)
        except FormatError:
            refused += 1
    assert refused > 50


def test_a_tokenizer_does_not_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.packed.reader.MAX_TOKENIZER_BYTES", 1 << 10)
    with pytest.raises(FormatError, match="more than 1,024 bytes"):
        _ = Packed.open(TABLES["i8"]).tokenizer_json


def test_a_version_has_one_name_for_the_tokenizer(tmp_path: Path) -> None:
    header, data = split(TABLES["i8"])
    header["tokenizer.json"] = header.pop(DEFLATED)
    with pytest.raises(FormatError, match=r"unknown tensor 'tokenizer\.json'"):
        Packed.open(join(tmp_path / "text.goss", header, data))
