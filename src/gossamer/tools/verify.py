"""`verify`: is this model sound, did it keep its parent's zeros, does the engine compute what torch does?

Every check either passes and says what it looked at, or raises the error that names what is wrong.
"""

import collections
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gossamer.architecture.anatomy import EMBEDDING, HEAD
from gossamer.architecture.config import read_json
from gossamer.checkpoint.directory import Checkpoint, hash_mask
from gossamer.checkpoint.schemes import dequantized
from gossamer.engine import LLM
from gossamer.errors import CheckpointError, EngineError, FormatError
from gossamer.job.options import option
from gossamer.job.report import Event, Progress, Result, Table, quiet
from gossamer.packed.cache import open_packed
from gossamer.packed.from_checkpoint import rounded_matrix, scheme_of, stored_scales
from gossamer.packed.header import StorageKind, vector_sizes
from gossamer.packed.reader import Packed

# |engine - torch| / |torch| of all logits. The last bit of a float can send an INT8 activation to the other
# side of a half; everything after it differs by a rounding step: 1e-7 up to there, 1e-2 from there.
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 5e-2
NUM_TOKENS = 24


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
class Check:
    """A check that passed, or (`skipped`) could not be made here."""

    name: str
    detail: str
    skipped: bool = False


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
        checks += _backends(open_packed(path, progress, offline=job.offline), path if path.is_dir() else None)
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


def _backends(packed: Packed, directory: Path | None) -> Iterator[Check]:
    """The engine's logits beside transformers': of the same weights, and of what it reads of a directory.

    UnsupportedError of an encoder.
    """
    packed.refuse_encoder()
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        yield Check("backends agree", "needs torch: pip install 'gossamer[compress]'", skipped=True)
        return
    length = min(NUM_TOKENS, packed.architecture.max_position_embeddings)
    ids = np.random.default_rng(0).integers(packed.architecture.vocab_size, size=length).tolist()
    found_TV = LLM(packed.path, kv_cache_dtype="f32").logits(ids)
    torch_TV, tolerance, distance = _torch_logits(packed, ids), FLOAT_TOLERANCE, _relative_error
    if any(matrix.type.integer for matrix in packed.matrices.values()):
        # Norms moved by 1e-7 change which inputs are rounded up, and so a real chat model's logits by 6%:
        # torch agrees with itself only to about what rounding inputs to int8 costs. Among random tokens one
        # may become an attention sink by that, or not; so the error is that of the token in the middle.
        distance = _median_error
        cost = distance(_torch_logits(packed, ids, rounded=False), torch_TV)
        tolerance = max(INT8_TOLERANCE, 2 * cost)
    readings = {"backends agree": lambda: torch_TV}
    if directory is not None:
        readings["transformers agrees"] = lambda: _transformers_logits(directory, ids)
    for name, read in readings.items():
        error = distance(found_TV, read())
        if not error <= tolerance:
            raise EngineError(
                f"{directory or packed.path}: {name}: the engine's logits are {error:.2e} off torch's; "
                f"at most {tolerance:.0e}"
            )
        yield Check(name, f"logits of {length} tokens differ by {error:.1e}, at most {tolerance:.0e}")


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _median_error(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """The median over tokens of what `_relative_error` says of each."""
    pairs = zip(found_TV, expected_TV, strict=True)
    return float(np.median([_relative_error(found_V, expected_V) for found_V, expected_V in pairs]))


def _transformers_logits(directory: Path, ids: list[int]) -> np.ndarray:
    """float32 [T, V] of the directory as transformers reads it, without any code of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()


def _torch_logits(packed: Packed, ids: list[int], *, rounded: bool = True) -> np.ndarray:
    """float32 [T, V] of transformers' model; inputs of integer matrices are `rounded` as in the engine."""
    import torch

    from gossamer.compress.int8 import fake_quantize_tokens, fake_quantize_twice
    from gossamer.training.whole_model import new_model

    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    model = new_model(packed.architecture, config | {"tie_word_embeddings": False})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = packed.head if name == f"{HEAD}.weight" else name.removesuffix(".weight")
            values = packed.linear(matrix) if matrix in packed.matrices else packed.vector(name)
            parameter.copy_(torch.from_numpy(values.copy()))
        for name, module in model.named_modules():
            matrix = packed.matrices.get(packed.head if name == HEAD else name)
            if rounded and name != EMBEDDING and matrix is not None and matrix.type.integer:
                round_ = fake_quantize_twice if name == HEAD else fake_quantize_tokens
                module.register_forward_pre_hook(lambda _, inputs, round_=round_: round_(inputs[0]))
        return model(torch.tensor([ids])).logits[0].numpy()
