"""How the tests take a packed file apart and put it together with something wrong in it."""

import json
from pathlib import Path
from typing import Any

from gossamer.packed.reader import Packed

Header = dict[str, Any]
Q = "model.layers.1.mlp.up_proj"  # sparse int8
I4 = "model.layers.1.mlp.down_proj"  # sparse int4


def split(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def join(path: Path, header: Header | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def set_entry(header: Header, name: str = Q, **changes: Any) -> None:
    metadata = header["__metadata__"]
    table = json.loads(metadata["layers"])
    table[name] = {**table[name], **changes}
    metadata["layers"] = json.dumps(table)


def with_bytes(source: Path, path: Path, offset: int, replaced: bytes) -> Packed:
    """A copy of a file with some of its bytes replaced."""
    content = bytearray(source.read_bytes())
    content[offset : offset + len(replaced)] = replaced
    path.write_bytes(content)
    return Packed.open(path)
