"""Random matrices of every value type, and readers of all storages written from docs/format.md alone."""

import numpy as np

VALUES = ("f32", "bf16", "i8", "i4")
DTYPES = {"f32": np.dtype("<f4"), "bf16": np.dtype("<u2"), "i8": np.dtype("i1"), "i4": np.dtype("i1")}
INPUTS = {"f32": 1, "bf16": 2, "i8": 4, "i4": 4}


def random_matrix(values: str, shape: tuple[int, int], sparsity: float, number: int = 0) -> np.ndarray:
    """Weights of a type (bfloat16 as uint16), all nonzero but for a random fraction `sparsity` of +0."""
    rng = np.random.default_rng(number)
    if values in ("i8", "i4"):
        limit = 128 if values == "i8" else 8
        w_NK = rng.integers(-limit, limit, shape)
        w_NK[w_NK == 0] = 1
    else:
        bits = rng.integers(1, 0x7F7F_FFFF, shape, np.uint32) | rng.integers(0, 2, shape, np.uint32) << 31
        w_NK = bits.view(np.float32) if values == "f32" else (bits | 0x10000) >> 16
    w_NK = w_NK.astype(DTYPES[values])
    w_NK[rng.random(shape) < sparsity] = 0
    return w_NK


def random_multipliers(shape: tuple[int, int], number: int = 0) -> np.ndarray:
    """uint8 [N, G], from 1 to 16."""
    size = (shape[0], -(-shape[1] // 128))
    return np.random.default_rng(number).integers(1, 17, size).astype(np.uint8)


def signed(nibble: int) -> int:
    return nibble - 16 if nibble > 7 else nibble


def read_dense(values: str, panels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Section 3, "Dense", one weight at a time."""
    w_NK = np.zeros((rows, columns), DTYPES[values])
    inputs = INPUTS[values]
    for n, k in np.ndindex(rows, columns):
        vector = k // inputs
        if values == "i4":
            byte = int(panels[n // 16, vector // 2, n % 16, k % 4])
            w_NK[n, k] = signed(byte >> 4 if vector % 2 else byte & 15)
        else:
            w_NK[n, k] = panels[n // 16, vector, n % 16, k % inputs]
    return w_NK


def read_stream(values: str, stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Section 3, "Sparse", one weight at a time."""
    w_NK = np.zeros((rows, columns), DTYPES[values])
    data, inputs, width = stream.tobytes(), INPUTS[values], DTYPES[values].itemsize
    num_vectors, mask_bytes = -(-columns // inputs), 2 * inputs
    for panel in range(-(-rows // 16)):
        position = int(offsets[panel])
        for group in range(0, num_vectors, 16):
            places = []
            for vector in range(group, min(group + 16, num_vectors)):
                mask = int.from_bytes(data[position : position + mask_bytes], "little")
                position += mask_bytes
                bits = [bit for bit in range(8 * mask_bytes) if mask >> bit & 1]
                places.append([(16 * panel + b // inputs, inputs * vector + b % inputs) for b in bits])
            if values == "i4":
                for pair in range(0, len(places), 2):
                    for half, ones in enumerate(places[pair : pair + 2]):
                        for i, place in enumerate(ones):
                            w_NK[place] = signed(data[position + i] >> 4 * half & 15)
                    position += max(map(len, places[pair : pair + 2]))
                continue
            for place in (place for ones in places for place in ones):
                w_NK[place] = np.frombuffer(data[position : position + width], DTYPES[values])[0]
                position += width
        assert position == offsets[panel + 1]
    return w_NK


def read_blocks(stream: np.ndarray, offsets: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Section 3, "Blocks", one block at a time."""
    q_NK, data = np.zeros((-(-rows // 16) * 16, -(-columns // 256) * 256), np.int8), stream.tobytes()
    for panel in range(-(-rows // 16)):
        position = int(offsets[panel])
        for strip in range(-(-columns // 256)):
            masks = [
                int.from_bytes(data[position + 8 * r : position + 8 * r + 8], "little") for r in range(16)
            ]
            position += 128
            for row, mask in enumerate(masks):
                for block in (bit for bit in range(64) if mask >> bit & 1):
                    column = 256 * strip + 4 * block
                    weights = np.frombuffer(data[position : position + 4], np.int8)
                    q_NK[16 * panel + row, column : column + 4] = weights
                    position += 4
        assert position == offsets[panel + 1]
    assert not q_NK[rows:].any() and not q_NK[:, columns:].any()
    return q_NK[:rows, :columns]
