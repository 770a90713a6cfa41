"""What a directory is that does not fit, and what to give instead. Loaded only once something is wrong.

Each function returns the error to raise: it says what was found, and what to do.
"""

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.architecture.config import LFS_POINTER, read_json
from gossamer.checkpoint.gguf import refuse_gguf
from gossamer.checkpoint.weights import STORAGE, Entry
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError

if TYPE_CHECKING:
    from gossamer.checkpoint.directory import Checkpoint

ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHER_WEIGHTS = {"*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX"}

_PREFIXES = {  # what a tensor's name begins with, and how that came about
    "_orig_mod.": (
        "saved from a model that torch.compile had wrapped; save the model inside (`model._orig_mod`)"
    ),
    "module.": "saved from a model inside DataParallel; save the model inside (`model.module`)",
    "base_model.model.": (
        "saved with a PEFT adapter in it; merge the adapter (`merge_and_unload`) and save that model"
    ),
    "layers.": "saved from the decoder without its head; save the whole ...ForCausalLM",
    "embed_tokens.": "saved from the decoder without its head; save the whole ...ForCausalLM",
}
_PARTS = {  # what a tensor's name has in it, and which format does so
    ".lora_A.": "a PEFT adapter (LoRA) inside the model; merge it (`merge_and_unload`) and save that model",
    ".base_layer.": "a PEFT adapter inside the model; merge it (`merge_and_unload`) and save that model",
    ".g_idx": "weights quantized by GPTQ; give the model that was quantized",
    ".qweight": "weights quantized by GPTQ or AWQ; give the model that was quantized",
    ".quant_state.": "weights quantized by bitsandbytes; give the model that was quantized",
    ".SCB": "weights quantized by bitsandbytes; give the model that was quantized",
    ".weight_packed": "quantized weights (compressed-tensors); give the model that was quantized",
    ".weight_scale_inv": "FP8 weights; give the model in bfloat16",
    ".bitmask": "sparse weights that are stored compressed; `gossamer import` writes them out",
}


def no_model(path: Path) -> GossamerError:
    """For a path without a config.json in it, or with a PEFT adapter in it."""
    expected = "expected a Hugging Face directory (config.json and *.safetensors)"
    if path.is_file():
        refuse_gguf(path)
        advice = {
            ".goss": "a packed model; give the directory that it was packed from",
            ".safetensors": "a file of weights; give the directory that it lies in",
        }
        return CheckpointError(
            f"{path}: found {advice.get(path.suffix, 'no directory, but a file')}; {expected}"
        )
    if not path.is_dir():
        return CheckpointError(f"{path}: found nothing; {expected}")
    if (path / ADAPTER).is_file():
        return adapter(path)
    if snapshots := sorted(path.glob("snapshots/*/config.json")):
        return CheckpointError(f"{path}: found a folder of the hub's cache; give {snapshots[-1].parent}")
    if inner := sorted(path.glob("*/config.json")):
        return CheckpointError(f"{path}: found no model here, but in {inner[-1].parent}; give that directory")
    if (path / "params.json").is_file() and [*path.glob("consolidated*.pth")]:
        return UnsupportedError(f"{path}: found Llama's original files (params.json); {expected}")
    if files := sorted(path.glob("*.gguf")):
        return UnsupportedError(f"{files[0]}: found a GGUF file; `gossamer import` makes a directory of it")
    return CheckpointError(f"{path}: found a directory without config.json; {expected}")


def adapter(path: Path) -> GossamerError:
    """For a directory with an adapter in it, beside a base model or alone."""
    base = read_json(path / ADAPTER).get("base_model_name_or_path")
    found, advice = f"a PEFT adapter for {base}, and no model", _MERGE
    if (path / "config.json").is_file():
        found, advice = "a PEFT adapter beside the model", f"take its files out to leave it away, or {_MERGE}"
    return UnsupportedError(f"{path / ADAPTER}: found {found}; {advice}")


_MERGE = "merge it (peft's `merge_and_unload`, then `save_pretrained`) and give that directory"


def no_weights(path: Path, given: object = None) -> GossamerError:
    """For a directory with a config.json and without model.safetensors or its index, or what is `given`."""
    if given is not None:
        return CheckpointError(
            f"{path / 'config.json'}: transformers_weights is {given!r}, which is no file of this directory"
        )
    if pickles := sorted(chain.from_iterable(map(path.glob, _PICKLES))):
        return UnsupportedError(
            f"{pickles[0]}: pickle weights can run code when opened; supported: safetensors "
            "(convert them with transformers' save_pretrained)"
        )
    if ggufs := sorted(path.glob("*.gguf")):
        return UnsupportedError(f"{ggufs[0]}: found a GGUF file; `gossamer import` makes a directory of it")
    for pattern, kind in _OTHER_WEIGHTS.items():
        if files := sorted(path.glob(pattern)):
            return UnsupportedError(f"{files[0]}: found weights of {kind}; supported: safetensors")
    expected = "no model.safetensors and no model.safetensors.index.json; expected either"
    others = ", ".join(sorted(file.name for file in path.glob("*.safetensors") if file.is_file()))
    found = f" (found {others}; rename a single file, or restore the index of several)" if others else ""
    return CheckpointError(f"{path}: {expected}{found}")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is Git LFS's stand-in for the real one, which was not fetched."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def unreadable(file: Path, error: Exception) -> GossamerError:
    """For a weight file that the safetensors library refuses."""
    if is_lfs_pointer(file):
        return CheckpointError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull`")
    return CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it again")


def two_families(path: Path, model_type: object, architecture: str) -> GossamerError:
    """For a config.json whose `model_type` and `architectures` are of different families."""
    return CheckpointError(
        f"{path / 'config.json'}: model_type is {model_type!r}, but architectures has a {architecture}; "
        "transformers would load the former: correct one of the two"
    )


def misfit(checkpoint: "Checkpoint", shapes: Mapping[str, tuple[int, ...]]) -> GossamerError:
    """For tensors that are not the architecture's: the way they were saved, or else the odd one."""
    found = checkpoint.entries
    for name, entry in found.items():
        for prefix, reason in _PREFIXES.items():
            if name.startswith(prefix):
                return UnsupportedError(f"{entry.file}: tensor {name} was {reason}")
        for part, reason in _PARTS.items():
            if part in f"{name}.":
                return UnsupportedError(f"{entry.file}: tensor {name} is of {reason}")
    if odd := next((name for name in shapes if not _fits(found.get(name), shapes[name])), None):
        return _odd_tensor(checkpoint, odd, found.get(odd), shapes[odd])
    ignored = checkpoint.architecture.ignored
    extra = next(name for name in found if name not in shapes and not re.fullmatch(ignored, name))
    return UnsupportedError(
        f"{found[extra].file}: tensor {extra} is not part of a {checkpoint.architecture.model_type} of "
        f"{checkpoint.architecture.num_layers} layers, as config.json has it; cannot place it"
    )


def _fits(entry: Entry | None, shape: tuple[int, ...]) -> bool:
    return entry is not None and entry.shape == shape and entry.dtype in STORAGE


def _odd_tensor(
    checkpoint: "Checkpoint", name: str, entry: Entry | None, shape: tuple[int, ...]
) -> GossamerError:
    if entry is None:
        is_head = name == f"{checkpoint.architecture.head}.weight"
        hint = ", or tie_word_embeddings true in config.json" if is_head else ""
        hint = ", because the weight is int8" if name.endswith(".weight_scale") else hint
        path = checkpoint.path
        return CheckpointError(f"{path}: tensor {name} is missing; expected one of shape {list(shape)}{hint}")
    if entry.shape != shape:
        return CheckpointError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}; expected {list(shape)}"
        )
    return UnsupportedError(f"{entry.file}: tensor {name} is {entry.dtype}; supported: {', '.join(STORAGE)}")
