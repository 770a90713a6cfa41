"""What a dense teacher makes of a run's rows, written down once: it is never in memory beside a student.

A folder holds, for S rows of T tokens, in files that are read where they lie,

    hidden-LL.bf16     bfloat16 [S, T, D]: the hidden states after layer LL
    top-ids.i32        int32 [S, T, K]: the K likeliest tokens after each, the likeliest first
    top-logprobs.f16   float16 [S, T, K]: their log probabilities, of logits divided by the temperature
    teacher.json       what they were made of, and a sha256 of each file's bytes for every `CHUNK_ROWS` rows

Rows are written a chunk at a time and then recorded: after a kill, the chunks on record are kept.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.resumable import differences, sync
from gossamer.errors import CheckpointError, ConfigError
from gossamer.job.report import Event, Progress
from gossamer.training.head_loss import CHUNK_TOKENS, HeadTeacher, TopTokens
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import from_first
from gossamer.training.rows import Rows
from gossamer.training.teacher import LiveTeacher, Teacher
from gossamer.training.whole_model import load_model

RECORD = "teacher.json"
_OURS = re.compile(r"hidden-\d+\.bf16|top-ids\.i32|top-logprobs\.f16|teacher\.json\.new")
_IN_WORDS = {
    "teacher": "the teacher's files (sha256)",
    "rows": "the rows of tokens (sha256)",
    "num_rows": "how many rows",
    "row_length": "tokens a row (--max-length)",
    "hidden_size": "the teacher's hidden size",
    "layers": "layers (--cache-layers, --distill)",
    "top_k": "likely tokens (--cache-top-k, --distill)",
    "temperature": "--distill-temperature",
}
CHUNK_ROWS = 16
DEFAULT_BYTES = 5000


@dataclass(frozen=True)
class Wanted:
    """What is to be written down of a teacher: of which rows, which layers, and how many likely tokens.

    `teacher` and `rows` are the sha256 of its directory and of the rows; 0 tokens or no layers are none.
    """

    teacher: str
    rows: str
    num_rows: int
    row_length: int
    hidden_size: int
    layers: tuple[int, ...]
    top_k: int
    temperature: float

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes."""
        return sum(width * dtype.itemsize for _, dtype, width in self.files())

    def files(self) -> Iterator[tuple[str, np.dtype[Any], int]]:
        """(name, type, values a token) of each file."""
        for layer in self.layers:
            yield f"hidden-{layer:02}.bf16", np.dtype(np.uint16), self.hidden_size
        if self.top_k:
            yield "top-ids.i32", np.dtype(np.int32), self.top_k
            yield "top-logprobs.f16", np.dtype(np.float16), self.top_k

    def record(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps(vars(self)))


def spread_layers(num_layers: int, hidden_size: int, top_k: int, count: int | None) -> tuple[int, ...]:
    """`count` layers at even distances, the last among them; by default as many as `DEFAULT_BYTES` hold."""
    if count is None:
        count = max(1, (DEFAULT_BYTES - 6 * top_k) // (2 * hidden_size))
    count = min(count, num_layers)
    return tuple(round(num_layers * (index + 1) / count) for index in range(count))


class CachedTeacher:
    """A teacher that was written down; `hash` is the sha256 of the directory that it was loaded from."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.hash, self.wanted, self.layers = wanted.teacher, wanted, wanted.layers
        shape = (wanted.num_rows, wanted.row_length)
        self._files = {
            name: np.memmap(folder / name, dtype, "r", shape=(*shape, width))
            for name, dtype, width in wanted.files()
        }
        self._rows: list[int] = []
        self._width = 0
        self._device = torch.device("cpu")

    @classmethod
    def open(cls, folder: Path, wanted: Wanted) -> Self:
        """Raises CheckpointError for a file that is not as it was written, ConfigError for another cache."""
        _check_same(folder, wanted)
        hashes = _recorded(folder)["chunks"]
        if (missing := -(-wanted.num_rows // CHUNK_ROWS) - len(hashes)) > 0:
            raise CheckpointError(f"{folder}: {missing} of {missing + len(hashes)} chunks are not there yet")
        for index, expected in enumerate(hashes):
            if damaged := _damaged(folder, wanted, index, expected):
                raise CheckpointError(
                    f"{folder / damaged}: rows from {index * CHUNK_ROWS} on are not as they were written; "
                    "delete the folder, and the teacher will be asked again"
                )
        return cls(folder, wanted)

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        self._device = device

    def read(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self._rows, self._width = batch["rows"].tolist(), inputs["input_ids"].shape[1]

    def states(self) -> list[Tensor]:
        names = [name for name, _, _ in self.wanted.files() if name.startswith("hidden")]
        return [self._values(name).view(torch.bfloat16) for name in names]

    def at_the_head(self, kept_BT: Tensor, temperature: float) -> HeadTeacher:
        ids_BTK, log_p_BTK = (self._values(name)[:, :-1] for name in ("top-ids.i32", "top-logprobs.f16"))
        return TopTokens(ids_BTK[kept_BT].long(), log_p_BTK[kept_BT], temperature)

    def forget(self) -> None:
        self._rows = []

    def _values(self, name: str) -> Tensor:
        """Of the micro-batch's rows; rows of padding, which lie behind the others, are 0."""
        file = self._files[name]
        found = np.zeros((len(self._rows), self._width, file.shape[2]), file.dtype)
        there = [row for row in self._rows if row < len(file)]
        found[: len(there)] = file[there, : self._width]
        return torch.from_numpy(found).to(self._device)


def teacher_for(
    job: TrainingOptions, directory: Checkpoint | None, rows: Rows, stage: str, progress: Progress
) -> Teacher | CachedTeacher | None:
    """The teacher in memory, or what is written down of it, which is done now if it was not.

    Raises ConfigError where the cache is of something else, CheckpointError where it is damaged, OSError
    where there is no room for it.
    """
    if directory is None:
        return None
    if job.teacher_cache is None:
        return Teacher(load_model(directory), directory.hash)
    folder, anatomy = Path(job.teacher_cache), directory.architecture
    top_k = min(job.cache_top_k, anatomy.vocab_size) if job.distill in ("kl", "both") else 0
    layers = spread_layers(anatomy.num_layers, anatomy.hidden_size, top_k, job.cache_layers)
    wanted = Wanted(
        teacher=directory.hash,
        rows=rows.hash(),
        num_rows=len(rows),
        row_length=rows.row_length,
        hidden_size=anatomy.hidden_size,
        layers=layers if job.distill in ("squarehead", "both") else (),
        top_k=top_k,
        temperature=job.distill_temperature if top_k else 1.0,
    )

    def complete() -> None:
        if not (missing := missing_bytes(folder, wanted)):
            return
        check_room(folder, wanted, missing)
        size = f"{_size(missing)}, {wanted.token_bytes:,} bytes a token"
        progress(Event(stage, f"{folder}: the teacher is asked once, into {size}", lasting=True))
        model = load_model(directory)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
        write_down(folder, wanted, model, rows, stage, progress)
        del model
        if torch.cuda.is_available():  # what is freed is torch's still
            torch.cuda.empty_cache()

    check_folder(job)
    from_first(complete)
    return CachedTeacher.open(folder, wanted)


def check_folder(job: TrainingOptions) -> None:
    """Raise ConfigError for a --teacher-cache that would lie among other files, or be replaced by them."""
    if job.teacher_cache is None:
        return
    folder = Path(job.teacher_cache)
    if folder.resolve() == Path(job.output_dir).resolve():
        raise ConfigError(f"--teacher-cache is {folder}, the output directory; give another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--teacher-cache is {folder}, a file; expected a folder, or a new name")
    if not folder.is_dir() or (folder / RECORD).is_file():
        return
    if others := sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)):
        raise ConfigError(
            f"--teacher-cache {folder} holds something else ({', '.join(others[:3])}); expected a folder "
            "that is new, empty or a teacher's cache"
        )


def missing_bytes(folder: Path, wanted: Wanted) -> int:
    """What is still to be written; ConfigError where the folder holds a cache of something else."""
    num_done = 0
    if (folder / RECORD).is_file():
        _check_same(folder, wanted)
        num_done = len(_recorded(folder)["chunks"]) * CHUNK_ROWS
    return wanted.token_bytes * wanted.row_length * max(0, wanted.num_rows - num_done)


def check_room(folder: Path, wanted: Wanted, missing: int) -> None:
    """Raise OSError where the disk has no room for what is missing."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < missing:
        raise OSError(
            errno.ENOSPC,
            f"what the teacher makes of {wanted.num_rows * wanted.row_length:,} tokens needs "
            f"{_size(missing)} ({wanted.token_bytes:,} bytes a token), {_size(free)} are free: make room, or "
            "lower --cache-layers, --cache-top-k or the number of tokens",
            str(folder),
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


def write_down(
    folder: Path, wanted: Wanted, teacher: PreTrainedModel, rows: Rows, stage: str, progress: Progress
) -> None:
    """Have the teacher read all rows, but those that are on record already.

    Raises ConfigError where the folder holds a cache of something else, OSError without room for it.
    """
    check_room(folder, wanted, missing_bytes(folder, wanted))
    folder.mkdir(parents=True, exist_ok=True)
    hashes = _recorded(folder)["chunks"] if (folder / RECORD).is_file() else []
    live, head = LiveTeacher(teacher), teacher.get_output_embeddings()
    device = next(teacher.parameters()).device
    num_chunks = -(-wanted.num_rows // CHUNK_ROWS)
    for index in range(len(hashes), num_chunks):
        first = index * CHUNK_ROWS
        last = min(first + CHUNK_ROWS, wanted.num_rows)
        found = [_read_row(live, head, rows, row, wanted, device) for row in range(first, last)]
        chunk = {}
        for place, (name, dtype, width) in enumerate(wanted.files()):
            values = np.stack([of_row[place] for of_row in found])
            chunk[name] = hashlib.sha256(values.tobytes()).hexdigest()
            with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
                file.seek(first * wanted.row_length * width * dtype.itemsize)
                file.write(values.tobytes())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        hashes.append(chunk)
        _record(folder, wanted, hashes)
        progress(Event(stage, "the teacher reads", index + 1, num_chunks))


@torch.no_grad()
def _read_row(
    live: LiveTeacher, head: Any, rows: Rows, row: int, wanted: Wanted, device: torch.device
) -> list[np.ndarray]:
    """What goes into each file for one row, [T, width]; behind the row's end there are zeros."""
    batch = {name: tensor.to(device) for name, tensor in rows.collate([row]).items()}
    live.read(batch, {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids")})
    states = live.states()
    found: list[Tensor] = [states[layer - 1][0].bfloat16().view(torch.uint16) for layer in wanted.layers]
    if wanted.top_k:
        pieces = states[-1][0].split(CHUNK_TOKENS[device.type])
        tops = [(head(x).float() / wanted.temperature).log_softmax(-1).topk(wanted.top_k) for x in pieces]
        found += [torch.cat([top.indices for top in tops]).int()]
        found += [torch.cat([top.values for top in tops]).half()]
    live.forget()
    whole = [np.zeros((wanted.row_length, width), dtype) for _, dtype, width in wanted.files()]
    for array, values in zip(whole, found, strict=True):
        array[: len(values)] = values.cpu().numpy()
    return whole


def _check_same(folder: Path, wanted: Wanted) -> None:
    """Raise ConfigError unless the folder's cache is of these very things."""
    if changed := differences(_recorded(folder)["wanted"], wanted.record(), _IN_WORDS):
        raise ConfigError(
            f"--teacher-cache {folder} was written of something else ({'; '.join(changed)}); give another "
            "folder, or delete this one"
        )


def _damaged(folder: Path, wanted: Wanted, index: int, expected: Mapping[str, str]) -> str | None:
    """The first file whose chunk is not what was written."""
    num_rows = min(CHUNK_ROWS, wanted.num_rows - index * CHUNK_ROWS)
    for name, dtype, width in wanted.files():
        row_bytes = wanted.row_length * width * dtype.itemsize
        try:
            with (folder / name).open("rb") as file:
                file.seek(index * CHUNK_ROWS * row_bytes)
                found = hashlib.sha256(file.read(num_rows * row_bytes)).hexdigest()
        except FileNotFoundError:
            return name
        if found != expected.get(name):
            return name
    return None


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {"wanted": dict(found["wanted"]), "chunks": list(found["chunks"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RECORD}: not the record of a teacher's cache ({error}); delete the folder"
        ) from error


def _record(folder: Path, wanted: Wanted, hashes: Sequence[Mapping[str, str]]) -> None:
    """Replace the record in one step."""
    staged = folder / f"{RECORD}.new"
    staged.write_text(json.dumps({"wanted": wanted.record(), "chunks": hashes}), encoding="utf-8")
    sync(staged)
    staged.replace(folder / RECORD)
    sync(folder)
