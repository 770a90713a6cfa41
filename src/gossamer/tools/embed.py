"""`embed`: the vectors of the texts in a file, as a file of NumPy's."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gossamer.checkpoint.partial import refuse_existing
from gossamer.data.tables import TABLES, table_rows, text_of
from gossamer.engine import Encoder
from gossamer.errors import ConfigError
from gossamer.job.options import ThreadOptions, option
from gossamer.job.report import Event, Progress, Result, quiet

STEP_TEXTS = 256  # between two events of progress


@dataclass(frozen=True)
class Embed(ThreadOptions):
    """Write the vector of every text of a file, in their order: float32 [texts, numbers of a vector]."""

    model: str = option(
        help="a .goss file, or a directory or org/name[@revision] of the hub (packed once into a cache)",
        positional=True,
    )
    file: str = option(
        help="the texts: each line of a .txt or stdin (-), or the field text of a .jsonl[.zst] or .parquet",
        positional=True,
    )
    output_file: str = option(help="file to write (.npy)", short="-o")
    prompt_name: str | None = option(
        None, help="which of the model's prompts goes before each text (default: the model's own choice)"
    )
    normalize: bool = option(False, help="to length 1, also where the model's files do not ask for it")
    truncate: bool = option(
        False,
        help="texts beyond the model's limit lose their ends, and are counted, instead of ending the run",
    )
    overwrite: bool = option(False, help="replace the output file")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class EmbedResult(Result):
    """What was written; `cut` texts were longer than the model's limit."""

    output_file: str
    texts: int
    cut: int
    dimension: int
    tokens: int
    tokens_per_s: float


def embed(job: Embed, progress: Progress = quiet) -> EmbedResult:
    """Make the vectors; the output gets its name once it is whole.

    ConfigError for a file without texts, for texts that are too long unless `truncate`, and for an output
    that exists and may not be replaced.
    """
    output = Path(job.output_file)
    refuse_existing(output, job.overwrite)
    texts = _texts(job.file)
    encoder = Encoder(job.model, job.threads, offline=job.offline, progress=progress)
    encoder.check_vectors("embed")
    before = encoder.prompt_of(job.prompt_name)
    texts = [before + text for text in texts]
    if not job.truncate:
        _check_lengths(encoder, texts, job.file)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    try:
        num_tokens, num_cut, rate = _write(partial, encoder, texts, job, progress)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return EmbedResult(str(output), len(texts), num_cut, encoder.dimension, num_tokens, rate)


def _check_lengths(encoder: Encoder, texts: list[str], file: str) -> None:
    """ConfigError for texts that are too long, before any is computed."""
    too_long: list[int] = []
    for first in range(0, len(texts), STEP_TEXTS):
        rows = encoder.token_ids(texts[first : first + STEP_TEXTS])
        too_long += [number for number, row in enumerate(rows, first + 1) if row.is_cut]
    if too_long:
        raise ConfigError(
            f"{file}: found {len(too_long):,} of {len(texts):,} texts, the first of them number "
            f"{too_long[0]:,}, of more than {encoder.pooling.max_length} tokens, this model's limit; shorten "
            "them, or have them cut by --truncate"
        )


def _write(
    file: Path, encoder: Encoder, texts: list[str], job: Embed, progress: Progress
) -> tuple[int, int, float]:
    """Write the vectors of the texts; the tokens, how many texts were cut, and tokens a second."""
    shape = (len(texts), encoder.dimension)
    vectors_ND = np.lib.format.open_memmap(file, "w+", np.dtype(np.float32), shape)
    num_tokens, num_cut, rate, start = 0, 0, 0.0, time.monotonic()
    for first in range(0, len(texts), STEP_TEXTS):
        rows = encoder.token_ids(texts[first : first + STEP_TEXTS])
        vectors_ND[first : first + len(rows)] = encoder.vectors(rows, normalize=job.normalize)
        num_tokens += sum(len(row.ids) for row in rows)
        num_cut += sum(row.is_cut for row in rows)
        rate = num_tokens / (time.monotonic() - start)
        progress(Event("embed", "texts", first + len(rows), len(texts), {"tokens_per_s": rate}))
    vectors_ND.flush()
    return num_tokens, num_cut, rate


def _texts(file: str) -> list[str]:
    """All texts of the file, or of stdin; ConfigError where there are none, or a row has none."""
    if file != "-" and not Path(file).is_file():
        found = "a folder" if Path(file).is_dir() else "no such file"
        raise ConfigError(f"{file}: {found}; expected texts as .txt, .jsonl, .jsonl.zst or .parquet")
    if file.endswith(TABLES):
        texts = [text_of(row, where, "text", "content", blank=True) for where, row in table_rows(Path(file))]
    elif file == "-" or file.endswith(".txt"):
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = content.decode("utf-8-sig", errors="replace").split("\n")
        texts = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    else:
        raise ConfigError(f"{file}: expected texts as .txt, .jsonl, .jsonl.zst or .parquet, or - for stdin")
    if not texts:
        raise ConfigError(f"{file}: found no texts; expected at least one")
    return texts
