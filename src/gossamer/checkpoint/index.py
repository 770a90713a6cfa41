"""The files of a model whose weights are not all in `model.safetensors`, and the index of their tensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gossamer.architecture.config import read_json
from gossamer.errors import CheckpointError


def weight_files(directory: Path, given: str | None) -> list[Path]:
    """The files that transformers would read: those the config gives, else one file, else an index's."""
    names = [str(given)] if given else ["model.safetensors", "model.safetensors.index.json"]
    chosen = next((directory / name for name in names if (directory / name).is_file()), None)
    if chosen is None:
        from gossamer.checkpoint.diagnosis import no_weights

        raise no_weights(directory, given)
    if chosen.suffix == ".json":
        return read_index(chosen, directory)
    if chosen.parent.resolve() != directory.resolve():
        raise CheckpointError(f"{chosen}: config.json names weights outside of its directory")
    return [chosen]


def read_index(index: Path, directory: Path) -> list[Path]:
    """The files that an index names, in the order in which transformers reads them."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; the index is damaged")
    if odd := [name for name in weight_map.values() if not isinstance(name, str)]:
        raise CheckpointError(f"{index}: names {odd[0]!r} as a file; the index is damaged")
    files = [directory / name for name in sorted(set(weight_map.values()))]
    if any(file.parent.resolve() != directory.resolve() for file in files):
        raise CheckpointError(f"{index}: names a file outside of its directory")
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"{missing[0]}: shard missing (of {len(files)} that {index.name} names)")
    return files


def write_index(directory: Path, names: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index of files and the names of their tensors."""
    weight_map = {name: file for file, tensors in names.items() for name in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
