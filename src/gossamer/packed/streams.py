"""Sparse panels: a mask bit a weight, and the weights that are not zero (docs/format.md, section 3).

A panel is a run of groups. A group is the masks of up to 16 vectors (little endian; a bit is a place in the
vector, [row][input]) and then, at once, the nonzero weights of those vectors in the order of their bits:

    m0 m1 ... m15 | weights of vector 0, 1, ... 15 | m16 m17 ... | weights ...

A vector has 16 weights of f32, 32 of bf16, 64 of i8 and i4; so its mask has 2, 4 or 8 bytes. int4 vectors
2j and 2j + 1 share bytes: byte i holds the i-th nonzero weight of the first in its low nibble and of the
second in its high one, as many bytes as the longer of the two needs; a nibble past the end is 0.

Nothing is padded; 64 bytes of zeros after the last panel let a kernel read a whole vector anywhere. -0.0 is
zero. Like `panels`, this is the specification that the C++ is tested against.

Shapes: P panels, V vectors of a panel, S = ceil(V / 16) groups, L weights of a vector.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gossamer.errors import FormatError
from gossamer.packed.panels import (
    ALIGNMENT,
    VECTOR_BYTES,
    from_vectors,
    join_nibbles,
    num_vectors,
    panel_chunks,
    round_up,
    split_nibbles,
    to_vectors,
)
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS, NumberType

GROUP_VECTORS = 16
SLACK_BYTES = 64


def num_offsets(rows: int) -> int:
    """Entries of the offsets tensor: one a panel and the end, padded to 64 bytes."""
    return round_up(-(-rows // PANEL_ROWS) + 1, ALIGNMENT // 8)


def stream_bytes(values: str, rows: int, columns: int, value_bytes: int) -> int:
    """Bytes of the stream of a matrix whose nonzero weights take `value_bytes`: masks, those, the slack."""
    vectors = -(-rows // PANEL_ROWS) * num_vectors(values, columns)
    return round_up(vectors * NUMBER_TYPES[values].mask_bytes + value_bytes + SLACK_BYTES, ALIGNMENT)


def count_value_bytes(values: str, w_NK: np.ndarray) -> int:
    """Bytes that the nonzero weights of a matrix take in its stream."""
    total, kind = 0, NUMBER_TYPES[values]
    for begin, end in panel_chunks(*w_NK.shape):
        vectors = to_vectors(values, w_NK[begin:end])
        nonzero = _is_nonzero(kind, vectors.reshape(*vectors.shape[:2], -1).view(kind.word))
        total += int(_value_bytes(kind, np.count_nonzero(nonzero, axis=2)).sum())
    return total


def encode(values: str, w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stream (uint8, with its slack) and the panel offsets (uint64, padded) of weights [N, K]."""
    return joined([encode_panels(values, w_NK[begin:end]) for begin, end in panel_chunks(*w_NK.shape)])


def joined(chunks: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """A stream and its offsets of what `encode_panels` gave for the parts of a matrix."""
    packed = np.concatenate([piece for piece, _ in chunks])
    lengths_P = np.concatenate([lengths for _, lengths in chunks])
    return np.concatenate([packed, slack(packed.size)]), panel_offsets(lengths_P)


def slack(num_bytes: int) -> np.ndarray:
    """The zeros that end a stream whose panels take so many bytes."""
    return np.zeros(round_up(num_bytes + SLACK_BYTES, ALIGNMENT) - num_bytes, np.uint8)


def encode_panels(values: str, w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8, no slack) of the sparse panels of weights [N, K], and the length of each panel [P]."""
    vectors = to_vectors(values, w_NK)
    return encode_vectors(NUMBER_TYPES[values], vectors.reshape(*vectors.shape[:2], -1))


def encode_vectors(kind: NumberType, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and lengths of panels, as `encode_panels`, from their vectors [P, V, L]."""
    panels, num, weights = vectors.shape
    groups = -(-num // GROUP_VECTORS)
    words = np.zeros((panels, groups * GROUP_VECTORS, weights), kind.word)
    words[:, :num] = vectors.view(kind.word)
    words = words.reshape(panels, groups, GROUP_VECTORS, weights)
    nonzero = _is_nonzero(kind, words)
    masks = np.packbits(nonzero, axis=3, bitorder="little").reshape(panels, groups, -1)
    packed = _pair(words, nonzero) if kind.paired else words.view(np.uint8)
    items = np.concatenate([masks, packed.reshape(panels, groups, -1)], axis=2)
    kept = _kept(kind, nonzero, num)
    return items[kept], np.count_nonzero(kept.reshape(panels, -1), axis=1)


def panel_offsets(lengths_P: np.ndarray) -> np.ndarray:
    """uint64 offsets of the panels and of the end, the end repeated up to a multiple of 8 entries."""
    ends = np.cumsum(lengths_P, dtype=np.uint64)
    offsets = np.full(num_offsets(lengths_P.size * PANEL_ROWS), ends[-1], np.uint64)
    offsets[0], offsets[1 : ends.size + 1] = 0, ends
    return offsets


def _is_nonzero(kind: NumberType, words: np.ndarray) -> np.ndarray:
    return words & kind.word.type(kind.magnitude) != 0


def _value_bytes(kind: NumberType, counts: np.ndarray) -> np.ndarray:
    """Bytes [...] of the weights of vectors that have `counts` [..., vectors] nonzero ones."""
    if not kind.paired:
        return counts.sum(axis=-1, dtype=np.int64) * kind.dtype.itemsize
    odd = [(0, 0)] * (counts.ndim - 1) + [(0, counts.shape[-1] % 2)]
    pairs = np.pad(counts, odd).reshape(*counts.shape[:-1], -1, 2)
    return pairs.max(axis=-1).sum(axis=-1, dtype=np.int64)


def _kept(kind: NumberType, nonzero: np.ndarray, num: int) -> np.ndarray:
    """Which bytes of whole groups [P, S, masks then weights] the stream has; `nonzero` is [P, S, 16, L]."""
    panels, groups = nonzero.shape[:2]
    real = np.repeat(np.arange(groups * GROUP_VECTORS) < num, kind.mask_bytes).reshape(1, groups, -1)
    if kind.paired:
        lengths = _num_first(nonzero).reshape(panels, groups, GROUP_VECTORS // 2, 2).max(axis=3)
        packed = np.arange(VECTOR_BYTES) < lengths[..., None]
    else:
        packed = np.repeat(nonzero, kind.dtype.itemsize, axis=3)
    masks = np.broadcast_to(real, (panels, *real.shape[1:]))
    return np.concatenate([masks, packed.reshape(panels, groups, -1)], axis=2)


def _num_first(nonzero: np.ndarray) -> np.ndarray:
    return np.count_nonzero(nonzero, axis=3)


def _first(nonzero: np.ndarray) -> np.ndarray:
    """Of each vector as many positions, from the first, as it has nonzero weights."""
    return np.arange(nonzero.shape[3]) < _num_first(nonzero)[..., None]


def _pair(words: np.ndarray, nonzero: np.ndarray) -> np.ndarray:
    """Bytes [P, S, 8, 64] of int4 vectors [P, S, 16, 64]: the nonzero weights of two, moved to the front."""
    packed = np.zeros_like(words)
    packed[_first(nonzero)] = words[nonzero]
    return join_nibbles(packed[:, :, ::2], packed[:, :, 1::2])


def decode(
    values: str, stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int, source: str = "stream"
) -> np.ndarray:
    """Weights [N, K] of a stream and its offsets; FormatError when anything in them is inconsistent."""
    kind, num = NUMBER_TYPES[values], num_vectors(values, columns)

    def weights(words: np.ndarray, num_rows: int, where: str) -> np.ndarray:
        vectors = words.view(kind.dtype).reshape(len(words), num, PANEL_ROWS, kind.inputs_per_vector)
        return from_vectors(vectors, num_rows, columns, where)

    return decode_by(weights, kind, num, stream, offsets, rows, columns, source)


def split(
    values: str, stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int, source: str = "stream"
) -> tuple[np.ndarray, np.ndarray]:
    """The masks (uint8 [P, V, mask bytes]) and the weights' bytes (uint8, panel after panel) of a stream."""
    kind, num, panels = NUMBER_TYPES[values], num_vectors(values, columns), -(-rows // PANEL_ROWS)
    _check_offsets(stream, offsets, rows, source)
    bounds = offsets[: panels + 1].astype(np.int64)
    packed = stream[: bounds[-1]]
    masks = _walk(kind, packed, bounds, num, source).reshape(panels, -1, GROUP_VECTORS, kind.mask_bytes)
    counts = np.bitwise_count(masks).sum(axis=3, dtype=np.int64)
    lengths = np.empty((*counts.shape[:2], 2), np.int64)  # of each group its masks and its weights
    lengths[..., 0] = kind.mask_bytes * np.diff(
        np.minimum(np.arange(counts.shape[1] + 1) * GROUP_VECTORS, num)
    )
    lengths[..., 1] = _value_bytes(kind, counts)
    is_weight = np.repeat(np.arange(lengths.size) % 2 == 1, lengths.ravel())
    return masks.reshape(panels, -1, kind.mask_bytes)[:, :num], packed[is_weight]


def decode_by(
    weights: Callable[[np.ndarray, int, str], np.ndarray],
    kind: NumberType,
    num: int,
    stream: np.ndarray,
    offsets: np.ndarray,
    rows: int,
    columns: int,
    source: str,
) -> np.ndarray:
    """Weights [N, K] of a stream whose panels have `num` vectors of `kind`.

    weights(words [P, num, L], rows, where) makes those of some panels of their vectors.
    """
    _check_offsets(stream, offsets, rows, source)
    parts = []
    for begin, end in panel_chunks(rows, columns):
        first, last = begin // PANEL_ROWS, -(-end // PANEL_ROWS)
        bounds = offsets[first : last + 1].astype(np.int64)
        part = stream[bounds[0] : bounds[-1]]
        where = f"{source}, rows {begin} to {end}"
        words = _decode_vectors(kind, num, part, bounds - bounds[0], where)
        parts.append(weights(words, end - begin, where))
    return np.concatenate(parts)


def _check_offsets(stream: np.ndarray, offsets: np.ndarray, rows: int, source: str) -> None:
    panels = -(-rows // PANEL_ROWS)
    if offsets.shape != (num_offsets(rows),):
        raise FormatError(f"{source}: found {offsets.shape} offsets; expected ({num_offsets(rows)},)")
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or (offsets[panels:] != offsets[panels]).any():
        raise FormatError(
            f"{source}: found panel offsets that do not start at 0, fall, or do not repeat the end"
        )
    end = int(offsets[panels])
    if round_up(end + SLACK_BYTES, ALIGNMENT) != stream.size or stream[end:].any():
        raise FormatError(
            f"{source}: the panels end at byte {end} of {stream.size}; "
            f"expected {SLACK_BYTES} zeros after, up to a multiple of {ALIGNMENT}"
        )


def _decode_vectors(
    kind: NumberType, num: int, stream: np.ndarray, bounds: np.ndarray, source: str
) -> np.ndarray:
    """Vectors [P, num, L] of the panels that lie in `stream` at byte offsets bounds [P + 1]."""
    masks = _walk(kind, stream, bounds, num, source)
    panels, groups, group_mask_bytes = masks.shape
    bits = np.unpackbits(masks, axis=2, bitorder="little").view(np.bool_)
    nonzero = bits.reshape(panels, groups, GROUP_VECTORS, kind.vector_weights)
    kept = _kept(kind, nonzero, num)
    items = np.zeros(kept.shape, np.uint8)
    items[kept] = stream
    packed = np.ascontiguousarray(items[..., group_mask_bytes:])
    words = _unpair(packed, nonzero, source) if kind.paired else packed.view(kind.word)
    words = words.reshape(nonzero.shape)
    if (_is_nonzero(kind, words) != nonzero).any():
        raise FormatError(f"{source}: a mask announces a weight whose value is 0; the file is damaged")
    return np.ascontiguousarray(words.reshape(panels, -1, kind.vector_weights)[:, :num])


def _unpair(packed: np.ndarray, nonzero: np.ndarray, source: str) -> np.ndarray:
    """int4 vectors [P, S, 16, 64] of the bytes of pairs, each weight at the place of its mask bit."""
    low, high = split_nibbles(packed.reshape(*nonzero.shape[:2], GROUP_VECTORS // 2, VECTOR_BYTES))
    front = np.stack([low, high], axis=3).reshape(nonzero.shape)
    first = _first(nonzero)
    if front[~first].any():
        raise FormatError(f"{source}: a nibble past the end of its vector is not 0; the file is damaged")
    words = np.zeros(nonzero.shape, np.uint8)
    words[nonzero] = front[first].view(np.uint8)
    return words


def _walk(kind: NumberType, stream: np.ndarray, bounds: np.ndarray, num: int, source: str) -> np.ndarray:
    """The masks [P, S, bytes] of all panels: each group's masks say where the next group begins."""
    position, ends, width = bounds[:-1].copy(), bounds[1:], kind.mask_bytes
    masks = np.zeros((position.size, -(-num // GROUP_VECTORS), GROUP_VECTORS * width), np.uint8)
    for group in range(masks.shape[1]):
        num_bytes = min(GROUP_VECTORS, num - group * GROUP_VECTORS) * width
        if (position + num_bytes > ends).any():
            raise FormatError(f"{source}: the masks of group {group} lie outside their panel")
        found = stream[position[:, None] + np.arange(num_bytes)]
        masks[:, group, :num_bytes] = found
        counts = np.bitwise_count(found).reshape(position.size, -1, width).sum(axis=2, dtype=np.int64)
        position += num_bytes + _value_bytes(kind, counts)
    if (position != ends).any():
        panel = int(np.flatnonzero(position != ends)[0])
        raise FormatError(
            f"{source}: panel {panel} holds {int(ends[panel] - bounds[panel])} bytes; "
            f"its masks announce {int(position[panel] - bounds[panel])}"
        )
    return masks
