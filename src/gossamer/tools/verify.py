"""`verify`: is this model sound, did it keep its parent's zeros, does the engine compute what torch does?

Every check either passes and says what it looked at, or raises the error that names what is wrong.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from gossamer.architecture.anatomy import EMBEDDING, HEAD
from gossamer.architecture.config import read_json
from gossamer.checkpoint.directory import Checkpoint, hash_mask
from gossamer.checkpoint.schemes import dequantized
from gossamer.errors import CheckpointError, FormatError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.packed.cache import open_packed
from gossamer.packed.from_checkpoint import rounded_matrix, scheme_of, stored_scales
from gossamer.packed.header import StorageKind, vector_sizes
from gossamer.packed.reader import Packed
from gossamer.tools.agreement import Check, backends


@dataclass(frozen=True)
class Verify:
    """Check a model's files, its zeros since a parent, and its engine against torch."""

    model: str = option(
        help="a .goss file, a checkpoint directory, or org/name[@revision] of the hub", positional=True
    )
    parent: str | None = option(
        None, help="what it was made from (like MODEL): its zeros must be zeros still"
    )
    skip_engine: bool = option(False, help="leave out the comparison of the engine with torch (big models)")
    offline: bool = option(False, help="never touch the network")


@dataclass(frozen=True)
class VerifyResult(Result):
    """Everything that was checked; what fails is an error instead."""

    model: str
    checks: tuple[Check, ...]

    def tables(self) -> list[Table]:
        """One row per check."""
        rows = [("skipped" if check.skipped else "ok", check.name, check.detail) for check in self.checks]
        return [Table(self.model, ("", "check", "found"), rows)]


def verify(job: Verify, progress: Progress = quiet) -> VerifyResult:
    """Check a directory or a file; the first failure is a CheckpointError, FormatError or EngineError."""
    path, checks = Path(job.model), []
    parent = Checkpoint.open(job.parent, offline=job.offline) if job.parent is not None else None
    found = (
        _packed_checks(Packed.open(path), parent)
        if path.is_file()
        else _checks(Checkpoint.open(path, offline=job.offline), parent)
    )
    for check in found:
        checks.append(check)
        progress(Event("verify", check.name, len(checks)))
    if not job.skip_engine:
        checks += backends(open_packed(path, progress, offline=job.offline), path if path.is_dir() else None)
    return VerifyResult(job.model, tuple(checks))


def _checks(source: Checkpoint, parent: Checkpoint | None) -> Iterator[Check]:
    for name in source.names:
        source.raw(name)
    yield Check("tensors", f"{len(source.names)} whole and finite")
    file = source.path / "config.json"
    yield _no_sparsity_config(read_json(file), file)
    int8 = [name for name in source.linears if source.dtype(f"{name}.weight") == "I8"]
    if scheme := scheme_of(source):
        for name in int8:
            stored_scales(source, name)
        yield Check(
            "quantization", f"{scheme.format} {scheme.name}, {len(int8)} of {len(source.linears)} linears"
        )
    if source.manifest is not None:
        yield _recorded_masks(source)
    if parent is not None:

        def zeros(name: str) -> np.ndarray:
            return source.zeros(f"{name}.weight")

        yield _zeros_kept(parent, source.linears, zeros, str(source.path), CheckpointError)


def _packed_checks(packed: Packed, parent: Checkpoint | None) -> Iterator[Check]:
    packed.check()
    storages = collections.Counter(packed.matrices[name].storage for name in packed.decoder)
    counts = ", ".join(f"{storages[kind]} {kind}" for kind in get_args(StorageKind) if storages[kind])
    yield Check("contents", f"{counts} linears decode")
    yield _no_sparsity_config(packed.config, packed.path)
    if parent is None:
        return
    if packed.metadata["parent"] == parent.hash:
        yield _same_tensors(packed, parent)
    else:
        yield Check("tensors", "not the directory that was packed: only zeros are compared", skipped=True)

    def zeros(name: str) -> np.ndarray:
        return packed.linear(name) == 0

    yield _zeros_kept(parent, packed.decoder, zeros, str(packed.path), FormatError)


def _no_sparsity_config(config: dict, file: Path) -> Check:
    """vLLM refuses models that announce one; the zeros speak for themselves."""
    quantization = config.get("quantization_config") or {}
    if "sparsity_config" in config or "sparsity_config" in quantization:
        raise CheckpointError(f"{file}: found a sparsity_config; vLLM refuses such models, take it out")
    return Check("no sparsity_config", "none in config.json")


def _recorded_masks(source: Checkpoint) -> Check:
    """The zeros are those of gossamer.json."""
    recorded = (source.manifest or {}).get("tensors", {})
    for name in (f"{linear}.weight" for linear in source.linears):
        mask_hash = hash_mask(source.zeros(name))
        if (expected := recorded.get(name, {}).get("mask_hash")) != mask_hash:
            raise CheckpointError(
                f"{source.path}: the zeros of {name} have the hash {mask_hash[:16]}; gossamer.json recorded "
                f"{str(expected)[:16]}: the weights were changed since"
            )
    return Check("masks", f"{len(source.linears)} linears have the zeros that gossamer.json recorded")


def _zeros_kept(
    parent: Checkpoint,
    names: Sequence[str],
    zeros: Callable[[str], np.ndarray],
    where: str,
    error: type[Exception],
) -> Check:
    """Every zero of the parent's linears is one of the child's, whose linears have these `names`."""
    if set(names) != set(parent.linears):
        raise error(
            f"{where} has {len(names)} linears; {parent.path}, with {len(parent.linears)}, is no parent"
        )
    kept = total = 0
    for name in parent.linears:
        before_NK, after_NK = parent.zeros(f"{name}.weight"), zeros(name)
        if before_NK.shape != after_NK.shape:
            raise error(f"{where}: {name} is {after_NK.shape}; in {parent.path} it is {before_NK.shape}")
        if lost := int(np.count_nonzero(before_NK & ~after_NK)):
            raise error(
                f"{where}: {name} lost {lost} of the zeros of {parent.path}; the stage before is at fault"
            )
        kept, total = kept + int(np.count_nonzero(before_NK)), total + before_NK.size
    return Check("zeros kept", f"all {kept:,} of {parent.path} ({kept / total:.2%} of the linears)")


def _same_tensors(packed: Packed, parent: Checkpoint) -> Check:
    """The file decodes to the directory's numbers, bit for bit (what was rounded here: to its rounding)."""
    for name in packed.matrices:
        if not _is_same(packed, parent, name):
            raise FormatError(f"{packed.path}: {name} is not the one of {parent.path}; pack it again")
    for name in vector_sizes(parent.architecture, parent.names):
        if not np.array_equal(packed.vector(name), parent.float32(name)):
            raise FormatError(f"{packed.path}: {name} is not the one of {parent.path}; pack it again")
    return Check("tensors", f"all decode to those of {parent.path}")


def _is_same(packed: Packed, parent: Checkpoint, name: str) -> bool:
    """Whether matrix `name` decodes to what `pack` makes of the parent's: numbers, scales, multipliers."""
    tied = parent.architecture.tie_word_embeddings and name == HEAD
    tensor, values = f"{EMBEDDING if tied else name}.weight", packed.matrices[name].values
    if values in ("f32", "bf16"):
        return np.array_equal(packed.linear(name), parent.float32(tensor))
    if values == "i4" and (scheme := scheme_of(parent)) and scheme.grouped and name in parent.linears:
        expected_NK = dequantized(parent.raw(tensor), parent.float32(f"{name}.weight_scale"))
        return np.array_equal(packed.linear(name), expected_NK)
    if values == "i8" and parent.dtype(tensor) == "I8":
        expected_NK, scale_N = parent.raw(tensor), stored_scales(parent, name)
    else:
        rounded = rounded_matrix(parent, name, values)
        expected_NK, scale_N = rounded.whole_NK, rounded.scale_N
    return np.array_equal(packed.stored(name), expected_NK) and np.array_equal(packed.scale(name), scale_N)
