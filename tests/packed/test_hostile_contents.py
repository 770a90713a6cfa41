"""Damaged masks, weights, multipliers, scales and sums under a sound header end in a FormatError."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.errors import FormatError
from gossamer.packed import streams
from gossamer.packed.reader import Packed
from packed.damage import I4, Q, join, set_entry, split, with_bytes


def tensors_of(synthetic: Any, kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    """(matrix, tensor) for all tensors of matrices of these types."""
    matrices = Packed.open(synthetic.path).matrices
    return [(n, t) for n, matrix in matrices.items() if matrix.values in kinds for t in matrix.tensors(n)]


def test_every_flipped_bit_of_an_integer_matrix_is_found(synthetic: Any, tmp_path: Path) -> None:
    """Sums tie masks, weights and multipliers together; scales only have to be sane."""
    packed, rng = Packed.open(synthetic.path), np.random.default_rng(13)
    for matrix, tensor in tensors_of(synthetic, ("i8", "i4")):
        if tensor.endswith("scale"):
            continue
        bits, stored = packed.array(tensor).reshape(-1).view(np.uint8), packed.tensors[tensor]
        for _ in range(25):
            place = int(rng.integers(bits.size))
            flipped = bytes([int(bits[place]) ^ 1 << int(rng.integers(8))])
            damaged = with_bytes(synthetic.path, tmp_path / "bit.goss", stored.offset + place, flipped)
            try:
                damaged.check()
            except FormatError as error:
                assert f"bit.goss: {matrix}" in str(error)
                continue
            assert tensor.endswith("multiplier")  # of a group of zeros
            assert np.array_equal(damaged.stored(matrix), packed.stored(matrix))


def test_flipped_bits_of_sparse_floats_are_found_or_give_another_matrix(
    synthetic: Any, tmp_path: Path
) -> None:
    """Floats have no sums. What is not refused is what the writer would make of the weights that are read."""
    packed, rng, refused = Packed.open(synthetic.path), np.random.default_rng(14), 0
    for matrix, tensor in tensors_of(synthetic, ("f32", "bf16")):
        if packed.matrices[matrix].storage == "dense":
            continue
        bits, stored = packed.array(tensor).reshape(-1).view(np.uint8), packed.tensors[tensor]
        for _ in range(60):
            place = int(rng.integers(bits.size))
            flipped = bytes([int(bits[place]) ^ 1 << int(rng.integers(8))])
            damaged = with_bytes(synthetic.path, tmp_path / "bit.goss", stored.offset + place, flipped)
            try:
                w_NK = damaged.stored(matrix)
            except FormatError:
                refused += 1
                continue
            stream, _ = streams.encode(packed.matrices[matrix].values, w_NK)
            assert tensor.endswith("stream") and np.array_equal(stream, damaged.array(tensor))
    assert refused > 100


def test_sparse_floats_that_are_nan_or_infinite_are_refused(synthetic: Any, tmp_path: Path) -> None:
    packed = Packed.open(synthetic.path)
    for matrix, tensor in tensors_of(synthetic, ("f32", "bf16")):
        if not tensor.endswith("stream"):
            continue
        values = packed.matrices[matrix].values
        masks = 16 * (2 if values == "f32" else 4)
        for bits in (0x7F80_0000, 0x7FC0_0000, 0xFF80_0000):
            weight = (bits if values == "f32" else bits >> 16).to_bytes(4 if values == "f32" else 2, "little")
            offset = packed.tensors[tensor].offset + masks
            with pytest.raises(FormatError, match="NaN or infinite"):
                with_bytes(synthetic.path, tmp_path / "nan.goss", offset, weight).stored(matrix)


@pytest.mark.parametrize(("place", "value"), [(0, 0), (0, 17), (5, 255), (0, 128)])
def test_bad_multipliers_are_refused(place: int, value: int, synthetic: Any, tmp_path: Path) -> None:
    offset = Packed.open(synthetic.path).tensors[f"{I4}.weight_multiplier"].offset + place
    with pytest.raises(FormatError, match=rf"{I4}: int4 multipliers must be from 1 to 16"):
        with_bytes(synthetic.path, tmp_path / "zero.goss", offset, bytes([value])).linear(I4)


def test_multipliers_in_the_padding_are_refused(synthetic: Any, tmp_path: Path) -> None:
    """down_proj has 36 rows and two groups: rows 36 to 47 of its last panel are padding, then 32 bytes."""
    packed = Packed.open(synthetic.path)
    stored = packed.tensors[f"{I4}.weight_multiplier"]
    assert packed.multiplier(I4).shape == (36, 2) and stored.nbytes == 128
    for place in (64 + 4, 80 + 15, 96, 127):
        with pytest.raises(FormatError, match="0 in the padding"):
            with_bytes(synthetic.path, tmp_path / "m.goss", stored.offset + place, b"\1").check()


def test_an_int4_matrix_has_as_many_nonzeros_as_the_table_says(synthetic: Any, tmp_path: Path) -> None:
    header, data = split(synthetic.path)
    nonzeros = Packed.open(synthetic.path).matrices[I4].nonzeros
    set_entry(header, I4, nonzeros=nonzeros + 1)
    packed = Packed.open(join(tmp_path / "few.goss", header, data))
    with pytest.raises(
        FormatError, match=rf"{nonzeros} nonzero weights; the table of matrices says {nonzeros + 1}"
    ):
        packed.stored(I4)
    for wild in (200, 36 * 137):
        set_entry(header, I4, nonzeros=wild)
        with pytest.raises(
            FormatError, match=rf"is a stream of \d+ bytes; {wild} nonzero weights of i4 take"
        ):
            Packed.open(join(tmp_path / "wild.goss", header, data))


@pytest.mark.parametrize(
    ("blocks", "message"), [(1, "the panels end at byte"), (1000, "nonzero weights of i4 take")]
)
def test_an_int4_stream_ends_where_its_panels_do(
    blocks: int, message: str, synthetic: Any, tmp_path: Path
) -> None:
    """The header tells only about how long it is; so the contents must."""
    header, data = split(synthetic.path)
    entry, more = header[f"{I4}.weight.stream"], 64 * blocks
    end = entry["data_offsets"][1]
    for name, other in header.items():
        if name != "__metadata__" and other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset + more for offset in other["data_offsets"]]
    entry["data_offsets"][1] += more
    entry["shape"][0] += more
    path = join(tmp_path / "long.goss", header, data[:end] + bytes(more) + data[end:])
    with pytest.raises(FormatError, match=message):
        Packed.open(path).check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bad_scales_are_refused(value: float, synthetic: Any, tmp_path: Path) -> None:
    for name in (Q, I4):
        offset = Packed.open(synthetic.path).tensors[f"{name}.weight_scale"].offset + 4
        scale = np.float32(value).tobytes()
        with pytest.raises(FormatError, match="scales must be finite"):
            with_bytes(synthetic.path, tmp_path / "scale.goss", offset, scale).linear(name)
