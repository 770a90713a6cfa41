"""Safetensors files written piece by piece: a model of any size passes through a few megabytes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.checkpoint.weights import STORAGE


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: safetensors' word for its type, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * STORAGE[self.dtype].itemsize


def plan(tensors: Mapping[str, Planned], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order: files of about `shard_bytes`, one where all fit."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if used + tensor.num_bytes > shard_bytes and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def write_shard(file: Path, tensors: Mapping[str, Planned], pieces: Iterable[np.ndarray]) -> None:
    """Write the tensors' header, then `pieces`: arrays that are, one after the other, all of their values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            stream.write(np.ascontiguousarray(piece).data.cast("B"))
