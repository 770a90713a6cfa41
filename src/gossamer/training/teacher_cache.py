"""What a dense teacher makes of a run's rows, written down once: it is never in memory beside a student.

A folder holds, for S rows of T tokens, in files that are read where they lie,

    hidden-LL.bf16     bfloat16 [S, T, D]: the hidden states after layer LL
    top-ids.i32        int32 [S, T, K]: the K likeliest tokens after each, the likeliest first
    top-logprobs.f16   float16 [S, T, K]: their log probabilities, of logits divided by the temperature
    teacher.json       what they were made of
    chunks.jsonl       a line for every `CHUNK_ROWS` rows: a sha256 of each file's bytes for them

Rows are written a chunk at a time, and then the chunk's line: after a kill, the chunks on record are kept.
"""

import hashlib
import json
import os
import re
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
from gossamer.job.report import Event, Progress, quiet
from gossamer.job.room import Need, check_room, size
from gossamer.training.attention import choose_attention
from gossamer.training.device import MICRO_BATCH_TOKENS, Precision, cast_teacher, choose_precision
from gossamer.training.head_loss import CHUNK_TOKENS, HeadTeacher, TopTokens
from gossamer.training.options import TrainingOptions
from gossamer.training.parallel import from_first
from gossamer.training.rows import Rows
from gossamer.training.teacher import LiveTeacher, Teacher, tokenizer_hash
from gossamer.training.whole_model import load_model

RECORD, CHUNKS = "teacher.json", "chunks.jsonl"
_OURS = re.compile(r"hidden-\d+\.bf16|top-ids\.i32|top-logprobs\.f16|teacher\.json\.new|chunks\.jsonl")
_IN_WORDS = {
    "teacher": "the teacher's files (sha256)",
    "tokenizer": "the tokenizer (sha256)",
    "rows": "the text, in rows of tokens (sha256)",
    "num_rows": "how many rows",
    "row_length": "tokens a row (--max-length)",
    "hidden_size": "the teacher's hidden size",
    "layers": "layers (--cache-layers, --distill)",
    "top_k": "likely tokens (--cache-top-k, --distill)",
    "temperature": "--distill-temperature",
    "precision": "the teacher's precision (--precision)",
}
CHUNK_ROWS = 16
DEFAULT_BYTES = 5000
DEFAULT_LAYERS = 4
LIGHTER = "lower --cache-layers, --cache-top-k or the number of tokens"


@dataclass(frozen=True)
class Wanted:
    """What is to be written down of a teacher: of which rows, which layers, and how many likely tokens.

    `teacher`, `tokenizer` and `rows` are the sha256 of its directory, of its tokenizer's files and of the
    rows; 0 tokens or no layers are none.
    """

    teacher: str
    tokenizer: str
    rows: str
    num_rows: int
    row_length: int
    hidden_size: int
    layers: tuple[int, ...]
    top_k: int
    temperature: float
    precision: Precision

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

    def in_words(self, num_layers: int) -> str:
        """What is written down of each token by a teacher of so many layers."""
        layers = ", ".join(map(str, self.layers))
        parts = [f"its states after layers {layers} of {num_layers}"] if self.layers else []
        parts += [f"the {self.top_k} likeliest tokens"] if self.top_k else []
        return " and ".join(parts)

    def record(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps(vars(self)))


def spread_layers(num_layers: int, hidden_size: int, top_k: int, count: int | None) -> tuple[int, ...]:
    """`count` layers at even distances, the last among them.

    By default as many as `DEFAULT_BYTES` hold, but no fewer than `DEFAULT_LAYERS`.
    """
    if count is None:
        count = max(DEFAULT_LAYERS, (DEFAULT_BYTES - 6 * top_k) // (2 * hidden_size))
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
        """Raises what `verify` does."""
        verify(folder, wanted)
        return cls(folder, wanted)

    def prepare(self, student: PreTrainedModel, device: torch.device) -> None:
        self._device = device

    def read(self, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        self._rows, self._width = batch["rows"].tolist(), inputs["input_ids"].shape[1]

    def states(self) -> list[Tensor]:
        names = [name for name, _, _ in self.wanted.files() if name.startswith("hidden")]
        return [self._values(name).view(torch.bfloat16) for name in names]

    def at_the_head(self, kept_BT: Tensor, temperature: float, means_of: Tensor | None = None) -> HeadTeacher:
        ids_BTK, log_p_BTK = (self._values(name) for name in ("top-ids.i32", "top-logprobs.f16"))
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


def verify(folder: Path, wanted: Wanted, stage: str = "", progress: Progress = quiet) -> None:
    """Raise CheckpointError for a file that is not as it was written, ConfigError for another cache."""
    _check_same(folder, wanted)
    hashes = _hashes(folder)
    if (missing := -(-wanted.num_rows // CHUNK_ROWS) - len(hashes)) > 0:
        raise CheckpointError(f"{folder}: {missing} of {missing + len(hashes)} chunks are not there yet")
    for index, expected in enumerate(hashes):
        if damaged := _damaged(folder, wanted, index, expected):
            raise CheckpointError(
                f"{folder / damaged}: rows from {index * CHUNK_ROWS} on are not as they were written; "
                "delete the folder, and the teacher will be asked again"
            )
        progress(Event(stage, "what the teacher made is checked", index + 1, len(hashes)))


def teacher_for(
    job: TrainingOptions, directory: Checkpoint | None, rows: Rows, stage: str, progress: Progress
) -> Teacher | CachedTeacher | None:
    """The teacher in memory, or what is written down of it, which is done now if it was not.

    Of several processes the first one writes it down, and checks all that is there.
    Raises ConfigError where the cache is of something else, CheckpointError where it is damaged, OSError
    where there is no room for it.
    """
    if directory is None:
        return None
    if job.teacher_cache is None:
        return Teacher(load_model(directory), directory.hash)
    folder = Path(job.teacher_cache)
    wanted = _wanted(job, directory, rows.hash(), len(rows), rows.row_length)

    def complete() -> None:
        if missing := missing_bytes(folder, wanted):
            ask(missing)
        verify(folder, wanted, stage, progress)

    def ask(missing: int) -> None:
        check_room([need(folder, wanted, missing)], LIGHTER)
        into = f"{size(missing)}, {wanted.token_bytes:,} bytes a token"
        what = wanted.in_words(directory.architecture.num_layers)
        progress(Event(stage, f"{folder}: the teacher is asked once, into {into}: {what}", lasting=True))
        model = load_model(directory)
        cast_teacher(model, wanted.precision)
        model.to(job.teacher_device or _device())  # pyright: ignore[reportArgumentType]
        write_down(folder, wanted, model, rows, stage, progress)
        del model
        if torch.cuda.is_available():  # what is freed is torch's still
            torch.cuda.empty_cache()

    check_folder(job.teacher_cache, job.output_dir)
    from_first(complete)
    return CachedTeacher(folder, wanted)


def _wanted(job: TrainingOptions, directory: Checkpoint, rows: str, num_rows: int, row_length: int) -> Wanted:
    """What the job wants of a teacher's directory; `rows` is the sha256 of its rows."""
    anatomy = directory.architecture
    top_k = min(job.cache_top_k, anatomy.vocab_size) if job.distill in ("kl", "both") else 0
    layers = spread_layers(anatomy.num_layers, anatomy.hidden_size, top_k, job.cache_layers)
    return Wanted(
        teacher=directory.hash,
        tokenizer=tokenizer_hash(directory.path),
        rows=rows,
        num_rows=num_rows,
        row_length=row_length,
        hidden_size=anatomy.hidden_size,
        layers=layers if job.distill in ("squarehead", "both") else (),
        top_k=top_k,
        temperature=job.distill_temperature if top_k else 1.0,
        precision=choose_precision(job.precision, _device()),
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_folder(teacher_cache: str | None, output_dir: str) -> None:
    """Raise ConfigError for a --teacher-cache that would lie among other files, or be replaced by them."""
    if teacher_cache is None:
        return
    folder = Path(teacher_cache)
    if folder.resolve() == Path(output_dir).resolve():
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
        num_done = len(_hashes(folder)) * CHUNK_ROWS
    return wanted.token_bytes * wanted.row_length * max(0, wanted.num_rows - num_done)


def need(folder: Path, wanted: Wanted, num_bytes: int) -> Need:
    """What so many bytes of the cache are for, in words."""
    what = f"what the teacher makes of {wanted.num_rows * wanted.row_length:,} tokens"
    return Need(folder, num_bytes, what, wanted.token_bytes)


def need_before_packing(
    job: TrainingOptions, directory: Checkpoint | None, num_rows: int, row_length: int
) -> list[Need]:
    """What a --teacher-cache of at most so many rows, which are not packed yet, will need; none without."""
    if directory is None or job.teacher_cache is None:
        return []
    folder = Path(job.teacher_cache)
    wanted = _wanted(job, directory, "", num_rows, row_length)
    there = sum(path.stat().st_size for path in folder.glob("*") if _OURS.fullmatch(path.name))
    return [need(folder, wanted, max(0, wanted.token_bytes * num_rows * row_length - there))]


def write_down(
    folder: Path, wanted: Wanted, teacher: PreTrainedModel, rows: Rows, stage: str, progress: Progress
) -> None:
    """Have the teacher, which gets the wanted precision, read all rows but those that are on record already.

    Raises ConfigError where the folder holds a cache of something else, OSError without room for it.
    """
    check_room([need(folder, wanted, missing_bytes(folder, wanted))], LIGHTER)
    num_done = _begin(folder, wanted)
    live, device = LiveTeacher(teacher), next(teacher.parameters()).device
    cast_teacher(teacher, wanted.precision)
    choose_attention(wanted.row_length, device.type, wanted.precision, teacher)
    at_once = max(1, MICRO_BATCH_TOKENS[device.type] // wanted.row_length)
    num_chunks = -(-wanted.num_rows // CHUNK_ROWS)
    for index in range(num_done, num_chunks):
        first, last = index * CHUNK_ROWS, min((index + 1) * CHUNK_ROWS, wanted.num_rows)
        parts = [
            _read_rows(live, rows, range(begin, min(begin + at_once, last)), wanted, device)
            for begin in range(first, last, at_once)
        ]
        chunk = {}
        for place, (name, dtype, width) in enumerate(wanted.files()):
            content = np.concatenate([part[place] for part in parts]).data
            chunk[name] = hashlib.sha256(content).hexdigest()
            with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
                file.seek(first * wanted.row_length * width * dtype.itemsize)
                file.write(content)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        _record(folder, chunk)
        progress(Event(stage, "the teacher reads", index + 1, num_chunks))


@torch.no_grad()
def _read_rows(
    live: LiveTeacher, rows: Rows, some: Sequence[int], wanted: Wanted, device: torch.device
) -> list[np.ndarray]:
    """What goes into each file for some rows, [B, T, width]; behind a row's end there are zeros.

    The teacher computes as it would beside a student: under autocast, but for the head.
    """
    batch = {name: tensor.to(device) for name, tensor in rows.collate(list(some)).items()}
    live.read(batch, {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids")})
    with torch.autocast(device.type, torch.bfloat16, enabled=wanted.precision == "bf16"):
        states = live.states()
    found: list[Tensor] = [states[layer - 1].bfloat16().view(torch.uint16) for layer in wanted.layers]
    if wanted.top_k:
        head: Any = live.model.get_output_embeddings()
        pieces = states[-1].flatten(0, 1).split(CHUNK_TOKENS[device.type])
        tops = [(head(x).float() / wanted.temperature).log_softmax(-1).topk(wanted.top_k) for x in pieces]
        shape = (len(some), -1, wanted.top_k)
        found += [torch.cat([top.indices for top in tops]).int().view(shape)]
        found += [torch.cat([top.values for top in tops]).half().view(shape)]
    live.forget()
    whole = [np.zeros((len(some), wanted.row_length, width), dtype) for _, dtype, width in wanted.files()]
    kept_BT = batch.get("token_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool)).cpu().numpy()
    for array, values in zip(whole, found, strict=True):
        array[:, : kept_BT.shape[1]][kept_BT] = values.cpu().numpy()[kept_BT]
    return whole


def _check_same(folder: Path, wanted: Wanted) -> None:
    """Raise ConfigError unless the folder's cache is of these very things.

    One from before tokenizers were on record is told by its rows alone.
    """
    recorded = {"tokenizer": wanted.tokenizer, **_recorded(folder)}
    if changed := differences(recorded, wanted.record(), _IN_WORDS):
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
    """What the folder's cache was made of."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8"))["wanted"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / RECORD, error) from error


def _hashes(folder: Path) -> list[dict[str, str]]:
    """Of each chunk on record: the sha256 of each file's bytes."""
    try:
        return [dict(json.loads(line)) for line in _lines(folder)]
    except (ValueError, TypeError) as error:
        raise _unreadable(folder / CHUNKS, error) from error


def _lines(folder: Path) -> list[bytes]:
    """A line for each chunk on record, without one that was begun when the process was killed."""
    try:
        content = (folder / CHUNKS).read_bytes()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: not the record of a teacher's cache ({error}); delete the folder")


def _begin(folder: Path, wanted: Wanted) -> int:
    """Have a folder to write into, without a piece of a line; how many chunks are on record there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = _lines(folder) if (folder / RECORD).is_file() else []
    with (folder / CHUNKS).open("ab") as file:
        file.truncate(sum(map(len, lines)))
    sync(folder / CHUNKS)
    staged = folder / f"{RECORD}.new"
    staged.write_text(json.dumps({"wanted": wanted.record()}), encoding="utf-8")
    sync(staged)
    staged.replace(folder / RECORD)
    sync(folder)
    return len(lines)


def _record(folder: Path, chunk: Mapping[str, str]) -> None:
    """Add the line of a chunk whose bytes are on the disk."""
    with (folder / CHUNKS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(chunk) + "\n")
        file.flush()
        os.fsync(file.fileno())
