"""`pack`: a checkpoint directory becomes the one .goss file that `run`, `serve` and `bench` map."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossamer.architecture.anatomy import Anatomy, Task
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.partial import refuse_existing
from gossamer.checkpoint.provenance import text_files
from gossamer.engine.heads import CALLS
from gossamer.errors import ConfigError
from gossamer.job.options import option
from gossamer.job.processes import refuse_several
from gossamer.job.report import Progress, Result, Table, quiet
from gossamer.packed.from_checkpoint import (
    LinearType,
    Rounding,
    TableType,
    Types,
    pack_checkpoint,
    prompts_skip_zeros,
)
from gossamer.packed.reader import Packed, table_of_parts
from gossamer.packed.writer import Purpose

NO_HEAD = "none"  # an encoder's


@dataclass(frozen=True)
class Pack:
    """Write one memory-mappable file, each layer sparse or dense: what is smaller, or faster (`storage`)."""

    model: str = option(
        help="checkpoint directory (dense, sparse or quantized), or org/name[@revision] of the hub",
        positional=True,
    )
    output_file: str = option(help="file to write (.goss)", short="-o")
    head: TableType = option(
        "auto", help="output head: as it is, rounded, or (auto) int8 if the decoder is of integers"
    )
    embedding: TableType = option(
        "auto", help="as it is, rounded, or (auto) one table for both where the head is tied to it"
    )
    linears: LinearType = option("keep", help="the decoder's linears: as they are, or rounded to int4")
    storage: Literal["auto", "smallest"] = option(
        "auto", help="auto: INT8 layers stay dense on CPUs that read them faster so; smallest: fewest bytes"
    )
    purpose: Literal[Purpose, "auto"] = option(
        "auto",
        help="what INT8 layers with zeros are stored for: decode has the fewest bytes; prompts skip zeros; "
        "both: where one gains more than the other loses; auto: prompts of an encoder, else decode",
        flag="for",
    )
    overwrite: bool = option(False, help="replace the output file")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class StoredAs:
    """How many matrices of one kind of layer are stored in one way, and what they take."""

    kind: str
    storage: str
    values: str
    num_matrices: int
    sparsity: float
    num_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class RoundedPart:
    """What rounding moved of a part of the model: |rounded - w| / |w|, of matrices in the mean.

    `worst` names the matrix and the row that moved most; of embedding and head a row is a token's.
    """

    part: str
    values: str
    error: float
    worst_row_error: float
    worst: str

    def __str__(self) -> str:
        return (
            f"The {self.part}: weights moved by {self.error:.2%} in rounding to {self.values}, "
            f"a row by {self.worst_row_error:.2%} at most ({self.worst})."
        )


@dataclass(frozen=True)
class PackResult(Result):
    """`bits_per_weight` and `sparsity` are of the decoder's linears, `task` is what an encoder's head is for.

    `left_out` are files beside the model, such as a licence as PDF, that cannot be carried in the file.
    `purpose_for_nothing`: whether it was asked for quick prompts where they do not skip zeros.
    `parts` are the file's bytes by part, and `rounded` says what rounding here did to the weights.
    """

    output_file: str
    num_bytes: int
    sparsity: float
    bits_per_weight: float
    head: str
    task: Task
    dense_for_speed: bool
    purpose_for_nothing: bool
    seconds: float
    parts: dict[str, int]
    rounded: tuple[RoundedPart, ...]
    stored: tuple[StoredAs, ...]
    left_out: tuple[str, ...]

    def tables(self) -> list[Table]:
        """One row per kind of layer and way of storage, then the file's bytes by part."""
        rows = [
            (
                f"{group.num_matrices} x {group.kind}",
                f"{group.storage} {group.values}",
                f"{group.sparsity:.1%}",
                f"{group.bits_per_weight:.2f}",
                f"{group.num_bytes:,}",
            )
            for group in self.stored
        ]
        title = f"{self.output_file}: {self.num_bytes:,} bytes in {self.seconds:.1f} s"
        return [
            Table(title, ("matrices", "stored", "zeros", "bits/weight", "bytes"), rows),
            table_of_parts(self.parts),
        ]

    @property
    def closing(self) -> tuple[str, ...]:
        """What to know about what was rounded, and the next command."""
        if self.head == NO_HEAD:
            run = f"Use it: gossamer.Encoder({self.output_file!r}).{CALLS[self.task]}"
        else:
            run = f"Run it: gossamer run {self.output_file} 'Once upon a time'"
        lines = []
        if self.dense_for_speed:
            lines.append(
                "INT8 stays dense: this CPU reads it faster so than with its zeros left out; "
                "`--storage smallest` leaves them out, for a file that is small or goes elsewhere."
            )
        if self.purpose_for_nothing:
            lines.append(
                "Prompts do not skip zeros on this CPU, which has a matrix unit, or AVX2 alone: it is stored "
                "for decode. GOSSAMER_ISA=avx512 packs for a CPU that has AVX-512 and no matrix unit."
            )
        if self.rounded:
            lines += [*map(str, self.rounded), "`evaluate` shows what that costs."]
        if self.left_out:
            lines.append(
                f"Not in the file, as no text or too long: {', '.join(self.left_out)}; keep it beside."
            )
        return (*lines, run)


def pack(job: Pack, progress: Progress = quiet) -> PackResult:
    """Pack a directory; raises ConfigError if the output exists, UnsupportedError under torchrun."""
    refuse_several("pack")
    start, output = time.monotonic(), Path(job.output_file)
    refuse_existing(output, job.overwrite)
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; -o of pack is the file to write, such as model.goss")
    source = Checkpoint.open(job.model, offline=job.offline)
    output.parent.mkdir(parents=True, exist_ok=True)
    types = Types(job.embedding, job.head, job.linears)
    packing = pack_checkpoint(source, output, types, progress, job.storage, job.purpose)
    packed = Packed.open(output)
    return PackResult(
        output_file=str(output),
        num_bytes=packed.file_bytes,
        sparsity=packed.sparsity(packed.decoder),
        bits_per_weight=packed.bits_per_weight(packed.decoder),
        head=_head(packed),
        task=packed.architecture.task,
        dense_for_speed=packing.dense_for_speed,
        purpose_for_nothing=job.purpose in ("prompts", "both") and not prompts_skip_zeros(),
        seconds=time.monotonic() - start,
        parts=packed.bytes_by_part(),
        rounded=tuple(rounded_parts(packing.roundings, source.architecture)),
        stored=stored_as(packed),
        left_out=tuple(
            file.name for file in text_files(source.path) if file.name not in packed.provenance.texts
        ),
    )


def _head(packed: Packed) -> str:
    """The type of the matrix that makes the logits."""
    if packed.architecture.is_encoder:
        return NO_HEAD
    tied = packed.head == packed.architecture.embedding
    return f"{packed.matrices[packed.head].values}{' (the embedding)' if tied else ''}"


def rounded_parts(roundings: Mapping[str, Rounding], anatomy: Anatomy) -> Iterator[RoundedPart]:
    """What rounding did to the embedding, the head and the linears, to those of them that were rounded."""
    embedding, head = anatomy.embedding, anatomy.head
    both = anatomy.tie_word_embeddings and head not in roundings
    names = {"embedding and head" if both else "embedding": [embedding], "head": [head] if head else []}
    model = "encoder" if anatomy.is_encoder else "decoder"
    names[f"{model}'s linears"] = [name for name in roundings if name not in (embedding, head)]
    for part, members in names.items():
        found = {name: roundings[name] for name in members if name in roundings}
        if found:
            worst = max(found, key=lambda name: found[name].worst_row_error)
            yield RoundedPart(
                part,
                found[worst].values,
                sum(rounding.error for rounding in found.values()) / len(found),
                found[worst].worst_row_error,
                f"{worst}, row {found[worst].worst_row}",
            )


def stored_as(packed: Packed) -> tuple[StoredAs, ...]:
    """The file's matrices grouped by kind (q_proj, ..., lm_head) and storage."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, matrix in packed.matrices.items():
        groups.setdefault((name.rpartition(".")[2], matrix.storage, matrix.values), []).append(name)
    return tuple(
        StoredAs(
            *key,
            num_matrices=len(names),
            sparsity=packed.sparsity(names),
            num_bytes=sum(map(packed.matrix_bytes, names)),
            bits_per_weight=packed.bits_per_weight(names),
        )
        for key, names in groups.items()
    )
