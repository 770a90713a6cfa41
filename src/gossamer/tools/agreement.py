"""Whether the engine computes what torch does, of a model's own weights and of what transformers reads."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.architecture.anatomy import HEAD
from gossamer.architecture.config import read_json
from gossamer.engine import LLM, Encoder
from gossamer.engine.encoder import TokenIds
from gossamer.errors import EngineError
from gossamer.evaluation.backends import without_bars
from gossamer.packed.header import vector_sizes
from gossamer.packed.reader import Packed

# |engine - torch| / |torch| of all logits. The last bit of a float can send an INT8 activation to the other
# side of a half; everything after it differs by a rounding step: 1e-7 up to there, 1e-2 from there.
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 5e-2
NUM_TOKENS = 24
ON_GPU = "the GPU agrees"
LOGITS, STATES, SCORES = "logits", "hidden states", "head's scores"

Numbers = dict[str, np.ndarray]  # by these names, a row for each token


@dataclass(frozen=True)
class Check:
    """A check that passed, or (`skipped`) could not be made here."""

    name: str
    detail: str
    skipped: bool = False


def backends(packed: Packed, directory: Path | None) -> Iterator[Check]:
    """The engine's numbers beside transformers': of the same weights, and of what it reads of a directory.

    They are a decoder's logits, or of an encoder the hidden states of a text's tokens, and its head's scores.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        yield Check("backends agree", "needs torch: pip install 'gossamer[compress]'", skipped=True)
        return
    length = min(NUM_TOKENS, packed.architecture.max_position_embeddings)
    added = packed.architecture.added
    least = added.offset if added else 0  # RoBERTa's padding is below it, which transformers gives no place
    ids = np.random.default_rng(0).integers(least, packed.architecture.vocab_size, size=length).tolist()
    is_encoder = packed.architecture.is_encoder
    found = _encoder_numbers(packed, ids) if is_encoder else _decoder_numbers(packed, ids)
    torch_found, tolerance, distance = _torch_numbers(packed, ids), FLOAT_TOLERANCE, _relative_error
    if any(packed.matrices[name].type.integer for name in _rounding(packed)):
        # Norms moved by 1e-7 change which inputs are rounded up, and so a real chat model's logits by 6%:
        # torch agrees with itself only to about what rounding inputs to int8 costs. Among random tokens one
        # may become an attention sink by that, or not; so the error is that of the token in the middle.
        distance = _median_error
        unrounded = _torch_numbers(packed, ids, rounded=False)
        cost = max(distance(unrounded[name], numbers) for name, numbers in torch_found.items())
        tolerance = max(INT8_TOLERANCE, 2 * cost)
    readings = {"backends agree": lambda: torch_found}
    if directory is not None:
        readings["transformers agrees"] = lambda: _transformers_numbers(directory, packed, ids)
        if _has_gpu():
            readings[ON_GPU] = lambda: _sparse_numbers(directory, packed, ids)
    exact = tolerance
    for name, read in readings.items():
        tolerance = max(exact, INT8_TOLERANCE) if name == ON_GPU else exact  # there linears take bfloat16
        for what, expected in read().items():
            error = distance(found[what], expected)
            if not error <= tolerance:
                raise EngineError(
                    f"{directory or packed.path}: {name}: the engine's {what} are {error:.2e} off torch's; "
                    f"at most {tolerance:.0e}"
                )
            yield Check(name, f"{what} of {length} tokens differ by {error:.1e}, at most {tolerance:.0e}")


def _rounding(packed: Packed) -> list[str]:
    """The matrices whose inputs the engine rounds where they are integers: all but an encoder's embedding."""
    embedding = packed.architecture.embedding if packed.architecture.is_encoder else None
    return [name for name in packed.matrices if name != embedding]


def _decoder_numbers(packed: Packed, ids: list[int]) -> Numbers:
    return {LOGITS: LLM(packed.path, kv_cache_dtype="f32").logits(ids)}


def _encoder_numbers(packed: Packed, ids: list[int]) -> Numbers:
    """Hidden states [T, D], and scores of the text [1, L] or of its tokens [T, L]."""
    encoder, row = Encoder(packed.path), TokenIds(ids, [0] * len(ids))
    [states_TD] = encoder.states([row])
    found = {STATES: states_TD}
    if encoder.head is not None:
        found[SCORES] = encoder.head.scores(encoder.pooled([row]))
    if encoder.token_head is not None:
        found[SCORES] = encoder.token_head.scores(states_TD)
    return found


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _median_error(found_TV: np.ndarray, expected_TV: np.ndarray) -> float:
    """The median over tokens of what `_relative_error` says of each."""
    pairs = zip(found_TV, expected_TV, strict=True)
    return float(np.median([_relative_error(found_V, expected_V) for found_V, expected_V in pairs]))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _sparse_numbers(directory: Path, packed: Packed, ids: list[int], device: str = "cuda") -> Numbers:
    """Of the directory with sparse linears (gossamer.gpu): bfloat16, or integers with the rest in float32."""
    import torch

    from gossamer.gpu import GossamerConfig

    is_quantized = "quantization_config" in read_json(directory / "config.json")
    dtype = torch.float32 if is_quantized else torch.bfloat16
    how = {"quantization_config": GossamerConfig(), "device_map": device}
    return _transformers_numbers(directory, packed, ids, dtype, **how)


def _transformers_numbers(
    directory: Path, packed: Packed, ids: list[int], dtype: Any = None, **how: Any
) -> Numbers:
    """Of the directory as transformers reads it, in float32 and without any code of ours unless told how."""
    import torch
    import transformers

    names = read_json(directory / "config.json").get("architectures") or ["AutoModel"]
    is_encoder = packed.architecture.is_encoder
    kind: Any = getattr(transformers, names[0] if is_encoder else "AutoModelForCausalLM")
    with without_bars():
        model = kind.from_pretrained(directory, dtype=dtype or torch.float32, local_files_only=True, **how)
    return _numbers(model.eval(), packed, ids)


def _torch_numbers(packed: Packed, ids: list[int], *, rounded: bool = True) -> Numbers:
    """float32, of transformers' model; inputs of integer matrices are `rounded` as in the engine."""
    import torch

    from gossamer.compress.int8 import fake_quantize_tokens, fake_quantize_twice
    from gossamer.training.whole_model import new_model

    anatomy = packed.architecture
    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    model = new_model(anatomy, config if anatomy.is_encoder else config | {"tie_word_embeddings": False})
    head = None if anatomy.is_encoder else packed.head
    vectors = vector_sizes(anatomy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            matrix = head if name == f"{HEAD}.weight" and head else name.removesuffix(".weight")
            if matrix not in packed.matrices and name not in vectors:
                continue  # the pooler of a model of vectors, which nothing here computes
            values = packed.linear(matrix) if matrix in packed.matrices else packed.vector(name)
            parameter.copy_(torch.from_numpy(values.copy()))
        for name, module in model.named_modules():
            matrix = packed.matrices.get(head if name == HEAD and head else name)
            if rounded and name != anatomy.embedding and matrix is not None and matrix.type.integer:
                round_ = fake_quantize_twice if name == HEAD else fake_quantize_tokens
                module.register_forward_pre_hook(lambda _, inputs, round_=round_: round_(inputs[0]))
    return _numbers(model, packed, ids)


def _numbers(model: Any, packed: Packed, ids: list[int]) -> Numbers:
    """What transformers' model computes of a row."""
    import torch

    with torch.no_grad():
        found = model(torch.tensor([ids], device=model.device), output_hidden_states=True)
    task = packed.architecture.task
    if not packed.architecture.is_encoder:
        numbers = {LOGITS: found.logits[0]}
    else:
        numbers = {STATES: found.hidden_states[-1][0]}
    if task in ("sequence", "tokens"):
        numbers[SCORES] = found.logits.reshape(-1, found.logits.shape[-1])
    if task == "spans":
        numbers[SCORES] = torch.stack([found.start_logits[0], found.end_logits[0]], 1)
    return {name: it.float().cpu().numpy() for name, it in numbers.items()}
