"""`import`: other programs' models become a Hugging Face directory, which every other stage reads.

Their recipes become command lines, which make the same run.
"""

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
from gossamer.checkpoint.directory import MANIFEST, SHARD_BYTES, Checkpoint, copy_companions, library_versions
from gossamer.checkpoint.index import write_index
from gossamer.checkpoint.partial import locked, publish, refuse_existing
from gossamer.errors import CheckpointError, ConfigError
from gossamer.foreign.bitmask import BitmaskWeights
from gossamer.foreign.gguf_card import model_card
from gossamer.foreign.gguf_file import GgufFile
from gossamer.foreign.gguf_model import GgufModel
from gossamer.foreign.gguf_tokenizer import GgufTokenizer
from gossamer.foreign.gguf_weights import GgufWeights
from gossamer.foreign.recipe import Recipe, translate
from gossamer.foreign.recipe_file import SUFFIXES
from gossamer.foreign.shards import Planned, plan, write_shard
from gossamer.job.options import option, record
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.tokens.tokenizer import Tokenizer

_TYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}


@dataclass(frozen=True)
class Import:
    """Decode every weight of a GGUF file, or of a directory whose sparse weights are stored compressed.

    Or say with which command lines a recipe of SparseML or llm-compressor is run here; that of a directory is
    its `recipe.yaml`, where no output is asked for.
    """

    model: str = option(
        help="GGUF file; directory of compressed-tensors' sparse-bitmask; or recipe (.yaml, .md)",
        positional=True,
    )
    output_dir: str | None = option(None, help="directory to write (for a recipe, nothing is)", short="-o")
    dtype: Literal["f32", "bf16", "f16"] = option(
        "f32", help="type of the weights; f32 holds all of them exactly"
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


@dataclass(frozen=True)
class RecipeResult(Result):
    """The command lines of a recipe's run, and what became of each of its fields."""

    recipe: str
    commands: tuple[str, ...]
    fields: tuple[tuple[str, str, str], ...]

    def tables(self) -> list[Table]:
        """A row for each field."""
        return [Table(self.recipe, ("the recipe's", "says", "here"), self.fields)]

    @property
    def closing(self) -> tuple[str, ...]:
        """The command lines, and what is to be put into them."""
        trains = any("TRAINING_TEXT" in command for command in self.commands)
        also = "; how long to train is --num-tokens" if trains else ""
        return (f"To run it here (what a recipe does not say is in capitals{also}):", *self.commands)


@dataclass(frozen=True)
class _Found:
    """What is to be written: weights, texts of files by name, whose companions; `stored`: for people."""

    weights: GgufWeights | BitmaskWeights
    config: dict[str, Any]
    texts: dict[str, str]
    companions_of: Path | None
    stored: str


def import_model(job: Import, progress: Progress = quiet) -> ImportResult | RecipeResult:
    """Import a model; nothing is written before all of the input's headers have been understood.

    Of a recipe nothing is written at all.
    """
    path = Path(job.model)
    recipe = path / "recipe.yaml" if path.is_dir() and job.output_dir is None else path
    if recipe.suffix in SUFFIXES and (recipe.is_file() or not path.exists()):
        return _recipe(job, translate(recipe))
    if job.output_dir is None:
        raise ConfigError(f"{path}: a model is written to a directory; give one with -o")
    start, output = time.monotonic(), Path(job.output_dir)
    refuse_existing(output, job.overwrite)
    if output.exists() and output.resolve() == path.resolve():
        raise ConfigError(f"{output} is the input; give another --output-dir")
    dtype, _ = _TYPES[job.dtype]
    found = _read_bitmask(path, job) if path.is_dir() else _read_gguf(path, job)
    tensors = {name: Planned(dtype, shape) for name, shape in found.weights.shapes.items()}
    with _directory(output) as partial:
        zeros = _write_weights(partial, tensors, found.weights, progress)
        if found.companions_of is not None:
            copy_companions(found.companions_of, partial)
        for name, text in (found.texts | {"config.json": _json(found.config)}).items():
            (partial / name).write_text(text, encoding="utf-8")
        linears = Checkpoint.open(partial).linears
        Tokenizer.open(partial)
        manifest = _manifest(job, path, {f"{name}.weight": zeros[f"{name}.weight"] for name in linears})
        (partial / MANIFEST).write_text(_json(manifest), encoding="utf-8")
    return ImportResult(
        output_dir=job.output_dir,
        architecture=found.config["architectures"][0],
        stored=found.stored,
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        chat_template="yes" if (output / "chat_template.jinja").exists() else "no",
        seconds=time.monotonic() - start,
    )


def _recipe(job: Import, recipe: Recipe) -> RecipeResult:
    if job.output_dir is not None:
        raise ConfigError(f"{job.model} is a recipe, of which command lines are made; leave -o out")
    return RecipeResult(job.model, recipe.commands, recipe.rows)


def _read_gguf(path: Path, job: Import) -> _Found:
    file, (stored, dtype) = GgufFile.open(path), _TYPES[job.dtype]
    model, tokenizer = GgufModel(file), GgufTokenizer(file)
    config: dict[str, Any] = model.config | tokenizer.token_ids() | {"dtype": dtype}
    if len(tokenizer.tokens) > config["vocab_size"]:
        raise CheckpointError(
            f"{path}: {len(tokenizer.tokens)} tokens for an embedding of {config['vocab_size']} rows"
        )
    weights = GgufWeights(model, read_anatomy(config, str(path)), stored)
    types = Counter(tensor.type for tensor in weights.sources.values())
    words = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    card = model_card(file)
    texts = tokenizer.files() | ({"README.md": card} if card else {})
    return _Found(weights, config, texts, None, words)


def _read_bitmask(path: Path, job: Import) -> _Found:
    stored, dtype = _TYPES[job.dtype]
    weights = BitmaskWeights(path, stored)
    config = {key: value for key, value in weights.config.items() if key != "torch_dtype"} | {"dtype": dtype}
    read_anatomy(config, str(path / "config.json"))
    words = f"{len(weights.modules)} sparse-bitmask of {len(weights.shapes)}"
    return _Found(weights, config, {}, path, words)


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
    directory: Path, tensors: Mapping[str, Planned], weights: GgufWeights | BitmaskWeights, progress: Progress
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
        write_index(directory, shards, sum(tensor.num_bytes for tensor in tensors.values()))
    return {
        name: {
            "sparsity": round(num_zeros[name] / tensor.size, 6),
            "mask_hash": digests[name].hexdigest(),
        }
        for name, tensor in tensors.items()
    }


def _manifest(job: Import, path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """`gossamer.json`: what stages write, with the file or the files of weights as the parent."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)  # one digest of all
    options = record(job)
    return {
        "stage": "import",
        "job": options,
        "parent": {"path": str(path), "hash": digest.hexdigest()},
        "lineage": [{"stage": "import", "parent": digest.hexdigest(), "job": options, "data": []}],
        "data": [],
        "versions": library_versions(),
        "num_threads": None,
        "metrics": {},
        "tensors": tensors,
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
