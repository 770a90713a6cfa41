"""`import`: a GGUF file becomes a Hugging Face directory, which every other stage reads."""

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer.architecture.families import read_anatomy
from gossamer.checkpoint.directory import MANIFEST, SHARD_BYTES, Checkpoint, library_versions
from gossamer.checkpoint.partial import locked, publish, refuse_existing
from gossamer.errors import CheckpointError
from gossamer.foreign.gguf_file import GgufFile
from gossamer.foreign.gguf_model import GgufModel
from gossamer.foreign.gguf_tokenizer import GgufTokenizer
from gossamer.foreign.gguf_weights import GgufWeights
from gossamer.foreign.shards import Planned, plan, weight_index, write_shard
from gossamer.job.options import option, record
from gossamer.job.report import Event, Progress, Result, quiet
from gossamer.tokens.tokenizer import Tokenizer

_TYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}


@dataclass(frozen=True)
class Import:
    """Decode every weight, and write config, tokenizer and chat template from the file's metadata."""

    model: str = option(help="GGUF file", positional=True)
    output_dir: str = option(help="directory to write", short="-o")
    dtype: Literal["f32", "bf16", "f16"] = option(
        "f32", help="type of the weights; f32 holds every GGUF exactly"
    )
    overwrite: bool = option(False, help="replace the output directory")


@dataclass(frozen=True)
class ImportResult(Result):
    """`stored` is how the file had its tensors; `num_bytes` is what the directory's weights take."""

    output_dir: str
    architecture: str
    stored: str
    num_parameters: int
    num_bytes: int
    chat_template: str
    seconds: float

    @property
    def closing(self) -> tuple[str, ...]:
        """The next command."""
        chat = " --chat" if self.chat_template == "yes" else ""
        return (f"Run it: gossamer run {self.output_dir} 'What is a spider?'{chat}",)


def import_model(job: Import, progress: Progress = quiet) -> ImportResult:
    """Import a model; nothing is written before all of the file's header has been understood."""
    start, output = time.monotonic(), Path(job.output_dir)
    refuse_existing(output, job.overwrite)
    file, (stored, dtype) = GgufFile.open(job.model), _TYPES[job.dtype]
    model, tokenizer = GgufModel(file), GgufTokenizer(file)
    config: dict[str, Any] = model.config | tokenizer.token_ids() | {"dtype": dtype}
    if len(tokenizer.tokens) > config["vocab_size"]:
        raise CheckpointError(
            f"{file.path}: {len(tokenizer.tokens)} tokens for an embedding of {config['vocab_size']} rows"
        )
    weights = GgufWeights(model, read_anatomy(config, str(file.path)), stored)
    texts = tokenizer.files() | {"config.json": _json(config)}
    tensors = {name: Planned(stored, tensor.shape) for name, tensor in weights.sources.items()}
    with _directory(output) as partial:
        zeros = _write_weights(partial, tensors, weights, progress)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        linears = Checkpoint.open(partial).linears
        Tokenizer.open(partial)
        manifest = _manifest(job, file, {f"{name}.weight": zeros[f"{name}.weight"] for name in linears})
        (partial / MANIFEST).write_text(_json(manifest), encoding="utf-8")
    types = Counter(tensor.type for tensor in weights.sources.values())
    return ImportResult(
        output_dir=job.output_dir,
        architecture=config["architectures"][0],
        stored=", ".join(f"{count} {kind}" for kind, count in types.most_common()),
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        chat_template="yes" if "chat_template.jinja" in texts else "no",
        seconds=time.monotonic() - start,
    )


@contextlib.contextmanager
def _directory(output: Path) -> Iterator[Path]:
    """`OUT.partial`, empty; it gets its name once it is whole, and goes where it is not."""
    partial = output.with_name(output.name + ".partial")
    with locked(partial):
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield partial
            publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_weights(
    directory: Path, tensors: Mapping[str, Planned], weights: GgufWeights, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Write the files of weights; returns each tensor's sparsity and mask hash, as in `gossamer.json`."""
    digests = {name: hashlib.sha256() for name in tensors}
    num_zeros = dict.fromkeys(tensors, 0)
    shards = plan(tensors, SHARD_BYTES)
    done, total = 0, sum(tensor.size for tensor in tensors.values())

    def pieces(names: list[str]) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in weights.pieces(names):
            digests[piece.name].update(piece.zeros)
            num_zeros[piece.name] += piece.num_zeros
            done += piece.values.size
            progress(Event("import", piece.name, done, total))
            yield piece.values

    for file, names in shards.items():
        write_shard(directory / file, {name: tensors[name] for name in names}, pieces(names))
    if len(shards) > 1:
        index = weight_index(shards, tensors)
        (directory / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8")
    return {
        name: {
            "sparsity": round(num_zeros[name] / tensor.size, 6),
            "mask_hash": digests[name].hexdigest(),
        }
        for name, tensor in tensors.items()
    }


def _manifest(job: Import, file: GgufFile, tensors: dict[str, Any]) -> dict[str, Any]:
    """`gossamer.json`: what stages write, with the file as the parent."""
    with file.path.open("rb") as stream:
        parent = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "stage": "import",
        "job": record(job),
        "parent": {"path": str(file.path), "hash": parent},
        "lineage": [{"stage": "import", "parent": parent}],
        "data": [],
        "versions": library_versions(),
        "num_threads": None,
        "metrics": {},
        "tensors": tensors,
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
