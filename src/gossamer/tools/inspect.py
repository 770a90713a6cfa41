"""`inspect`: what a checkpoint directory or a packed file holds, and where it comes from."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.architecture.anatomy import Anatomy, Task
from gossamer.architecture.config import Config
from gossamer.architecture.encoder import labels
from gossamer.architecture.rope import Rope
from gossamer.checkpoint.directory import Checkpoint
from gossamer.checkpoint.provenance import Provenance, Step, read_provenance
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.packed.header import matrix_shapes
from gossamer.packed.reader import Packed, table_of_parts
from gossamer.tokens.pooling import Pooling

_LAYER = re.compile(r"\blayers?\.\d+\b")
_FOR: dict[Task, str] = {
    "embedding": "vectors of texts",
    "masked": "masked words",
    "sequence": "classes of texts",
    "tokens": "classes of words",
    "spans": "answers in texts",
}  # an encoder


@dataclass(frozen=True)
class Inspect:
    """Show sizes, sparsity and storage of a model, layer by layer."""

    model: str = option(
        help="a .goss file, a checkpoint directory, or org/name[@revision] of the hub", positional=True
    )
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: `storage` dense or sparse, `values` f32, bf16, f16, i8, i4; bytes include scales."""

    name: str
    rows: int
    columns: int
    storage: str
    values: str
    nonzeros: int
    num_bytes: int

    @property
    def layer(self) -> str:
        """The part of the model it belongs to: `embed_tokens`, `layers.3` or `layer.3`, `lm_head`."""
        found = _LAYER.search(self.name)
        return found[0] if found else self.name.split(".")[-1]

    @property
    def is_in_a_layer(self) -> bool:
        return _LAYER.search(self.name) is not None

    @property
    def num_weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class InspectResult(Result):
    """`sparsity` and `bits_per_weight` are of the linears of all layers; `provenance` is oldest first.

    `license` is what the model card says, or how the licence's text begins; `texts` has the texts by name.
    `parts` are the bytes of a packed file by part (None for a directory). Of an encoder `pooling` says how it
    reads texts, and `labels` are the classes of its head.
    """

    model: str
    kind: str
    architecture: dict[str, Any]
    task: Task
    pooling: Pooling | None
    labels: tuple[str, ...]
    num_parameters: int
    num_bytes: int
    sparsity: float
    bits_per_weight: float
    matrices: tuple[Matrix, ...]
    provenance: tuple[Step, ...]
    license: str | None
    texts: Mapping[str, str]
    parts: Mapping[str, int] | None = None

    def tables(self) -> list[Table]:
        """The model as a whole, and a row per layer."""
        found = self.architecture
        heads = f"{found['num_heads']} query, {found['num_kv_heads']} key/value heads of {found['head_dim']}"
        widths = (
            f"{found['hidden_size']}, MLP {found['intermediate_size']}, vocabulary {found['vocab_size']:,}"
        )
        rope, windows = found["rope"], Counter(found["windows"])
        seen = ", ".join(
            f"{window or 'all'} in {count} of {len(found['windows'])} layers"
            for window, count in windows.items()
        )
        facts = [
            ("kind", self.kind),
            ("architecture", f"{found['model_type']}, {found['num_layers']} layers, {heads}"),
            ("width", widths),
            ("rope", f"{rope['kind']}, base {rope['theta']:g}" if rope else "none"),
            *([("positions seen", seen)] if any(windows) else []),
            *self._reading(),
            ("parameters", f"{self.num_parameters:,}"),
            ("bytes", f"{self.num_bytes:,}"),
            (f"{self.side} zeros", f"{self.sparsity:.2%}"),
            (f"{self.side} bits/weight", f"{self.bits_per_weight:.2f}"),
            ("license", self.license or "unknown"),
            *([("texts", ", ".join(self.texts))] if self.texts else []),
            *(
                (f"step {i}: {step.stage}", f"from {step.parent[:16]}")
                for i, step in enumerate(self.provenance, 1)
            ),
        ]
        parts = dict.fromkeys(matrix.layer for matrix in self.matrices)
        rows = [_row(part, [matrix for matrix in self.matrices if matrix.layer == part]) for part in parts]
        columns = ("part", "stored", "zeros", "bits/weight", "bytes")
        layers = [Table(self.model, ("", ""), facts), Table("", columns, rows)]
        return [*layers, table_of_parts(self.parts)] if self.parts else layers

    @property
    def side(self) -> str:
        """What the layers are together."""
        return "decoder" if self.task == "generation" else "encoder"

    def _reading(self) -> list[tuple[str, str]]:
        """What an encoder is for, and how it reads texts."""
        if self.pooling is None or self.task == "generation":
            return []
        how = f"{self.pooling.mode} of their tokens{', of length 1' if self.pooling.normalize else ''}"
        detail = {"embedding": f", {how}", "masked": f"; vectors by the {how}"}.get(self.task, "")
        return [
            ("for", _FOR[self.task] + detail),
            *([("classes", f"{len(self.labels)}: {', '.join(self.labels):.80}")] if self.labels else []),
            ("reads", f"at most {self.pooling.max_length:,} tokens of a text"),
            *([("prompts", ", ".join(self.pooling.prompts))] if self.pooling.prompts else []),
        ]


def inspect(job: Inspect, progress: Progress = quiet) -> InspectResult:
    """Describe a model; raises FormatError or CheckpointError for what is neither."""
    path = Path(job.model)
    if path.is_file():
        return _packed(Packed.open(path))
    return _directory(Checkpoint.open(path, offline=job.offline), progress)


def _packed(packed: Packed) -> InspectResult:
    matrices = [
        Matrix(
            name,
            matrix.rows,
            matrix.columns,
            matrix.storage,
            matrix.values,
            matrix.nonzeros,
            packed.matrix_bytes(name),
        )
        for name, matrix in packed.matrices.items()
    ]
    kind = f"packed file, format version {packed.metadata['version']}"
    found, parent = packed.provenance, packed.metadata["parent"]
    known = replace(found, lineage=(*found.lineage, Step("pack", parent))) if parent else found
    pooling = packed.pooling if packed.architecture.is_encoder else None
    result = _result(
        str(packed.path),
        kind,
        packed.architecture,
        packed.config,
        pooling,
        packed.file_bytes,
        matrices,
        known,
    )
    return replace(result, parts=packed.bytes_by_part())


def _directory(source: Checkpoint, progress: Progress) -> InspectResult:
    names = list(matrix_shapes(source.architecture))
    matrices = []
    for index, name in enumerate(names, start=1):
        progress(Event("inspect", name, index, len(names)))
        tensors = [f"{name}.weight", f"{name}.weight_scale"]
        num_bytes = sum(source.entries[tensor].num_bytes for tensor in tensors if tensor in source.entries)
        zeros_NK = source.zeros(f"{name}.weight")
        (rows, columns), nonzeros = zeros_NK.shape, zeros_NK.size - int(np.count_nonzero(zeros_NK))
        values = source.dtype(f"{name}.weight").lower()
        matrices.append(Matrix(name, rows, columns, "dense", values, nonzeros, num_bytes))
    kind = "quantized directory" if "quantization_config" in source.config else "directory"
    num_bytes = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    known = read_provenance(source)
    architecture, path = source.architecture, source.path
    pooling = Pooling.open(path, architecture) if architecture.is_encoder else None
    return _result(str(path), kind, architecture, source.config, pooling, num_bytes, matrices, known)


def _result(
    model: str,
    kind: str,
    architecture: Anatomy,
    config: Mapping[str, Any],
    pooling: Pooling | None,
    num_bytes: int,
    matrices: Sequence[Matrix],
    provenance: Provenance,
) -> InspectResult:
    linears = set(architecture.linear_names())
    decoder = [matrix for matrix in matrices if matrix.name in linears]
    shapes = architecture.tensor_shapes.values()
    return InspectResult(
        model=model,
        kind=kind,
        architecture=_sizes(architecture),
        task=architecture.task,
        pooling=pooling,
        labels=tuple(labels(Config(config, model))) if architecture.task in ("sequence", "tokens") else (),
        num_parameters=sum(int(np.prod(shape)) for shape in shapes),
        num_bytes=num_bytes,
        sparsity=_sparsity(decoder),
        bits_per_weight=_bits_per_weight(decoder),
        matrices=tuple(matrices),
        provenance=provenance.lineage,
        license=provenance.license_line,
        texts=provenance.texts,
    )


def _sizes(anatomy: Anatomy) -> dict[str, Any]:
    """The sizes that tell one model from another, as plain data."""
    heads = anatomy.attention
    return {
        "model_type": anatomy.model_type,
        "num_layers": anatomy.num_layers,
        "hidden_size": anatomy.hidden_size,
        "intermediate_size": anatomy.blocks[0].feed_forward.width,
        "num_heads": heads.num_heads,
        "num_kv_heads": heads.num_kv_heads,
        "head_dim": heads.head_dim,
        "vocab_size": anatomy.vocab_size,
        "rms_norm_eps": anatomy.norm_eps,
        "rope": _rope(heads.rope),
        "windows": tuple(block.attention.window for block in anatomy.blocks),
        "tie_word_embeddings": anatomy.tie_word_embeddings,
        "max_position_embeddings": anatomy.max_position_embeddings,
        "bos_token_id": anatomy.bos_token_id,
        "eos_token_ids": anatomy.eos_token_ids,
    }


def _rope(rope: Rope | None) -> dict[str, Any] | None:
    """Its kind, base, and what else that kind says."""
    if rope is None:
        return None
    settings = {"kind": rope.stretch.kind, **asdict(rope.stretch)} if rope.stretch else {"kind": "default"}
    return {"theta": rope.theta, **settings}


def _sparsity(matrices: Sequence[Matrix]) -> float:
    return 1 - sum(m.nonzeros for m in matrices) / sum(m.num_weights for m in matrices)


def _bits_per_weight(matrices: Sequence[Matrix]) -> float:
    return 8 * sum(m.num_bytes for m in matrices) / sum(m.num_weights for m in matrices)


def _row(part: str, matrices: Sequence[Matrix]) -> tuple[str, ...]:
    stored = ", ".join(dict.fromkeys(f"{matrix.storage} {matrix.values}" for matrix in matrices))
    num_bytes = sum(matrix.num_bytes for matrix in matrices)
    return part, stored, f"{_sparsity(matrices):.1%}", f"{_bits_per_weight(matrices):.2f}", f"{num_bytes:,}"
