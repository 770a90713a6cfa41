"""What a GGUF file says of its model, as a `config.json`, and which tensors are which of transformers'.

Everything under the architecture's own keys must be understood: a setting that is passed over would give a
model that answers, but wrongly.
"""

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from gossamer.architecture.anatomy import Anatomy
from gossamer.architecture.config import Config
from gossamer.architecture.frequencies import inverse_frequencies
from gossamer.architecture.rope import Rope
from gossamer.errors import CheckpointError, UnsupportedError
from gossamer.foreign.gguf_file import GgufFile, Tensor, to_float32

ROPE_FREQS = "rope_freqs.weight"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class _Architecture:
    """A word of `general.architecture`: transformers' class, and what llama.cpp's converter does to rows.

    `paired`: the rows of q and k are stored so that the two numbers which rope turns together are neighbours;
    transformers has them half a head apart.
    """

    hf_class: str
    model_type: str
    names: gguf.MODEL_ARCH
    paired: bool = False


_MISTRAL = _Architecture("MistralForCausalLM", "mistral", gguf.MODEL_ARCH.LLAMA, paired=True)
_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", gguf.MODEL_ARCH.LLAMA, paired=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", gguf.MODEL_ARCH.QWEN3),
}
# Keys that say nothing which is not read elsewhere, and those that must have the value which changes nothing.
_REDUNDANT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_USED = (
    *_SIZES, "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
)  # fmt: skip


class GgufModel:
    """A GGUF file's model: `config` as transformers writes it, and where each of its tensors comes from."""

    def __init__(self, file: GgufFile) -> None:
        """Raises UnsupportedError for an architecture or a setting that is not understood."""
        self.file = file
        name = file.get("general.architecture", str)
        if name not in _ARCHITECTURES:
            raise UnsupportedError(
                f"{file.path}: found the architecture {name!r}; supported: {', '.join(_ARCHITECTURES)}"
            )
        if file.metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedError(
                f"{file.path}: one of {file.metadata['split.count']} parts of a model; join them first with "
                "llama.cpp's `llama-gguf-split --merge`"
            )
        prefix = f"{name}."
        fields = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
        self._fields = Config(fields, str(file.path))
        self._refuse_unknown(fields, prefix)
        windowed = name == "llama" and self._fields.get("attention.sliding_window")
        self._architecture = _MISTRAL if windowed else _ARCHITECTURES[name]
        self.config = self._read_config()

    def _refuse_unknown(self, fields: dict[str, Any], prefix: str) -> None:
        for key, value in fields.items():
            if key in _NEUTRAL and value != _NEUTRAL[key]:
                raise UnsupportedError(
                    f"{self.file.path}: found {prefix}{key} = {value!r:.80}; supported: {_NEUTRAL[key]!r}"
                )
            if key not in (*_USED, *_REDUNDANT, *_NEUTRAL):
                raise UnsupportedError(
                    f"{self.file.path}: found {prefix}{key} = {value!r:.80}, which is not understood; "
                    "take the model's Hugging Face directory instead"
                )

    def _read_config(self) -> dict[str, Any]:
        """`config.json` without the ids of special tokens, which the tokenizer adds."""
        fields, tensors = self._fields, self.file.tensors
        layers, context, width, feed_forward, heads = (fields.size(key) for key in _SIZES)
        head_dim = fields.size("attention.key_length", max(width // heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := fields.size(key, head_dim)) != head_dim:
                raise UnsupportedError(
                    f"{self.file.path}: {key} is {found}; supported: {head_dim}, the width of a head"
                )
        config = {
            "architectures": [self._architecture.hf_class],
            "model_type": self._architecture.model_type,
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "num_attention_heads": heads,
            "num_key_value_heads": fields.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self._tensor(_EMBEDDING).shape[0],
            "max_position_embeddings": context,
            "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "rope_parameters": self._rope(head_dim, context),
            "tie_word_embeddings": _HEAD not in tensors,
        }
        return config | self._own_settings()

    def _own_settings(self) -> dict[str, Any]:
        """What only one class has: windows, and whether attention has biases (q, k, v and o together)."""
        window = self._fields.get("attention.sliding_window")
        if self._architecture is _MISTRAL:
            return {"sliding_window": self._fields.size("attention.sliding_window")}
        if window:
            raise UnsupportedError(
                f"{self.file.path}: a {self._architecture.model_type} with a sliding window of {window}; "
                "supported: none"
            )
        if self._architecture.model_type == "qwen2":
            return {"use_sliding_window": False}
        return {"attention_bias": any(name.endswith("attn_q.bias") for name in self.file.tensors)}

    def _rope(self, head_dim: int, context: int) -> dict[str, Any]:
        """The rotary embeddings: base, and how its frequencies are stretched."""
        fields = self._fields
        base = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10000.0)}
        if ROPE_FREQS in self.file.tensors:
            return base | self._llama3(base["rope_theta"], head_dim, context)
        factor = fields.get("rope.scaling.factor") or fields.get("rope.scale_linear") or 1.0
        kind = fields.get("rope.scaling.type") or "linear"  # as llama.cpp takes a missing type
        if kind == "none" or (factor == 1.0 and kind == "linear"):
            return base
        if kind == "linear":
            return base | {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise UnsupportedError(f"{self.file.path}: rope scaling {kind!r}; supported: none, linear, yarn")
        betas = {
            name: fields.number(f"rope.scaling.yarn_{name}")
            for name in ("beta_fast", "beta_slow")
            if fields.get(f"rope.scaling.yarn_{name}") is not None
        }
        original = fields.size("rope.scaling.original_context_length", context)
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return base | yarn | betas

    def _llama3(self, theta: float, head_dim: int, context: int) -> dict[str, Any]:
        """Llama 3.1's stretch, which the file has as a factor for each frequency.

        Its four numbers are found by trying: the factor is the largest of them, all of Llama's models have 1
        and 4 for the ends of the ramp, and the original context is a power of two.
        """
        tensor = self.file.tensors[ROPE_FREQS]
        if tensor.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{self.file.path}: {ROPE_FREQS} has shape {list(tensor.shape)}; expected [{head_dim // 2}]"
            )
        [found] = to_float32(self.file.rows(tensor, 0, 1), tensor.type)
        if (found == 1).all():
            return {}
        plain, factor = self._frequencies({"rope_theta": theta}, head_dim), float(str(found.max()))
        for exponent in range(context.bit_length(), 4, -1):
            settings = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            settings["original_max_position_embeddings"] = 1 << exponent
            stretched = {"rope_type": "llama3", "rope_theta": theta, **settings}
            if np.allclose(found, plain / self._frequencies(stretched, head_dim), rtol=1e-5, atol=0):
                return stretched
        raise UnsupportedError(
            f"{self.file.path}: {ROPE_FREQS} stretches rope in a way that is not Llama 3.1's; supported: "
            "llama3 with low_freq_factor 1, high_freq_factor 4"
        )

    def _frequencies(self, settings: dict[str, Any], head_dim: int) -> np.ndarray:
        rope = Rope.read(Config({"rope_parameters": settings}, str(self.file.path)))
        return inverse_frequencies(rope, head_dim)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.file.tensors:
            raise CheckpointError(f"{self.file.path}: tensor {name} is missing; the file is incomplete")
        return self.file.tensors[name]

    def sources(self, anatomy: Anatomy) -> dict[str, Tensor]:
        """transformers' name -> the tensor of the file, in the anatomy's order.

        CheckpointError where one is missing or has another shape, UnsupportedError where one has no place.
        """
        table = gguf.get_tensor_name_map(self._architecture.names, anatomy.num_layers)
        sources = {}
        for name, shape in anatomy.tensor_shapes.items():
            known = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise UnsupportedError(f"{self.file.path}: GGUF has no name for {name} in this architecture")
            if (tensor := self._tensor(known)).shape != shape:
                raise CheckpointError(
                    f"{self.file.path}: tensor {known} has shape {list(tensor.shape)}; expected {list(shape)}"
                )
            sources[name] = tensor
        placed = {tensor.name for tensor in sources.values()} | {ROPE_FREQS}
        if extra := [name for name in self.file.tensors if name not in placed]:
            raise UnsupportedError(
                f"{self.file.path}: tensor {extra[0]} is not part of a {anatomy.model_type}; cannot place it"
            )
        return sources

    def row_order(self, name: str, anatomy: Anatomy) -> np.ndarray | None:
        """Which stored row is each of the rows of transformers' tensor; None where they are the same."""
        module = name.rpartition(".")[0]
        if not self._architecture.paired or not module.endswith(_ROTARY):
            return None
        num_rows, half = anatomy.tensor_shapes[name][0], anatomy.attention.head_dim // 2
        return np.arange(num_rows).reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)
