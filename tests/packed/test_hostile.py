"""Whatever the bytes, opening and decoding a file ends in a model or in a FormatError, in little memory."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.errors import FormatError
from gossamer.packed.reader import Packed
from packed.damage import I4, Header, Q, join, set_entry, split


def read_all(path: Path) -> None:
    """Open and decode every matrix."""
    packed = Packed.open(path)
    for name in packed.matrices:
        packed.linear(name)


def test_an_untouched_copy_is_sound(synthetic: Any, tmp_path: Path) -> None:
    read_all(join(tmp_path / "copy.goss", *split(synthetic.path)))


def test_truncation_anywhere_is_refused(synthetic: Any, tmp_path: Path) -> None:
    content, packed = synthetic.path.read_bytes(), Packed.open(synthetic.path)
    begin = 8 + int.from_bytes(content[:8], "little")
    ends = {t.offset + d for t in packed.tensors.values() for d in (-64, -1, 0, 1)}
    lengths = {0, 1, 7, 8, 9, 64, begin // 2, begin - 1, begin, begin + 1, len(content) - 1} | ends
    path = tmp_path / "short.goss"
    for length in sorted(length for length in lengths if length < len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"short\.goss"):
            Packed.open(path)
    path.write_bytes(content + b"\0" * 64)
    with pytest.raises(FormatError, match="the tensors end at"):
        Packed.open(path)


def test_flipped_header_bytes_never_crash(synthetic: Any, tmp_path: Path) -> None:
    content, rng = synthetic.path.read_bytes(), np.random.default_rng(11)
    used = len(content[: 8 + int.from_bytes(content[:8], "little")].rstrip())
    path, refused = tmp_path / "flipped.goss", 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(used)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_all(path)
        except FormatError as error:
            assert "flipped.goss" in str(error)
            refused += 1
    assert refused > 200


def test_flipped_data_bytes_never_crash(synthetic: Any, tmp_path: Path) -> None:
    content, rng = synthetic.path.read_bytes(), np.random.default_rng(12)
    begin = 8 + int.from_bytes(content[:8], "little")
    path, refused = tmp_path / "flipped.goss", 0
    for _ in range(80):
        damaged = bytearray(content)
        damaged[rng.integers(begin, len(content))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_all(path)
        except FormatError as error:
            assert "flipped.goss" in str(error)
            refused += 1
    assert refused > 5


LLAMA3 = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def set_version(header: Header, version: Any) -> None:
    header["__metadata__"]["version"] = version


def set_config(header: Header, **changes: Any) -> None:
    metadata = header["__metadata__"]
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)


def set_table(header: Header, **changes: Any) -> None:
    metadata = header["__metadata__"]
    metadata["layers"] = json.dumps(json.loads(metadata["layers"]) | changes)


def split_shape(entry: dict[str, Any]) -> None:
    entry["shape"] = [entry["shape"][0] // 64, 64]


def overlap(header: Header) -> None:
    first, second = list(header)[2:4]
    header[second]["data_offsets"] = header[first]["data_offsets"]


def move(header: Header, by: int) -> None:
    offsets = header[list(header)[-1]]["data_offsets"]
    header[list(header)[-1]]["data_offsets"] = [offset + by for offset in offsets]


def add_empty(header: Header) -> None:
    end = header[list(header)[-1]]["data_offsets"][1]
    header["x"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}


def rename_in_table(header: Header) -> None:
    metadata = header["__metadata__"]
    metadata["layers"] = metadata["layers"].replace(Q, Q + "x")


def swap(header: Header) -> None:
    name = list(header)[-2]
    header[name] = header.pop(name)


EDITS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "newer version": (lambda h: set_version(h, "7"), "'7'; expected 1, 2, 3, 4, 5 or 6; it is newer than"),
    "much newer version": (lambda h: set_version(h, "9" * 5000), "newer than this program"),
    "version 0": (lambda h: set_version(h, "0"), "version '0'; expected 1, 2, 3, 4, 5 or 6"),
    "version a number": (lambda h: set_version(h, 1), "version 1; expected 1, 2, 3, 4, 5 or 6"),
    "version in other digits": (lambda h: set_version(h, "\u0661"), "expected 1"),
    "no version": (lambda h: h["__metadata__"].pop("version"), "version None"),
    "no metadata": (lambda h: h.pop("__metadata__"), "no packed model"),
    "metadata a list": (lambda h: h.update(__metadata__=[]), "no packed model"),
    "another format": (lambda h: h["__metadata__"].update(format="pt"), "no packed model"),
    "unknown metadata": (lambda h: h["__metadata__"].update(extra="1"), "unknown metadata 'extra'"),
    "metadata a number": (lambda h: h["__metadata__"].update(parent=3), "parent is not a string"),
    "half a surrogate": (lambda h: h["__metadata__"].update(parent="\ud800"), "parent is not a string"),
    "no config": (lambda h: h["__metadata__"].pop("config"), "lack config"),
    "config not JSON": (lambda h: h["__metadata__"].update(config="{"), "model config is not valid JSON"),
    "config a list": (lambda h: h["__metadata__"].update(config="[]"), "expected an object"),
    "provenance a list": (lambda h: set_config(h, gossamer=[]), "gossamer in the model config: found list"),
    "license a number": (lambda h: set_config(h, gossamer={"license": 2}), "license is 2; expected a text"),
    "texts a list": (lambda h: set_config(h, gossamer={"texts": ["MIT"]}), "expected texts by name"),
    "text a number": (lambda h: set_config(h, gossamer={"texts": {"NOTICE": 2}}), "expected texts by name"),
    "lineage a text": (lambda h: set_config(h, gossamer={"lineage": "prune"}), "lineage is 'prune'"),
    "step without a parent": (
        lambda h: set_config(h, gossamer={"lineage": [{"stage": "prune"}]}),
        "expected a stage and a parent",
    ),
    "another architecture": (lambda h: set_config(h, architectures=["GPT2LMHead"]), "GPT2LMHead"),
    "a billion layers": (lambda h: set_config(h, num_hidden_layers=10**9), "at most 10000"),
    "nine thousand layers": (lambda h: set_config(h, num_hidden_layers=9000), "cannot hold 9000 layers"),
    "layers as text": (lambda h: set_config(h, num_hidden_layers="2"), "num_hidden_layers"),
    "heads a fraction": (lambda h: set_config(h, num_key_value_heads=1.5), "num_key_value_heads"),
    "a list of heads": (lambda h: set_config(h, num_key_value_heads=[1]), "model config"),
    "negative head_dim": (lambda h: set_config(h, head_dim=-10), "head_dim"),
    "huge head_dim": (lambda h: set_config(h, head_dim=1 << 40), "head_dim"),
    "eps not a number": (lambda h: set_config(h, rms_norm_eps=float("nan")), "nan"),
    "infinite theta": (lambda h: set_config(h, rope_theta=1e999), "inf"),
    "theta 0": (lambda h: set_config(h, rope_theta=0), "rope_theta is 0; expected a number above 0"),
    "llama3 rope by 0": (lambda h: set_config(h, rope_scaling=dict(LLAMA3, low_freq_factor=0)), "is 0"),
    "llama3 rope, no width": (lambda h: set_config(h, rope_scaling=dict(LLAMA3, low_freq_factor=4)), "equal"),
    "eos a word": (lambda h: set_config(h, eos_token_id=["</s>"]), "token id '</s>'"),
    "bos negative": (lambda h: set_config(h, bos_token_id=-1), "token id -1"),
    "wider model": (lambda h: set_config(h, hidden_size=64), "the config says"),
    "larger vocabulary": (lambda h: set_config(h, vocab_size=102), "the config says 102 x 36"),
    "no table of matrices": (lambda h: h["__metadata__"].pop("layers"), "lack layers"),
    "a matrix not in the table": (rename_in_table, "disagree about"),
    "a matrix too many": (lambda h: set_table(h, other={}), "'other' must have exactly"),
    "unknown storage": (lambda h: set_entry(h, storage="zip"), "stored as 'zip' 'i8'"),
    "unknown values": (lambda h: set_entry(h, values="i2"), "'i2'"),
    "int8 called int4": (lambda h: set_entry(h, values="i4"), "lacks tensor .*weight_multiplier"),
    "int4 called int8": (lambda h: set_entry(h, I4, values="i8"), "unknown tensor .*weight_multiplier"),
    "values of another type": (lambda h: set_entry(h, values=["i8"]), "stored as 'sparse'"),
    "int8 called bf16": (lambda h: set_entry(h, values="bf16"), "unknown tensor .*weight_scale"),
    "sparse embedding": (lambda h: set_entry(h, "model.embed_tokens", storage="sparse"), "'sparse' 'bf16'"),
    "int4 stream not flat": (lambda h: split_shape(h[f"{I4}.weight.stream"]), "expected U8 .bytes."),
    "multipliers not flat": (lambda h: split_shape(h[f"{I4}.weight_multiplier"]), "expected U8 .128."),
    "int8 embedding": (lambda h: set_entry(h, "model.embed_tokens", values="i8"), "which takes version 4"),
    "bf16 called version 4": (lambda h: set_version(h, "4"), "has an unknown tensor 'tokenizer.json'"),
    "dense instead of sparse": (lambda h: set_entry(h, storage="dense"), "up_proj"),
    "nonzeros too many": (lambda h: set_entry(h, nonzeros=10**9), "expected sizes"),
    "nonzeros wrong": (lambda h: set_entry(h, nonzeros=1), "expected U8"),
    "nonzeros true": (lambda h: set_entry(h, nonzeros=True), "expected sizes"),
    "rows wrong": (lambda h: set_entry(h, rows=136), "the config says 137 x 36"),
    "rows absurd": (lambda h: set_entry(h, rows=10**30), "expected sizes"),
    "a tensor missing": (lambda h: h.pop(list(h)[-1]), "the tensors end at"),
    "a tensor of another name": (lambda h: h.update(other=h.pop(list(h)[-1])), "lacks tensor|unknown tensor"),
    "wrong dtype": (lambda h: h[f"{Q}.weight_scale"].update(dtype="I32"), "is I32"),
    "unknown dtype": (lambda h: h[f"{Q}.weight_scale"].update(dtype="F64"), "dtype 'F64'"),
    "dtype a list": (lambda h: h[f"{Q}.weight_scale"].update(dtype=[]), "dtype"),
    "wider dtype": (lambda h: h[f"{Q}.weight_scale"].update(dtype="U64"), "is at bytes"),
    "another shape": (lambda h: h["lm_head.weight"].update(shape=[7, 36, 1, 16]), "expected F32"),
    "shape too large": (lambda h: h["lm_head.weight"].update(shape=[7, 36, 16, 2]), "is at bytes"),
    "shape absurd": (lambda h: h["lm_head.weight"].update(shape=[1 << 61] * 4), "is at bytes"),
    "shape beyond sizes": (lambda h: h["lm_head.weight"].update(shape=[10**40]), "shape"),
    "shape negative": (lambda h: h["lm_head.weight"].update(shape=[-7, -36, 16, 1]), "shape"),
    "shape of fractions": (lambda h: h["lm_head.weight"].update(shape=[7.0, 36, 16, 1]), "shape"),
    "shape a word": (lambda h: h["lm_head.weight"].update(shape="7"), "shape"),
    "too many dimensions": (lambda h: h["lm_head.weight"].update(shape=[1] * 10**5), "shape"),
    "three offsets": (lambda h: h["lm_head.weight"]["data_offsets"].append(1), "3 data_offsets"),
    "offsets swapped": (lambda h: h["lm_head.weight"]["data_offsets"].reverse(), "is at bytes"),
    "an entry too many": (lambda h: h["lm_head.weight"].update(extra=1), "exactly dtype"),
    "a tensor that is a number": (lambda h: h.update({"lm_head.weight": 3}), "exactly dtype"),
    "overlap": (overlap, "with no hole"),
    "a hole": (lambda h: move(h, 64), "with no hole"),
    "offset beyond the file": (lambda h: move(h, 1 << 60), "with no hole"),
    "an empty tensor too many": (add_empty, "unknown tensor 'x'"),
    "order changed": (swap, "with no hole"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edited_headers_are_refused(name: str, synthetic: Any, tmp_path: Path) -> None:
    header, data = split(synthetic.path)
    edit, message = EDITS[name]
    edit(header)
    with pytest.raises(FormatError, match=message) as caught:
        Packed.open(join(tmp_path / "edited.goss", header, data))
    assert "edited.goss" in str(caught.value) and len(str(caught.value)) < 500
    str(caught.value).encode()


def test_repeated_keys_are_refused(synthetic: Any, tmp_path: Path) -> None:
    header, data = split(synthetic.path)
    text = json.dumps(header)
    entry = json.dumps(header["model.norm.weight"])
    doubled = text[:-1] + f', "model.norm.weight": {entry}}}'
    with pytest.raises(FormatError, match="a key is repeated"):
        Packed.open(join(tmp_path / "doubled.goss", doubled, data))


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "[" * 100_000, '{"a":' * 100_000, "\x00", "{}", '{"__metadata__":', "1" * 5000],
)
def test_headers_that_are_no_object(text: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"bad\.goss"):
        Packed.open(join(tmp_path / "bad.goss", text, b""))


@pytest.mark.parametrize("header_bytes", [0, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_absurd_header_lengths_take_no_memory(header_bytes: int, synthetic: Any, tmp_path: Path) -> None:
    path = tmp_path / "absurd.goss"
    path.write_bytes(header_bytes.to_bytes(8, "little") + synthetic.path.read_bytes()[8:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=r"absurd\.goss"):
        Packed.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_unaligned_data_are_refused(synthetic: Any, tmp_path: Path) -> None:
    content = synthetic.path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little") + 8
    path = tmp_path / "unaligned.goss"
    path.write_bytes(
        header_bytes.to_bytes(8, "little") + content[8:header_bytes] + b" " * 8 + content[header_bytes:]
    )
    with pytest.raises(FormatError, match="expected a multiple of 64"):
        Packed.open(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.goss").touch()
    (tmp_path / "text.goss").write_text("not a model " * 100)
    for name in ("empty.goss", "text.goss", "absent.goss", "."):
        with pytest.raises(FormatError, match=r"expected|no packed model"):
            Packed.open(tmp_path / name)
