"""Matrices survive the panel layouts bit for bit, and a reader written from docs/format.md alone agrees."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from gossamer import panels
from gossamer.errors import FormatError

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def random_int8(rows: int, columns: int, sparsity: float, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    q_NK = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    q_NK[rng.random((rows, columns)) < sparsity] = 0
    return q_NK


def read_stream(stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Section 3 of docs/format.md, one weight at a time."""
    q_NK = np.zeros((rows, columns), np.int8)
    num_vectors = -(-columns // 4)
    for panel in range(-(-rows // 16)):
        position = int(offsets[panel])
        for group in range(0, num_vectors, 16):
            vectors = range(group, min(group + 16, num_vectors))
            masks = [
                int.from_bytes(stream[position + 8 * i :][:8].tobytes(), "little")
                for i in range(len(vectors))
            ]
            position += 8 * len(vectors)
            for vector, mask in zip(vectors, masks, strict=True):
                for bit in range(64):
                    if mask >> bit & 1:
                        q_NK[16 * panel + bit // 4, 4 * vector + bit % 4] = stream[
                            position : position + 1
                        ].view(np.int8)[0]
                        position += 1
        assert position == offsets[panel + 1]
    return q_NK


@seed(20240506)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 300), sparsity=st.sampled_from([0, 0.3, 0.7, 0.95, 1]),
    number=st.integers(0, 2**32),
)  # fmt: skip
def test_sparse_round_trip(rows: int, columns: int, sparsity: float, number: int) -> None:
    q_NK = random_int8(rows, columns, sparsity, number)
    stream, offsets = panels.encode_sparse_i8(q_NK)
    assert np.array_equal(panels.decode_sparse_i8(stream, offsets, rows, columns), q_NK)
    assert stream.size == panels.stream_bytes(rows, columns, int(np.count_nonzero(q_NK)))
    assert offsets.shape == (panels.num_offsets(rows),) and offsets.nbytes % 64 == 0


@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"), [(1, 1, 0), (16, 64, 0.5), (17, 65, 0.7), (40, 131, 0.9)]
)
def test_a_reader_written_from_the_document_agrees(rows: int, columns: int, sparsity: float) -> None:
    q_NK = random_int8(rows, columns, sparsity, rows)
    assert np.array_equal(read_stream(*panels.encode_sparse_i8(q_NK), rows, columns), q_NK)


def test_rows_and_panels_of_zeros_take_only_masks() -> None:
    q_NK = random_int8(50, 77, 0.5, 1)
    q_NK[16:32] = 0
    q_NK[40] = 0
    stream, offsets = panels.encode_sparse_i8(q_NK)
    assert offsets[2] - offsets[1] == 20 * 8
    assert np.array_equal(read_stream(stream, offsets, 50, 77), q_NK)


def test_chunks_of_a_large_matrix_join(monkeypatch: pytest.MonkeyPatch) -> None:
    q_NK = random_int8(150, 100, 0.6, 2)
    whole = panels.encode_sparse_i8(q_NK)
    monkeypatch.setattr(panels, "_CHUNK_WEIGHTS", 16 * 100 * 2)
    assert len(list(panels.panel_chunks(150, 100))) == 5
    for pieced, expected in zip(panels.encode_sparse_i8(q_NK), whole, strict=True):
        assert np.array_equal(pieced, expected)
    assert np.array_equal(panels.decode_sparse_i8(*whole, 150, 100), q_NK)


@pytest.mark.parametrize(("dtype", "inputs"), [(np.float32, 1), (np.uint16, 2), (np.int8, 4)])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (33, 7), (35, 50)])
def test_dense_panels(dtype: type, inputs: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    w_NK = rng.integers(1, 100, shape).astype(dtype)
    stored = panels.to_panels(w_NK)
    name = {1: "f32", 2: "bf16", 4: "i8"}[inputs]
    assert stored.shape == panels.panel_shape(name, *shape) and stored[0, 0].nbytes == 64
    for n, k in np.ndindex(shape):
        assert stored[n // 16, k // inputs, n % 16, k % inputs] == w_NK[n, k]
    assert np.count_nonzero(stored) == w_NK.size
    assert np.array_equal(panels.from_panels(stored, *shape), w_NK)


def test_dense_panels_with_a_weight_in_the_padding_are_refused() -> None:
    stored = panels.to_panels(np.ones((3, 5), np.float32))
    stored[0, 4, 3, 0] = 1
    with pytest.raises(FormatError, match="outside its 3 x 5 matrix"):
        panels.from_panels(stored, 3, 5)


@pytest.mark.parametrize(("sparsity", "bits"), [(0.5, 5.0), (0.7, 3.4), (0.8, 2.6), (0.9, 1.8)])
def test_bits_per_weight_are_those_promised(sparsity: float, bits: float) -> None:
    q_NK = random_int8(512, 4096, 0, 4)
    q_NK[q_NK == 0] = 1
    q_NK.reshape(-1)[np.random.default_rng(5).permutation(q_NK.size)[: round(sparsity * q_NK.size)]] = 0
    stream, offsets = panels.encode_sparse_i8(q_NK)
    assert 8 * (stream.nbytes + offsets.nbytes) / q_NK.size == pytest.approx(bits, abs=0.01)


def test_the_example_of_the_document() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(matrix|stream)\n(.*?)```", text, re.DOTALL))
    q_NK = np.array([line.split() for line in blocks["matrix"].strip().splitlines()]).astype(np.int8)
    stream, offsets = panels.encode_sparse_i8(q_NK)
    expected = bytes.fromhex(blocks["stream"])
    assert stream.tobytes() == expected.ljust(128, b"\0")
    said = re.search(r"offsets are `([\d ]+)` and the sums `([-\d ]+)`", text)
    assert said is not None
    assert offsets.tolist() == [int(number) for number in said[1].split()]
    assert q_NK.sum(axis=1).tolist() == [int(number) for number in said[2].split()]


def damaged_streams() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every kind of inconsistency between masks, values, offsets and slack of a 40 x 70 matrix."""
    stream, offsets = panels.encode_sparse_i8(random_int8(40, 70, 0.7, 6))
    cases = {}

    def case(name: str, where: int, value: int, of_offsets: bool = False) -> None:
        pair = (stream.copy(), offsets.copy())
        pair[of_offsets][where] = value
        cases[name] = pair

    free = next(bit for bit in range(8) if not stream[0] >> bit & 1)
    case("a mask bit more", 0, int(stream[0]) | 1 << free)
    case("all masks full", 0, 255)
    case("a zero value", 16 * 8, 0)
    case("slack not zero", stream.size - 1, 1)
    case("first offset", 0, 8, True)
    case("falling offsets", 2, 1, True)
    case("offset beyond the stream", 2, 2**63, True)
    case("huge end", -1, 2**64 - 1, True)
    case("end not repeated", -1, int(offsets[-1]) + 1, True)
    case("panel boundary moved", 1, int(offsets[1]) + 1, True)
    cases["too few offsets"] = (stream, offsets[:-1])
    cases["no slack"] = (stream[: int(offsets[-1])], offsets)
    cases["empty stream"] = (stream[:0], offsets)
    last_panel = int(offsets[2])
    moved = stream.copy()  # row 40 of 40: bit 32 of a mask in the last panel, in place of a bit that was set
    mask = int.from_bytes(moved[last_panel : last_panel + 8].tobytes(), "little")
    mask = mask & (mask - 1) | 1 << 32
    moved[last_panel : last_panel + 8] = np.frombuffer(mask.to_bytes(8, "little"), np.uint8)
    cases["a row too many"] = (moved, offsets)
    return cases


@pytest.mark.parametrize("name", damaged_streams())
def test_damaged_streams_are_refused(name: str) -> None:
    stream, offsets = damaged_streams()[name]
    with pytest.raises(FormatError, match=r"model\.goss: q_proj"):
        panels.decode_sparse_i8(stream, offsets, 40, 70, "model.goss: q_proj")


def test_flipped_bytes_of_a_stream_are_refused_or_change_one_value() -> None:
    q_NK = random_int8(40, 70, 0.7, 7)
    stream, offsets = panels.encode_sparse_i8(q_NK)
    rng = np.random.default_rng(8)
    refused = 0
    for _ in range(400):
        flipped = stream.copy()
        flipped[rng.integers(stream.size)] ^= np.uint8(rng.integers(1, 256))
        try:
            decoded = panels.decode_sparse_i8(flipped, offsets, 40, 70)
        except FormatError:
            refused += 1
            continue
        changed = np.count_nonzero(decoded != q_NK)
        assert changed == 1 or np.count_nonzero(decoded) == np.count_nonzero(q_NK)
    assert refused > 100
