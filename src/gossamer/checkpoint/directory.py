"""A Hugging Face model directory as named NumPy tensors, and the atomic way to derive a new one from it.

Reading validates first: what `Checkpoint.open` returns has every tensor of its architecture, in the right
shape, in files that are whole. Writing goes to `OUT.partial/` and is renamed once its zeros are checked.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.architecture.config import read_json
from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.partial import (
    CHECKPOINTS,
    check_interrupted,
    holds_checkpoint,
    interrupted,
    locked,
    publish,
    refuse_existing,
)
from gossamer.checkpoint.weights import STORAGE, Entry, is_finite, read_header, to_float32, write_safetensors
from gossamer.errors import CheckpointError, ConfigError
from gossamer.job.options import record

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
    "README.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*",
    "vocab.txt", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "[0-9]_*/*",  # of sentence-transformers: what becomes of an encoder's tokens
)  # fmt: skip
MANIFEST = "gossamer.json"
HOW_IT_STARTED = ("overwrite", "resume")  # options that say nothing of the output, and are not recorded
SHARD_BYTES = 2 << 30


class Checkpoint:
    """A validated model directory. Tensors are read on demand and never all held at once."""

    downloaded: Mapping[str, str] | None = None  # repository, revision, commit of one opened by its hub name

    def __init__(self, path: Path, config: dict[str, Any], entries: Mapping[str, Entry]) -> None:
        self.path, self.config, self.entries = path, config, entries
        self.architecture = read_anatomy(config, str(path / "config.json"))

    @classmethod
    def open(cls, path: str | Path, *, offline: bool = False) -> "Checkpoint":
        """Read config and headers; raises CheckpointError or UnsupportedError naming file and tensor.

        Where nothing is at `path`, it is `org/name[@revision]` on the hub: raises what `hub.snapshot` does.
        """
        directory, downloaded = Path(path), None
        if not directory.exists():
            from gossamer.checkpoint.hub import snapshot

            directory, downloaded = snapshot(str(path), offline=offline)
        config = _read_config(directory)
        files = _weight_files(directory, config.pop("transformers_weights", None))
        entries = {name: entry for file in files for name, entry in read_header(file).items()}
        checkpoint = cls(directory, config, entries)
        if (found := config.get("model_type", expected := checkpoint.architecture.model_type)) != expected:
            from gossamer.checkpoint.diagnosis import two_families

            raise two_families(directory, found, expected)
        anatomy = checkpoint.architecture
        if anatomy.tie_word_embeddings and f"{anatomy.head}.weight" in entries:
            from gossamer.checkpoint.tying import resolve_tied_head

            checkpoint = cls(directory, *resolve_tied_head(checkpoint))
        if anatomy.is_encoder:
            from gossamer.checkpoint.old_names import renamed

            checkpoint.entries = renamed(checkpoint)
        if any(block.fused for block in checkpoint.architecture.blocks):
            from gossamer.checkpoint.fused import split

            checkpoint.entries = split(checkpoint.entries, checkpoint.architecture, directory)
        checkpoint.entries, checkpoint.downloaded = _expected_entries(checkpoint), downloaded
        return checkpoint

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The stage's record (`gossamer.json`), None in a directory that Gossamer did not write."""
        if not (file := self.path / MANIFEST).exists():
            return None
        if not isinstance(steps := (found := read_json(file)).get("lineage", []), list):
            raise CheckpointError(f"{file}: lineage is {steps!r:.80}; take the file out, or restore it")
        return found

    def dtype(self, name: str) -> str:
        return self.entries[name].dtype

    def raw(self, name: str) -> np.ndarray:
        """The tensor as stored (read-only, mapped); raises CheckpointError on NaN or infinite values."""
        entry = self.entries[name]
        array = entry.array()
        if not is_finite(array, entry.dtype):
            raise CheckpointError(
                f"{entry.file}: tensor {name} holds NaN or infinite values; the weights are damaged"
            )
        return array

    def float32(self, name: str) -> np.ndarray:
        """The tensor as float32; same errors as `raw`."""
        return to_float32(self.raw(name), self.dtype(name))

    def zeros(self, name: str) -> np.ndarray:
        """Boolean array, True where the stored weight is zero (-0.0 counts): the mask's complement."""
        array, magnitude = self.raw(name), {"BF16": 0x7FFF, "F8_E4M3": 0x7F}.get(self.dtype(name))
        return array == 0 if magnitude is None else (array & magnitude) == 0

    def sparsity(self) -> float:
        """Fraction of zeros over all decoder linears."""
        zeros = [
            (int(np.count_nonzero(self.zeros(f"{n}.weight"))), self.entries[f"{n}.weight"])
            for n in self.linears
        ]
        return sum(count for count, _ in zeros) / sum(math.prod(entry.shape) for _, entry in zeros)

    @property
    def linears(self) -> list[str]:
        return self.architecture.linear_names()

    @cached_property
    def hash(self) -> str:
        """sha256 of configuration, tokenizer and every tensor: the directory's identity as a parent."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        tokenizer = self.path / "tokenizer.json"
        digest.update(tokenizer.read_bytes() if tokenizer.exists() else b"")
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            digest.update(entry.array().data.cast("B"))
        return digest.hexdigest()

    @contextlib.contextmanager
    def derive(
        self, output: str | Path, job: object, stage: str, *, overwrite: bool = False, resume: bool = False
    ) -> Iterator["Derived"]:
        """Write a child directory: whole and renamed into place, or not there at all.

        Only a run that left checkpoints stays in `OUT.partial/` when it fails, for `resume` to go on with.
        `job` is the stage's dataclass of options. Raises ConfigError if `output` exists without
        `overwrite` or another process is writing it, CheckpointError if the child lost one of its parent's
        zeros or tensors, Interrupted after Ctrl-C if there is a checkpoint.
        """
        output = Path(output)
        partial, _ = output.with_name(output.name + ".partial"), self.manifest  # whose faults show now
        refuse_existing(output, overwrite)
        if output.exists() and output.resolve() == self.path.resolve():
            raise ConfigError(f"{output} is the input directory; give another --output-dir")
        check_interrupted(partial, overwrite, resume)
        with locked(partial):
            try:
                options = {name: value for name, value in record(job).items() if name not in HOW_IT_STARTED}
                target = Derived(self, output, partial, options, stage)
                target._begin(resume)
                yield target
                target._finish()
            except KeyboardInterrupt as error:
                raise interrupted(partial, error) from error
            finally:
                if not holds_checkpoint(partial):
                    shutil.rmtree(partial, ignore_errors=True)


class Derived:
    """A child directory in the making, at `path` (`OUT.partial`).

    `sparsity`: the fraction of zeros over all decoder linears, once the child is whole; NaN before.
    `written`: the names of the tensors that came so far; `shards`: their files. `report`, if there is one,
    writes further files in the end, and is given what `gossamer.json` says of each linear.
    """

    report: Callable[[dict[str, Any]], None] | None = None

    def __init__(
        self, parent: Checkpoint, output: Path, partial: Path, job: dict[str, Any], stage: str
    ) -> None:
        self.parent, self.output, self.path, self.job, self.stage = parent, output, partial, job, stage
        self.config = dict(parent.config)
        self.metrics: dict[str, Any] = {}
        self.data: list[dict[str, Any]] = []
        self.num_threads: int | None = None
        self.sparsity = math.nan
        self.written: set[str] = set()
        self.shards = self._stored = ShardWriter(self.path)
        if any(block.fused for block in parent.architecture.blocks):
            from gossamer.checkpoint.fused import Joining

            self._stored = Joining(self.shards, parent.architecture)

    def _begin(self, resume: bool) -> None:
        """Clear the directory of what an earlier run left in it, unless that is to be resumed."""
        for left in self.path.glob("*") if not resume else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        copy_companions(self.parent.path, self.path)

    def write(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Store one tensor: `array` in storage form (uint16 bit patterns for BF16)."""
        assert name not in self.written, name
        self._stored.add(name, array, dtype)
        self.written.add(name)

    def copy_rest(self) -> None:
        """Copy every tensor of the parent that has not been written."""
        for name in self.parent.names:
            if name not in self.written:
                self.write(name, self.parent.raw(name), self.parent.dtype(name))

    def _finish(self) -> None:
        if lost := set(self.parent.names) - self.written:
            raise CheckpointError(
                f"{self.output}: the stage wrote no {sorted(lost)[0]} ({len(lost)} tensors missing)"
            )
        self._stored.close()
        _write_json(self.path / "config.json", self.config)
        child = Checkpoint.open(self.path)
        tensors, self.sparsity = _check_zeros(self.parent, child)
        _write_json(self.path / MANIFEST, self._record(tensors))
        if self.report is not None:
            self.report(tensors)
        publish(self.path, self.output)
        shutil.rmtree(self.output / CHECKPOINTS, ignore_errors=True)  # only now: a kill may come in between

    def _record(self, tensors: dict[str, Any]) -> dict[str, Any]:
        parent_manifest = self.parent.manifest or {}
        step = {"stage": self.stage, "parent": self.parent.hash, "job": self.job, "data": self.data}
        return {
            "stage": self.stage,
            "job": self.job,
            "parent": {"path": str(self.parent.path), "hash": self.parent.hash},
            "lineage": [*parent_manifest.get("lineage", []), step],
            "origin": self.parent.downloaded or parent_manifest.get("origin"),
            "data": self.data,
            "versions": library_versions(),
            "num_threads": self.num_threads,
            "metrics": self.metrics,
            "tensors": tensors,
        }


class ShardWriter:
    """Collects tensors and writes a shard whenever `SHARD_BYTES` have come together.

    `pending`: tensors that are in no file yet; `shards`: the names in each file, `total_bytes` their size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pending: dict[str, tuple[np.ndarray, str]] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, array: np.ndarray, dtype: str) -> None:
        self.pending[name] = (np.ascontiguousarray(array, STORAGE[dtype]), dtype)
        if sum(tensor.nbytes for tensor, _ in self.pending.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            write_safetensors(self.file(len(self.shards)), self.pending)
            self.total_bytes += sum(tensor.nbytes for tensor, _ in self.pending.values())
            self.shards.append(list(self.pending))
            self.pending = {}

    def file(self, index: int, count: int | None = None) -> Path:
        """Where a shard is written, and in the end stays, as one of `count`."""
        name = "model" if count == 1 else f"model-{index + 1:05}{f'-of-{count:05}' if count else ''}"
        return self.directory / f"{name}.safetensors"

    def close(self) -> None:
        self._flush()
        count = len(self.shards)
        files = [self.file(index).rename(self.file(index, count)).name for index in range(count)]
        for left in set(self.directory.glob("model*.safetensors")) - {
            self.directory / file for file in files
        }:
            left.unlink()  # by a run that was interrupted here
        if count > 1:
            from gossamer.checkpoint.index import write_index

            write_index(self.directory, dict(zip(files, self.shards, strict=True)), self.total_bytes)


def companions(directory: Path) -> list[Path]:
    """The files that go with a model's weights from stage to stage."""
    return [file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()]


def copy_companions(directory: Path, target: Path) -> None:
    """Copy them to another directory, those of its folders to folders of the same names."""
    for file in companions(directory):
        (copy := target / file.relative_to(directory)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(
        text, encoding="utf-8", errors="backslashreplace"
    )  # half a surrogate pair: as JSON has it


def _read_config(directory: Path) -> dict[str, Any]:
    """The configuration, without what only announces that weights are sparse."""
    file = directory / "config.json"
    if not file.is_file() or (directory / "adapter_config.json").is_file():
        from gossamer.checkpoint.diagnosis import no_model

        raise no_model(directory)
    config = read_json(file)
    if config.keys() & {"quantization_config", "sparsity_config"}:
        from gossamer.checkpoint.schemes import readable_config

        config = readable_config(config, str(file))
    return config


def _weight_files(directory: Path, given: str | None) -> list[Path]:
    """The files that transformers would read; `given` are those that the configuration names."""
    if given is None and (whole := directory / "model.safetensors").is_file():
        return [whole]
    from gossamer.checkpoint.index import weight_files

    return weight_files(directory, given)


def _expected_entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Exactly the architecture's tensors (and their scales), or an error that names the odd one."""
    found, anatomy = checkpoint.entries, checkpoint.architecture
    shapes = anatomy.tensor_shapes | {name: it for name, it in anatomy.optional.items() if name in found}
    for name in checkpoint.linears:
        if (entry := found.get(f"{name}.weight")) and entry.dtype in ("I8", "F8_E4M3"):
            from gossamer.checkpoint.schemes import scale_shape

            shapes[f"{name}.weight_scale"] = scale_shape(checkpoint.config, shapes[f"{name}.weight"])
    names = {name for name in found if not re.fullmatch(anatomy.ignored, name)}
    fit = all(found[n].shape == shapes[n] and found[n].dtype in STORAGE for n in names & shapes.keys())
    if names != shapes.keys() or not fit:
        from gossamer.checkpoint.diagnosis import misfit

        raise misfit(checkpoint, shapes)
    return {name: found[name] for name in shapes}


def hash_mask(zeros_NK: np.ndarray) -> str:
    """sha256 of one matrix's zeros, as `gossamer.json` records it; `masks` hashes those of a model."""
    return hashlib.sha256(np.packbits(zeros_NK).tobytes()).hexdigest()


def _check_zeros(parent: Checkpoint, child: Checkpoint) -> tuple[dict[str, Any], float]:
    """Raise CheckpointError unless the parent's zeros are zeros in the child.

    Returns sparsity and mask hash of each linear, for `gossamer.json`, and the sparsity of all of them.
    """
    tensors, num_zeros, num_weights = {}, 0, 0
    for name in (f"{linear}.weight" for linear in child.linears):
        zeros_NK = child.zeros(name)
        if lost := int(np.count_nonzero(parent.zeros(name) & ~zeros_NK)):
            raise CheckpointError(
                f"{child.path}: {name} lost {lost} of its parent's zeros; nothing was written"
            )
        tensors[name] = {"sparsity": round(float(zeros_NK.mean()), 6), "mask_hash": hash_mask(zeros_NK)}
        num_zeros += int(np.count_nonzero(zeros_NK))
        num_weights += zeros_NK.size
    return tensors, num_zeros / num_weights


def library_versions() -> dict[str, str]:
    versions = {}
    for package in ("gossamer", "numpy", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
