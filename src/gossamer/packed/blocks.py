"""Panels of blocks: int8 weights of which four neighbours of a row stay together (docs/format.md, section 3).

A block is 4 consecutive inputs of one row, what `vpdpbusd` multiplies at a time; one that has a nonzero
weight is live. A strip is 256 inputs, 64 blocks of each of a panel's 16 rows. It is a group of a sparse
stream whose vectors are rows: 16 masks, a bit a block, and then the live blocks, 4 bytes each, row by row.

    m0 m1 ... m15 | live blocks of row 0, 1, ... 15 | the next strip

So a kernel can skip what is not live, and what it reads of a row lies together. Weights of a live block may
be zero. Bits a weight: 1/4 for the mask, and 8 for each that is in a live block.

Shapes: P panels, S = ceil(K / 256) strips.
"""

from dataclasses import replace

import numpy as np

from gossamer.errors import FormatError
from gossamer.packed import streams
from gossamer.packed.panels import panel_chunks, round_up
from gossamer.packed.values import NUMBER_TYPES, PANEL_ROWS

BLOCK = 4
STRIP_INPUTS = 256
_LIVE = replace(NUMBER_TYPES["i8"], dtype=np.dtype("<u4"))  # four weights as one word of a vector


def num_strips(columns: int) -> int:
    """S: strips of a panel of a matrix with so many columns."""
    return -(-columns // STRIP_INPUTS)


def num_blocks(rows: int, columns: int) -> int:
    """Blocks of a matrix, live or not; the last of a row may have fewer than 4 inputs."""
    return rows * -(-columns // BLOCK)


def count_live(q_NK: np.ndarray) -> int:
    """Blocks of int8 weights [N, K] that have one which is not zero."""
    spans = panel_chunks(*q_NK.shape)
    return sum(int(np.count_nonzero(_words(q_NK[begin:end]))) for begin, end in spans)


def stream_bytes(rows: int, columns: int, live: int) -> int:
    """Bytes of the stream of a matrix with so many live blocks: masks, those, the slack."""
    masks = round_up(rows, PANEL_ROWS) * num_strips(columns) * _LIVE.mask_bytes
    return round_up(masks + BLOCK * live + streams.SLACK_BYTES, streams.ALIGNMENT)


def encode(q_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stream (uint8, with its slack) and the panel offsets (uint64, padded) of int8 weights [N, K]."""
    spans = panel_chunks(*q_NK.shape)
    return streams.joined([encode_panels(q_NK[begin:end]) for begin, end in spans])


def encode_panels(q_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (uint8, no slack) of the panels of int8 weights [N, K], and the length of each panel [P]."""
    return streams.encode_vectors(_LIVE, _words(q_NK))


def panels_stored_as(storage: str, values: str, w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encode_panels` of the storage that a matrix of `values` is kept in: "sparse", or "blocks"."""
    return streams.encode_panels(values, w_NK) if storage == "sparse" else encode_panels(w_NK)


def _words(q_NK: np.ndarray) -> np.ndarray:
    """The blocks, uint32 [P, 16 S, 64]: vector 16 s + r has those of row r in strip s."""
    (rows, columns), strips = q_NK.shape, num_strips(q_NK.shape[1])
    whole = np.zeros((round_up(rows, PANEL_ROWS), strips * STRIP_INPUTS), np.int8)
    whole[:rows, :columns] = q_NK
    strips_P16S = whole.reshape(-1, PANEL_ROWS, strips, STRIP_INPUTS)
    rows_PS16 = np.ascontiguousarray(strips_P16S.transpose(0, 2, 1, 3))
    return rows_PS16.reshape(len(rows_PS16), -1, STRIP_INPUTS).view(_LIVE.word)


def decode(
    stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int, source: str = "stream"
) -> np.ndarray:
    """int8 weights [N, K] of a stream and its offsets; FormatError when anything in them is inconsistent."""
    strips = num_strips(columns)

    def weights(words: np.ndarray, num_rows: int, where: str) -> np.ndarray:
        rows_PS16 = words.view(np.int8).reshape(len(words), strips, PANEL_ROWS, STRIP_INPUTS)
        whole = rows_PS16.transpose(0, 2, 1, 3).reshape(-1, strips * STRIP_INPUTS)
        if whole[num_rows:].any() or whole[:, columns:].any():
            raise FormatError(f"{where}: found weights outside its {rows} x {columns} matrix; expected zeros")
        return whole[:num_rows, :columns]

    num_vectors = strips * PANEL_ROWS
    return streams.decode_by(weights, _LIVE, num_vectors, stream, offsets, rows, columns, source)
