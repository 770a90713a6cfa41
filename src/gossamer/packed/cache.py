"""Opening a model that may not be packed yet: directories are packed once, into files kept by their hash."""

import fcntl
import hashlib
import json
import time
from pathlib import Path

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import FormatError
from gossamer.job.report import Event, Progress, quiet
from gossamer.machine import cache_directory
from gossamer.packed.from_checkpoint import (
    expands_int8_fast,
    pack_checkpoint,
    packed_companions,
    prompts_skip_zeros,
)
from gossamer.packed.reader import Packed

_LAYOUT = 4  # grows when the same directory is stored otherwise than before: files in the cache are made anew


def open_packed(path: str | Path, progress: Progress = quiet, *, offline: bool = False) -> Packed:
    """Open a .goss file, or pack a checkpoint into the cache (once) and open what that made.

    Raises what `Packed.open`, `Checkpoint.open` and `pack_checkpoint` raise.
    """
    return Packed.open(path if Path(path).is_file() else cached_pack(path, progress, offline=offline))


def cached_pack(model: str | Path, progress: Progress = quiet, *, offline: bool = False) -> Path:
    """The packed file of a checkpoint (a directory, or a name on the hub), kept under its content's hash.

    Two processes that ask at once make it once. The last event tells its size and what making it took.
    """
    source = Checkpoint.open(model, offline=offline)
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    name = (source.downloaded or {}).get("repository", source.path.resolve().name).replace("/", "--")
    path = cache / f"{name}-{_content_hash(source)[:32]}.goss"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_sound(path):
            start = time.monotonic()
            pack_checkpoint(source, path, progress=progress)
            cost = {"bytes": path.stat().st_size, "seconds": round(time.monotonic() - start, 2)}
            progress(Event("cache", f"kept as {path}", 1, 1, cost))
    return path


def _is_sound(path: Path) -> bool:
    """Whether a usable file is in the cache; a damaged one counts as absent and is packed again."""
    try:
        Packed.open(path)
    except FormatError:
        return False
    return True


def _content_hash(source: Checkpoint) -> str:
    """Of what decides the packed file: the checkpoint, the small files that are copied, how we store them."""
    companions = packed_companions(source)
    small = [companions["metadata"], companions["provenance"].to_json()]
    decides = [_LAYOUT, expands_int8_fast(), companions["parent"], *small]
    if source.architecture.is_encoder and prompts_skip_zeros():
        decides.append("prompts")
    digest = hashlib.sha256(json.dumps(decides).encode())
    return digest.hexdigest()
