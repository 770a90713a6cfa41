"""Names that files of the first BERTs have for what is called otherwise since."""

import re
from typing import TYPE_CHECKING

from gossamer.checkpoint.weights import Entry

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint

_PARTS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}


def renamed(checkpoint: "Checkpoint") -> dict[str, Entry]:
    """The tensors by today's names, as transformers renames them; one that has both names stays as it is."""
    names = {name: re.sub(r"\.LayerNorm\.(gamma|beta)$", _today, name) for name in checkpoint.entries}
    found = checkpoint.entries
    return {new if new not in found else old: found[old] for old, new in names.items()}


def _today(found: re.Match[str]) -> str:
    return _PARTS[found[0]]
