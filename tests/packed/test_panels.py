"""Matrices survive the layouts bit for bit, and readers written from docs/format.md alone agree."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from gossamer.errors import FormatError
from gossamer.packed import blocks, panels, streams
from packed.matrices import (
    DTYPES,
    VALUES,
    random_matrix,
    random_multipliers,
    read_blocks,
    read_dense,
    read_stream,
)

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
every_type = pytest.mark.parametrize("values", VALUES)
shapes = st.tuples(st.integers(1, 70), st.integers(1, 300))
sparsities = st.sampled_from([0, 0.3, 0.7, 0.95, 1])


@seed(20240506)
@settings(max_examples=120, deadline=None)
@given(st.sampled_from(VALUES), shapes, sparsities, st.integers(0, 2**32))
def test_sparse_round_trip(values: str, shape: tuple[int, int], sparsity: float, number: int) -> None:
    w_NK = random_matrix(values, shape, sparsity, number)
    stream, offsets = streams.encode(values, w_NK)
    decoded = streams.decode(values, stream, offsets, *shape)
    assert decoded.dtype == w_NK.dtype and decoded.tobytes() == w_NK.tobytes()
    assert stream.size == streams.stream_bytes(values, *shape, streams.count_value_bytes(values, w_NK))
    assert offsets.shape == (streams.num_offsets(shape[0]),) and offsets.nbytes % 64 == 0


@seed(20240509)
@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 600), sparsities, st.integers(0, 2**32))
def test_blocks_round_trip(rows: int, columns: int, sparsity: float, number: int) -> None:
    q_NK = random_matrix("i8", (rows, columns), sparsity, number)
    stream, offsets = blocks.encode(q_NK)
    np.testing.assert_array_equal(blocks.decode(stream, offsets, rows, columns), q_NK)
    np.testing.assert_array_equal(read_blocks(stream, offsets, rows, columns), q_NK)
    whole = np.pad(q_NK, ((0, 0), (0, -columns % 4))).reshape(rows, -1, 4)
    live = np.count_nonzero(whole.any(axis=2))
    assert blocks.count_live(q_NK) == live and blocks.num_blocks(rows, columns) == whole[..., 0].size
    assert stream.size == blocks.stream_bytes(rows, columns, live)


@pytest.mark.parametrize("place", [(3, 0), (0, 6)], ids=["a row", "an input"])
def test_blocks_outside_their_matrix_are_refused(place: tuple[int, int]) -> None:
    q_NK = np.zeros((4, 7), np.int8)
    q_NK[0, 0] = q_NK[place] = 5
    stream, offsets = blocks.encode(q_NK)
    rows, columns = (3, 7) if place[0] else (4, 6)
    with pytest.raises(FormatError, match=f"outside its {rows} x {columns} matrix"):
        blocks.decode(stream, offsets, rows, columns, "model.goss: q_proj")


def test_a_block_that_is_announced_has_a_weight() -> None:
    stream, offsets = blocks.encode(np.array([[0, 9, 0, 0]], np.int8))
    stream[129] = 0
    with pytest.raises(FormatError, match="announces a weight whose value is 0"):
        blocks.decode(stream, offsets, 1, 4)


@seed(20240507)
@settings(max_examples=120, deadline=None)
@given(st.sampled_from(VALUES), shapes, st.integers(0, 2**32))
def test_dense_round_trip(values: str, shape: tuple[int, int], number: int) -> None:
    w_NK = random_matrix(values, shape, 0.3, number)
    stored = panels.to_panels(values, w_NK)
    assert stored.shape == panels.panel_shape(values, *shape) and stored[0, 0].nbytes == 64
    assert panels.from_panels(values, stored, *shape).tobytes() == w_NK.tobytes()


@seed(20240508)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 1000), st.integers(0, 2**32))
def test_multipliers_round_trip(rows: int, columns: int, number: int) -> None:
    multiplier_NG = random_multipliers((rows, columns), number)
    stored = panels.to_multipliers(multiplier_NG)
    assert stored.shape == (panels.num_multipliers(rows, columns),) and stored.size % 64 == 0
    groups = multiplier_NG.shape[1]
    for n, g in np.ndindex(rows, groups):
        assert stored[(n // 16 * groups + g) * 16 + n % 16] == multiplier_NG[n, g]
    assert np.count_nonzero(stored) == multiplier_NG.size
    assert np.array_equal(panels.from_multipliers(stored, rows, columns), multiplier_NG)


@every_type
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 133)])
def test_readers_written_from_the_document_agree(
    values: str, shape: tuple[int, int], sparsity: float
) -> None:
    w_NK = random_matrix(values, shape, sparsity, shape[0])
    assert np.array_equal(read_stream(values, *streams.encode(values, w_NK), *shape), w_NK)
    assert np.array_equal(read_dense(values, panels.to_panels(values, w_NK), *shape), w_NK)


@every_type
def test_rows_and_panels_of_zeros_take_only_masks(values: str) -> None:
    w_NK = random_matrix(values, (50, 77), 0.5, 1)
    w_NK[16:32] = 0
    w_NK[40] = 0
    stream, offsets = streams.encode(values, w_NK)
    masks = {"f32": 77 * 2, "bf16": 39 * 4, "i8": 20 * 8, "i4": 20 * 8}
    assert offsets[2] - offsets[1] == masks[values]
    assert np.array_equal(read_stream(values, stream, offsets, 50, 77), w_NK)


def test_negative_zero_is_zero() -> None:
    w_NK = random_matrix("f32", (20, 30), 0.5, 1)
    minus_NK = np.where(w_NK == 0, np.float32(-0.0), w_NK)
    for values, plain, minus in (
        ("f32", w_NK, minus_NK),
        ("bf16", *((w.view(np.uint32) >> 16).astype(np.uint16) for w in (w_NK, minus_NK))),
    ):
        assert plain.tobytes() != minus.tobytes()
        for found, expected in zip(streams.encode(values, minus), streams.encode(values, plain), strict=True):
            assert np.array_equal(found, expected)


@every_type
def test_chunks_of_a_large_matrix_join(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK = random_matrix(values, (150, 100), 0.6, 2)
    whole, value_bytes = streams.encode(values, w_NK), streams.count_value_bytes(values, w_NK)
    monkeypatch.setattr(panels, "_CHUNK_WEIGHTS", 16 * 100 * 2)
    assert len(list(panels.panel_chunks(150, 100))) == 5
    for pieced, expected in zip(streams.encode(values, w_NK), whole, strict=True):
        assert np.array_equal(pieced, expected)
    assert streams.count_value_bytes(values, w_NK) == value_bytes
    assert np.array_equal(streams.decode(values, *whole, 150, 100), w_NK)


@every_type
@pytest.mark.parametrize("place", [(0, 0, 3, 0), (0, -1, 0, -1)], ids=["row 3", "the last input"])
def test_dense_panels_with_a_weight_in_the_padding_are_refused(values: str, place: tuple[int, ...]) -> None:
    stored = panels.to_panels(values, random_matrix(values, (3, 7), 0))
    if values == "f32" and place[1] == -1:
        stored = np.pad(stored, ((0, 0), (0, 1), (0, 0), (0, 0)))  # its vectors of one input need no padding
    stored[place] = stored[place].astype(int) | 0x10  # of int4, in the second vector
    with pytest.raises(FormatError, match="outside its 3 x 7 matrix"):
        panels.from_panels(values, stored, 3, 7)


def test_the_missing_half_of_a_last_int4_vector_must_be_zero() -> None:
    w_NK = random_matrix("i4", (16, 12), 0)
    stored = panels.to_panels("i4", w_NK)
    stored[0, 1, 5, 2] |= 0x30
    with pytest.raises(FormatError, match="outside its 16 x 12 matrix"):
        panels.from_panels("i4", stored, 16, 12)


@pytest.mark.parametrize(("where", "value"), [(0, 0), (0, 17), (0, 255), (3, 1), (35, 2), (63, 1)])
def test_bad_multipliers_are_refused(where: int, value: int) -> None:
    stored = panels.to_multipliers(random_multipliers((3, 200)))
    stored[where] = value
    with pytest.raises(FormatError, match=r"model\.goss: q_proj: int4 multipliers must be from 1 to 16"):
        panels.from_multipliers(stored, 3, 200, "model.goss: q_proj")


def test_multiplied_int4_weights_are_exact_in_int8() -> None:
    q_NK = np.tile(np.arange(-8, 8, dtype=np.int8), (16, 16))
    multiplier_NG = np.arange(1, 33, dtype=np.uint8).reshape(16, 2) % 16 + 1
    found = panels.multiply_groups(q_NK, multiplier_NG)
    assert found.dtype == np.int8
    for n, k in np.ndindex(q_NK.shape):
        assert int(found[n, k]) == int(q_NK[n, k]) * int(multiplier_NG[n, k // 128])
    assert found.min() == -128 and found.max() == 112


def bits_of_the_document() -> dict[tuple[str, float], float]:
    """(type, sparsity) -> bits per weight: the table of section 5."""
    rows = re.findall(r"^\| `(\w+)` \|((?: [\d.]+ \|){4})$", TEXT, re.MULTILINE)
    cells = {values: [float(cell) for cell in row.strip("| ").split("|")] for values, row in rows}
    zeros = [0.5, 0.7, 0.8, 0.9]
    return {(values, z): bits for values, row in cells.items() for z, bits in zip(zeros, row, strict=True)}


@every_type
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8, 0.9])
def test_bits_per_weight_are_those_promised(values: str, sparsity: float) -> None:
    w_NK = random_matrix(values, (512, 4096), 0, 4)
    w_NK.reshape(-1)[np.random.default_rng(5).permutation(w_NK.size)[: round(sparsity * w_NK.size)]] = 0
    stream, offsets = streams.encode(values, w_NK)
    bits = 8 * (stream.nbytes + offsets.nbytes) / w_NK.size
    assert bits == pytest.approx(bits_of_the_document()[values, sparsity], abs=0.01)


@pytest.mark.parametrize("together", [1, 4], ids=["at random places", "four at a time"])
def test_bits_of_blocks_are_those_promised(together: int) -> None:
    where = {1: "at random places", 4: "four at a time"}[together]
    row = re.search(rf"^\| `i8`, blocks, zeros {where} \|(.*)\|$", TEXT, re.MULTILINE)
    assert row is not None
    for sparsity, bits in zip([0.5, 0.7, 0.8, 0.9], row[1].split("|"), strict=True):
        q_NK, rng = random_matrix("i8", (512, 4096), 0, 4), np.random.default_rng(5)
        q_NK[(rng.random((512, 4096 // together)) < sparsity).repeat(together, axis=1)] = 0
        stream, offsets = blocks.encode(q_NK)
        assert 8 * (stream.nbytes + offsets.nbytes) / q_NK.size == pytest.approx(float(bits), abs=0.02)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def test_the_examples_of_the_document() -> None:
    found = re.findall(r"```(matrix|stream|dense) ?(\w*)\n(.*?)```", TEXT, re.DOTALL)
    examples = {(kind, values): text for kind, values, text in found}
    w_NK = np.array([numbers(line) for line in examples["matrix", ""].strip().splitlines()])
    as_type = {
        "i8": w_NK.astype(np.int8),
        "i4": w_NK.astype(np.int8),
        "bf16": (w_NK.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
    }
    for values, typed_NK in as_type.items():
        stream, offsets = streams.encode(values, typed_NK)
        expected = bytes.fromhex(examples["stream", values])
        assert stream.tobytes() == expected.ljust(128, b"\0")
        assert offsets.tolist() == [0] + [len(expected)] * 7
    dense = panels.to_panels("i4", as_type["i4"])
    assert dense.tobytes() == bytes.fromhex(examples["dense", "i4"]).ljust(64, b"\0")
    stream, offsets = blocks.encode(as_type["i8"])
    expected = bytes.fromhex(examples["stream", "blocks"])
    assert stream.tobytes() == expected.ljust(256, b"\0") and offsets[1] == len(expected)


def test_the_numbers_beside_the_examples() -> None:
    q_NK = np.array([[1, 0, 0, 0, 2, 0], [0, 0, -3, 0, 0, 0], [0, 4, 0, 0, 0, -5]], np.int8)
    int8 = re.search(r"offsets are `([\d ]+)` and the sums `([-\d ]+)`", TEXT)
    int4 = re.search(r"multipliers `([\d ]+)`.*the sums are `([-\d ]+)`", TEXT, re.DOTALL)
    assert int8 is not None and int4 is not None
    assert streams.encode("i8", q_NK)[1].tolist() == numbers(int8[1])
    assert q_NK.sum(axis=1).tolist() == numbers(int8[2])
    multiplier_NG = np.array([numbers(int4[1])], np.uint8).T
    assert panels.to_multipliers(multiplier_NG).tolist() == [*numbers(int4[1]), *[0] * 61]
    assert panels.multiply_groups(q_NK, multiplier_NG).sum(axis=1).tolist() == numbers(int4[2])


def damaged_streams(values: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every kind of inconsistency between masks, values, offsets and slack of a 40 x 70 matrix."""
    stream, offsets = streams.encode(values, random_matrix(values, (40, 70), 0.7, 6))
    width, first = {"f32": 2, "bf16": 4, "i8": 8, "i4": 8}[values], DTYPES[values].itemsize
    cases = {}

    def case(name: str, where: int | slice, value: int, of_offsets: bool = False) -> None:
        pair = (stream.copy(), offsets.copy())
        pair[of_offsets][where] = value
        cases[name] = pair

    case("all masks full", slice(0, 16 * width), 255)
    case("a zero value", slice(16 * width, 16 * width + first), 0)
    case("slack not zero", stream.size - 1, 1)
    case("first offset", 0, 8, True)
    case("falling offsets", 2, 1, True)
    case("offset beyond the stream", 2, 2**63, True)
    case("huge end", -1, 2**64 - 1, True)
    case("end not repeated", -1, int(offsets[-1]) + 1, True)
    case("panel boundary moved", 1, int(offsets[1]) + 1, True)
    cases["too few offsets"] = (stream, offsets[:-1])
    cases["no slack"] = (stream[: int(offsets[-1])], offsets)
    cases["too much slack"] = (np.pad(stream, (0, 64)), offsets)
    cases["empty stream"] = (stream[:0], offsets)
    cases["a row too many"] = (with_row_40(stream, int(offsets[2]), width), offsets)
    if values in ("f32", "bf16"):
        case("a value of -0.0", slice(16 * width, 16 * width + first), 0)
        cases["a value of -0.0"][0][16 * width + first - 1] = 0x80
    if values == "i4":
        cases["a filler nibble"] = (with_filler(stream), offsets)
    return cases


def with_row_40(stream: np.ndarray, panel: int, width: int) -> np.ndarray:
    """The first weight under the panel's first mask moved to row 40 of 40, the same number of weights."""
    moved = stream.copy()
    mask = int.from_bytes(moved[panel : panel + width].tobytes(), "little")
    assert mask
    mask = mask & (mask - 1) | 1 << 4 * width
    moved[panel : panel + width] = np.frombuffer(mask.to_bytes(width, "little"), np.uint8)
    return moved


def with_filler(stream: np.ndarray) -> np.ndarray:
    """A nibble set beyond the end of the shorter vector of the first pair that has one."""
    filled, position = stream.copy(), 16 * 8
    counts = np.bitwise_count(stream[:128]).reshape(8, 2, 8).sum(axis=2)
    for low, high in counts:
        position += int(max(low, high))
        if low != high:
            filled[position - 1] |= 0x10 if high < low else 0x01
            return filled
    raise AssertionError("every pair has two vectors of one length")


@pytest.mark.parametrize(
    ("values", "name"), [(values, name) for values in VALUES for name in damaged_streams(values)]
)
def test_damaged_streams_are_refused(values: str, name: str) -> None:
    stream, offsets = damaged_streams(values)[name]
    with pytest.raises(FormatError, match=r"model\.goss: q_proj"):
        streams.decode(values, stream, offsets, 40, 70, "model.goss: q_proj")


@every_type
def test_flipped_bytes_of_a_stream_are_refused_or_keep_what_was_counted(values: str) -> None:
    """What passes is a matrix that would be written as just these bytes: nothing is read in two ways."""
    w_NK = random_matrix(values, (40, 70), 0.7, 7)
    stream, offsets = streams.encode(values, w_NK)
    rng, refused = np.random.default_rng(8), 0
    for _ in range(400):
        flipped = stream.copy()
        flipped[rng.integers(stream.size)] ^= np.uint8(rng.integers(1, 256))
        try:
            decoded = streams.decode(values, flipped, offsets, 40, 70)
        except FormatError:
            refused += 1
            continue
        again, _ = streams.encode(values, decoded)
        assert np.array_equal(again, flipped)
    assert refused > 50
