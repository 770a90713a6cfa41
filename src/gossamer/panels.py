"""How a weight matrix lies in a .goss file: panels of 16 rows, dense or sparse (docs/format.md, section 3).

A vector is 64 bytes = 16 rows x I consecutive inputs of one panel, in the order [row][input], where I is 1
for float32, 2 for bfloat16 and 4 for int8 (the order in which an AMX tile and `vpdpbusd` want it). Rows and
inputs are padded with zeros to whole vectors. Dense panels: all vectors of all panels, one after the other.

A sparse int8 panel is a run of groups. A group is the 64-bit masks of up to 16 vectors (bit 4 * row + input,
little endian) and then, at once, the nonzero bytes of those vectors in order:

    m0 m1 ... m15 | values of vector 0, 1, ... 15 | m16 m17 ... | values ...

Nothing in it is padded; 64 bytes of zeros after the last panel let a kernel read a whole vector anywhere.
This file is the specification that the C++ is tested against: NumPy, no loop over weights.

Shapes: N outputs, K inputs, P panels, V vectors of a panel, I inputs of a vector.
"""

from collections.abc import Iterator

import numpy as np

from gossamer.errors import FormatError

PANEL_ROWS = 16
VECTOR_BYTES = 64
GROUP_VECTORS = 16
MASK_BYTES = 8
SLACK_BYTES = 64
ALIGNMENT = 64
INPUTS_PER_VECTOR = {"f32": 1, "bf16": 2, "i8": 4}

_GROUP_MASK_BYTES = GROUP_VECTORS * MASK_BYTES
_GROUP_BYTES = _GROUP_MASK_BYTES + GROUP_VECTORS * VECTOR_BYTES
_CHUNK_WEIGHTS = 1 << 23


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def panel_shape(values: str, rows: int, columns: int) -> tuple[int, int, int, int]:
    """[P, V, 16, I] of a rows x columns matrix of `values` ("f32", "bf16" or "i8")."""
    inputs = INPUTS_PER_VECTOR[values]
    return -(-rows // PANEL_ROWS), -(-columns // inputs), PANEL_ROWS, inputs


def dense_bytes(values: str, rows: int, columns: int) -> int:
    """Bytes of the dense panels of a matrix."""
    panels, vectors, _, _ = panel_shape(values, rows, columns)
    return panels * vectors * VECTOR_BYTES


def stream_bytes(rows: int, columns: int, nonzeros: int) -> int:
    """Bytes of the sparse int8 stream of a matrix: a mask a vector, a byte a nonzero weight, the slack."""
    panels, vectors, _, _ = panel_shape("i8", rows, columns)
    return round_up(panels * vectors * MASK_BYTES + nonzeros + SLACK_BYTES, ALIGNMENT)


def num_offsets(rows: int) -> int:
    """Entries of the offsets tensor: one a panel and the end, padded to 64 bytes."""
    return round_up(-(-rows // PANEL_ROWS) + 1, ALIGNMENT // 8)


def to_panels(w_NK: np.ndarray) -> np.ndarray:
    """Dense panels [P, V, 16, I] of float32, bfloat16 bit patterns (uint16) or int8 weights [N, K]."""
    rows, columns = w_NK.shape
    inputs = 4 // w_NK.dtype.itemsize
    padded = np.zeros((round_up(rows, PANEL_ROWS), round_up(columns, inputs)), w_NK.dtype)
    padded[:rows, :columns] = w_NK
    panels_P16VI = padded.reshape(-1, PANEL_ROWS, padded.shape[1] // inputs, inputs)
    return np.ascontiguousarray(panels_P16VI.transpose(0, 2, 1, 3))


def from_panels(panels: np.ndarray, rows: int, columns: int, source: str = "panels") -> np.ndarray:
    """Weights [N, K] of dense panels [P, V, 16, I]; FormatError when the padding is not zero."""
    panels_P16VI = panels.transpose(0, 2, 1, 3)
    padded = panels_P16VI.reshape(panels.shape[0] * PANEL_ROWS, -1)
    if padded[rows:].any() or padded[:, columns:].any():
        raise FormatError(f"{source}: found weights outside its {rows} x {columns} matrix; expected zeros")
    return np.ascontiguousarray(padded[:rows, :columns])


def panel_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges [begin, end) of whole panels, a few million weights each: the unit of all work below."""
    step = max(1, _CHUNK_WEIGHTS // (PANEL_ROWS * max(columns, 1))) * PANEL_ROWS
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def encode_panels(q_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8, no slack) of the sparse int8 panels of q_NK, and the byte length of each panel [P]."""
    dense = to_panels(q_NK).view(np.uint8)
    panels, vectors = dense.shape[:2]
    groups = -(-vectors // GROUP_VECTORS)
    values = np.zeros((panels, groups * GROUP_VECTORS, VECTOR_BYTES), np.uint8)
    values[:, :vectors] = dense.reshape(panels, vectors, VECTOR_BYTES)
    nonzero = values != 0
    masks = np.packbits(nonzero, axis=2, bitorder="little")
    items = np.empty((panels, groups, _GROUP_BYTES), np.uint8)  # every mask and value, kept or not, in order
    items[..., :_GROUP_MASK_BYTES] = masks.reshape(panels, groups, -1)
    items[..., _GROUP_MASK_BYTES:] = values.reshape(panels, groups, -1)
    kept = _kept(nonzero.reshape(panels, groups, -1), vectors)
    return items[kept], np.count_nonzero(kept.reshape(panels, -1), axis=1)


def _kept(nonzero: np.ndarray, vectors: int) -> np.ndarray:
    """Which bytes of all groups [P, groups, 128 + 1024] the stream has: masks of vectors, nonzeros."""
    panels, groups, _ = nonzero.shape
    real = np.repeat(np.arange(groups * GROUP_VECTORS) < vectors, MASK_BYTES).reshape(groups, -1)
    kept = np.empty((panels, groups, _GROUP_BYTES), np.bool_)
    kept[..., :_GROUP_MASK_BYTES] = real
    kept[..., _GROUP_MASK_BYTES:] = nonzero
    return kept


def encode_sparse_i8(q_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stream (uint8, with its slack) and the panel offsets (uint64, padded) of int8 weights [N, K]."""
    rows, columns = q_NK.shape
    chunks = [encode_panels(q_NK[begin:end]) for begin, end in panel_chunks(rows, columns)]
    values = np.concatenate([stream for stream, _ in chunks])
    stream = np.zeros(round_up(values.size + SLACK_BYTES, ALIGNMENT), np.uint8)
    stream[: values.size] = values
    return stream, panel_offsets(np.concatenate([lengths for _, lengths in chunks]))


def panel_offsets(lengths_P: np.ndarray) -> np.ndarray:
    """uint64 offsets of the panels and of the end, the end repeated up to a multiple of 8 entries."""
    ends = np.cumsum(lengths_P, dtype=np.uint64)
    offsets = np.full(num_offsets(lengths_P.size * PANEL_ROWS), ends[-1], np.uint64)
    offsets[0], offsets[1 : ends.size + 1] = 0, ends
    return offsets


def decode_sparse_i8(
    stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int, source: str = "stream"
) -> np.ndarray:
    """int8 weights [N, K] of a stream and its offsets; FormatError when anything in them is inconsistent."""
    _check_offsets(stream, offsets, rows, source)
    q_NK = np.empty((rows, columns), np.int8)
    for begin, end in panel_chunks(rows, columns):
        first, last = begin // PANEL_ROWS, -(-end // PANEL_ROWS)
        bounds = offsets[first : last + 1].astype(np.int64)
        part = stream[bounds[0] : bounds[-1]]
        where = f"{source}, rows {begin} to {end}"
        q_NK[begin:end] = _decode_panels(part, bounds - bounds[0], end - begin, columns, where)
    return q_NK


def _check_offsets(stream: np.ndarray, offsets: np.ndarray, rows: int, source: str) -> None:
    panels = -(-rows // PANEL_ROWS)
    if offsets.shape != (num_offsets(rows),):
        raise FormatError(f"{source}: found {offsets.shape} offsets; expected ({num_offsets(rows)},)")
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any() or (offsets[panels:] != offsets[panels]).any():
        raise FormatError(
            f"{source}: found panel offsets that do not start at 0, fall, or do not repeat the end"
        )
    end = int(offsets[panels])
    if end + SLACK_BYTES > stream.size or stream[end:].any():
        raise FormatError(
            f"{source}: the panels end at byte {end} of {stream.size}; expected {SLACK_BYTES} zeros after"
        )


def _decode_panels(
    stream: np.ndarray, bounds: np.ndarray, rows: int, columns: int, source: str
) -> np.ndarray:
    """int8 weights of the panels that lie in `stream` at byte offsets bounds [P + 1]."""
    panels, vectors, _, inputs = panel_shape("i8", rows, columns)
    masks = _walk(stream, bounds, vectors, source)
    nonzero = np.unpackbits(masks, axis=2, bitorder="little").view(np.bool_)
    items = np.zeros((*masks.shape[:2], _GROUP_BYTES), np.uint8)
    items[_kept(nonzero, vectors)] = stream
    values = items[..., _GROUP_MASK_BYTES:]
    if ((values != 0) != nonzero).any():
        raise FormatError(f"{source}: a mask announces a weight whose value is 0; the file is damaged")
    dense = values.reshape(panels, -1, VECTOR_BYTES)[:, :vectors].reshape(panels, vectors, PANEL_ROWS, inputs)
    return from_panels(dense.view(np.int8), rows, columns, source)


def _walk(stream: np.ndarray, bounds: np.ndarray, vectors: int, source: str) -> np.ndarray:
    """The masks [P, groups, 128] of all panels: each group's population says where the next group begins."""
    position, ends = bounds[:-1].copy(), bounds[1:]
    groups = -(-vectors // GROUP_VECTORS)
    masks = np.zeros((position.size, groups, _GROUP_MASK_BYTES), np.uint8)
    for group in range(groups):
        num_bytes = min(GROUP_VECTORS, vectors - group * GROUP_VECTORS) * MASK_BYTES
        if (position + num_bytes > ends).any():
            raise FormatError(f"{source}: the masks of group {group} lie outside their panel")
        found = stream[position[:, None] + np.arange(num_bytes)]
        masks[:, group, :num_bytes] = found
        position += num_bytes + np.bitwise_count(found).sum(axis=1, dtype=np.int64)
    if (position != ends).any():
        panel = int(np.flatnonzero(position != ends)[0])
        raise FormatError(
            f"{source}: panel {panel} holds {int(ends[panel] - bounds[panel])} bytes; "
            f"its masks announce {int(position[panel] - bounds[panel])}"
        )
    return masks
