"""The weights of a GGUF file, in the rows and type of a Hugging Face directory."""

import math
from collections.abc import Iterable, Iterator
from functools import partial

from gossamer.architecture.anatomy import Anatomy
from gossamer.foreign.gguf_file import to_float32
from gossamer.foreign.gguf_model import GgufModel
from gossamer.foreign.pieces import PIECE_WEIGHTS, Piece, decoded, make_piece


class GgufWeights:
    """Decodes tensors to `dtype`; `shapes` has transformers' names."""

    def __init__(self, model: GgufModel, anatomy: Anatomy, dtype: str) -> None:
        self.file, self.dtype = model.file, dtype
        self.sources = model.sources(anatomy)
        self.shapes = {name: tensor.shape for name, tensor in self.sources.items()}
        self._orders = {name: model.row_order(name, anatomy) for name in self.sources}
        self._head_dim = anatomy.attention.head_dim

    def pieces(self, names: Iterable[str]) -> Iterator[Piece]:
        """All rows of these tensors; raises what `make_piece` does."""
        return decoded(partial(self._decode, *place) for place in self._ranges(names))

    def _ranges(self, names: Iterable[str]) -> Iterator[tuple[str, int, int]]:
        """Rows by whole heads where they change places, and by eights, so that zeros fill whole bytes."""
        for name in names:
            tensor = self.sources[name]
            unit = 8 if self._orders[name] is None else math.lcm(8, self._head_dim)
            step = unit * max(1, PIECE_WEIGHTS // (unit * tensor.shape[-1]))
            for start in range(0, tensor.num_rows, step):
                yield name, start, min(start + step, tensor.num_rows)

    def _decode(self, name: str, start: int, stop: int) -> Piece:
        tensor, order = self.sources[name], self._orders[name]
        values = to_float32(self.file.rows(tensor, start, stop), tensor.type)
        if order is not None:
            values = values[:, order] if len(tensor.shape) == 1 else values[order[start:stop] - start]
        return make_piece(name, values, self.dtype, f"{self.file.path}: tensor {tensor.name}")
