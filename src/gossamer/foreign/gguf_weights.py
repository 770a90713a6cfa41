"""The weights of a GGUF file, in the rows and type of a Hugging Face directory, a few rows at a time."""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gossamer.architecture.anatomy import Anatomy
from gossamer.checkpoint.weights import is_finite
from gossamer.errors import CheckpointError
from gossamer.foreign.gguf_file import Tensor, to_float32
from gossamer.foreign.gguf_model import GgufModel

_PIECE_WEIGHTS = 1 << 18  # decoded at a time, so that intermediate arrays stay in a core's cache


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor in storage form; their zeros as bits (as `hash_mask` packs them) and counted."""

    name: str
    values: np.ndarray
    zeros: bytes
    num_zeros: int


class GgufWeights:
    """Decodes tensors to `dtype` (F32, F16 or BF16), on all cores, and yields the pieces in order."""

    def __init__(self, model: GgufModel, anatomy: Anatomy, dtype: str) -> None:
        self.file, self.dtype = model.file, dtype
        self.sources = model.sources(anatomy)
        self._orders = {name: model.row_order(name, anatomy) for name in self.sources}
        self._head_dim = anatomy.attention.head_dim

    def pieces(self, names: Iterable[str]) -> Iterator[Piece]:
        """All rows of these tensors; CheckpointError where a value is not a finite number of the type."""
        num_threads = os.cpu_count() or 1
        with ThreadPoolExecutor(num_threads) as pool:
            pending: deque[Future[Piece]] = deque()
            for name, start, stop in self._ranges(names):
                pending.append(pool.submit(self._decode, name, start, stop))
                if len(pending) > 2 * num_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _ranges(self, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
        """Rows by whole heads where they change places, and by eights, so that zeros fill whole bytes."""
        for name in names:
            tensor = self.sources[name]
            unit = 8 if self._orders[name] is None else math.lcm(8, self._head_dim)
            step = unit * max(1, _PIECE_WEIGHTS // (unit * tensor.shape[-1]))
            for start in range(0, tensor.num_rows, step):
                yield name, start, min(start + step, tensor.num_rows)

    def _decode(self, name: str, start: int, stop: int) -> Piece:
        tensor, order = self.sources[name], self._orders[name]
        values = to_float32(self.file.rows(tensor, start, stop), tensor.type)
        if order is not None:
            values = values[:, order] if len(tensor.shape) == 1 else values[order[start:stop] - start]
        stored = _stored(values, self.dtype)
        if not is_finite(stored, self.dtype):
            raise self._not_finite(tensor, values)
        zeros = (stored & 0x7FFF) == 0 if self.dtype == "BF16" else stored == 0
        return Piece(name, stored, np.packbits(zeros).tobytes(), int(np.count_nonzero(zeros)))

    def _not_finite(self, tensor: Tensor, values: np.ndarray) -> CheckpointError:
        if np.isfinite(values).all():
            return CheckpointError(
                f"{self.file.path}: tensor {tensor.name} has values beyond {self.dtype}, such as "
                f"{np.abs(values).max():g}; expected --dtype f32"
            )
        return CheckpointError(
            f"{self.file.path}: tensor {tensor.name} holds NaN or infinite values; the weights are damaged"
        )


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> storage form, rounded to nearest, ties to even."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
