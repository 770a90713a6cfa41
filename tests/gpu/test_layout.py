"""What the GPU is given of a matrix: the weights that it was, whole, fused and cut."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import FormatError, UnsupportedError
from gossamer.gpu import layout
from gossamer.packed import streams
from gpu.emulated import int8_weights, random_int4


def random_weights(rows: int, columns: int, zeros: float = 0.7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w_NK = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    w_NK[rng.random(w_NK.shape) < zeros] = 0
    return w_NK


def operands(rows: int, columns: int, is_int4: bool, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Weights, and of INT4 multipliers."""
    if is_int4:
        return random_int4(rows, columns, 0.7, seed)
    return (random_weights(rows, columns, seed=seed),)


OF_ANY_SIZE = given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 700),
    zeros=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    seed=st.integers(0, 9),
)


@settings(deadline=None, max_examples=60)
@OF_ANY_SIZE
def test_the_weights_come_back(rows: int, columns: int, zeros: float, seed: int) -> None:
    w_NK = random_weights(rows, columns, zeros, seed)
    matrix = layout.from_weights(w_NK)
    assert np.array_equal(layout.weights(matrix), w_NK)
    assert matrix.masks.shape == (-(-rows // 16), -(-columns // 128), 32)
    assert matrix.starts[-1] == np.count_nonzero(w_NK)
    assert matrix.values.size % 16 == 0 and not matrix.values[matrix.starts[-1] :].any()


@settings(deadline=None, max_examples=60)
@OF_ANY_SIZE
def test_int4_weights_come_back_times_their_multipliers(
    rows: int, columns: int, zeros: float, seed: int
) -> None:
    q_NK, multiplier_NS = random_int4(rows, columns, zeros, seed)
    matrix = layout.from_weights(q_NK, multiplier_NS)
    assert np.array_equal(layout.weights(matrix), int8_weights(q_NK, multiplier_NS))
    assert np.array_equal(matrix.masks, layout.from_weights(q_NK).masks)
    live = np.bitwise_count(matrix.masks).reshape(-1, 2, 16).sum(axis=2)
    assert np.array_equal(np.diff(matrix.starts), live.max(axis=1))
    assert matrix.values.size % 16 == 0 and not matrix.values[matrix.starts[-1] :].any()


def test_the_halves_of_a_step_share_its_bytes() -> None:
    """Low nibbles are those of vectors 0 to 15, high ones of 16 to 31; multipliers those of g and g + 8."""
    q_NK, multiplier_NS = np.zeros((32, 256), np.int8), np.ones((32, 2), np.uint8)
    q_NK[16 + 3, 128 + 4 * 5 + 2], q_NK[16 + 9, 128 + 4 * 15], q_NK[16, 128 + 4 * 16] = 7, -8, -1
    multiplier_NS[16 + 3, 1], multiplier_NS[16 + 11, 1] = 16, 5
    matrix = layout.from_weights(q_NK, multiplier_NS)
    assert matrix.values[:2].tolist() == [0xF7, 0x08] and matrix.starts.tolist() == [0, 0, 0, 0, 2]
    assert matrix.multipliers is not None and matrix.multipliers.shape == (2, 2, 8, 2)
    assert matrix.multipliers[1, 1, 3].tolist() == [16, 5] and matrix.multipliers.sum() == 2 * 32 + 19


def test_a_vector_is_sixteen_rows_of_four_inputs() -> None:
    """Bit 4 r + i of vector v of a step is row r, input 4 v + i; weights follow in the order of bits."""
    w_NK = np.zeros((32, 256), np.int8)
    w_NK[16 + 3, 128 + 4 * 5 + 2], w_NK[16 + 9, 128 + 4 * 5], w_NK[16, 128 + 4 * 6] = 7, 8, 9
    matrix = layout.from_weights(w_NK)
    assert matrix.masks[1, 1, 5] == 1 << (4 * 3 + 2) | 1 << (4 * 9) and matrix.masks[1, 1, 6] == 1
    assert np.count_nonzero(matrix.masks) == 2
    assert matrix.values[:3].tolist() == [7, 8, 9] and matrix.starts.tolist() == [0, 0, 0, 0, 3]


def test_inputs_lie_as_lanes_take_them() -> None:
    x_TK = np.arange(11 * 300, dtype=np.int64).astype(np.int8).reshape(11, 300)
    found = layout.fragments(x_TK)
    assert found.shape == (3, 2, 4, 32, 2)
    bytes_ = found.view(np.int8).reshape(3, 2, 4, 8, 4, 2, 4)  # step, tile, product, g, t, word, byte
    for token, k in [(0, 0), (10, 299), (7, 131), (9, 77), (3, 16), (8, 255)]:
        step, product, half, t, byte = k // 128, k % 128 // 32, k % 32 // 16, k % 16 // 4, k % 4
        assert bytes_[step, token // 8, product, token % 8, t, half, byte] == x_TK[token, k]
    assert np.count_nonzero(found.view(np.int8)) == np.count_nonzero(x_TK)


@pytest.mark.parametrize("is_int4", [False, True], ids=["i8", "i4"])
def test_fused_matrices_are_one(is_int4: bool) -> None:
    """As q, k and v are: rows under rows."""
    parts = [operands(rows, 640, is_int4, seed=rows) for rows in (48, 16, 21)]
    fused = layout.concatenated([layout.from_weights(*it) for it in parts])
    whole = layout.from_weights(*map(np.concatenate, zip(*parts, strict=True)))
    assert np.array_equal(layout.weights(fused), layout.weights(whole))
    for field in dataclasses.fields(whole):
        assert np.array_equal(getattr(fused, field.name), getattr(whole, field.name))


@pytest.mark.parametrize("is_int4", [False, True], ids=["i8", "i4"])
@pytest.mark.parametrize(
    ("cut", "axis", "borders"),
    [(layout.outputs_of, 0, (0, 32, 80, 100)), (layout.inputs_of, 1, (0, 128, 512, 700))],
)
def test_shards_are_the_matrices_of_their_weights(
    cut: object, axis: int, borders: tuple[int, ...], is_int4: bool
) -> None:
    assert callable(cut)
    w_NK, *multipliers = operands(100, 700, is_int4)
    matrix = layout.from_weights(w_NK, *multipliers)
    for begin, end in pairwise(borders):
        part = np.s_[begin:end] if axis == 0 else np.s_[:, begin:end]
        of_part = np.s_[begin:end] if axis == 0 else np.s_[:, begin // 128 : -(-end // 128)]
        given = [np.ascontiguousarray(w_NK[part]), *(it[of_part] for it in multipliers)]
        shard, own = cut(matrix, begin, end), layout.from_weights(*given)
        for field in dataclasses.fields(own):
            assert np.array_equal(getattr(shard, field.name), getattr(own, field.name))


@pytest.mark.parametrize(
    ("cut", "begin", "end", "says"),
    [
        (layout.outputs_of, 8, 32, "outputs 8 to 32 of 100 .* multiples of 16"),
        (layout.outputs_of, 0, 40, "outputs 0 to 40"),
        (layout.outputs_of, 96, 128, "outputs 96 to 128"),
        (layout.inputs_of, 0, 64, "inputs 0 to 64 of 700 .* multiples of 128"),
        (layout.inputs_of, 128, 128, "inputs 128 to 128"),
    ],
)
def test_what_cuts_pieces_is_refused(cut: object, begin: int, end: int, says: str) -> None:
    assert callable(cut)
    with pytest.raises(UnsupportedError, match=says):
        cut(layout.from_weights(random_weights(100, 700)), begin, end)


@pytest.mark.parametrize("shapes", [[(16, 128), (16, 256)], [(20, 128), (16, 128)]], ids=str)
def test_what_does_not_make_one_matrix_is_refused(shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(UnsupportedError, match="do not make one"):
        layout.concatenated([layout.from_weights(random_weights(*it)) for it in shapes])


def test_seventy_percent_take_at_most_345_hundredths_of_a_bit() -> None:
    """Of a matrix of a model of 8 B weights, scales left out."""
    matrix = layout.from_weights(random_weights(1024, 4096))
    assert 8 * matrix.num_bytes / (1024 * 4096) < 3.45


@pytest.mark.parametrize(("zeros", "bits"), [(0.7, 2.33), (0.5, 3.15), (0.0, 5.09)])
def test_int4_takes_so_many_bits_a_weight(zeros: float, bits: float) -> None:
    """Its multipliers among them, 0.06: at 70% less than the 2.33 + 0.06 of a .goss file."""
    matrix = layout.from_weights(*random_int4(1024, 4096, zeros))
    assert bits - 0.05 < 8 * matrix.num_bytes / (1024 * 4096) < bits


def test_a_damaged_stream_is_refused() -> None:
    stream, offsets = streams.encode("i8", random_weights(40, 300))
    stream[0] ^= 1
    with pytest.raises(FormatError, match=r"masks of group|masks announce"):
        layout.from_stream(stream, offsets, 40, 300, "damaged")


@pytest.mark.parametrize("values", ["f32", "bf16", "i8", "i4"])
def test_streams_are_split_without_loss(values: str) -> None:
    """Masks and weights, in the order in which they lie, have all bytes of the panels between them."""
    rng = np.random.default_rng(2)
    if values in ("i8", "i4"):
        w_NK = rng.integers(-7, 8, (37, 333)).astype(np.int8)
    else:
        w_NK = rng.standard_normal((37, 333)).astype(np.float32)
        w_NK[rng.random(w_NK.shape) < 0.6] = 0
        w_NK = (w_NK.view(np.uint32) >> 16).astype(np.uint16) if values == "bf16" else w_NK
    stream, offsets = streams.encode(values, w_NK)
    masks, packed = streams.split(values, stream, offsets, *w_NK.shape)
    assert np.bitwise_count(masks).sum() == np.count_nonzero(w_NK)
    assert masks.size + packed.size == offsets[3]
    if values == "f32":
        assert np.array_equal(packed[:4].view("<f4"), w_NK[:16, 0][w_NK[:16, 0] != 0][:1])
