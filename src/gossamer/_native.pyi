"""The engine's core, in C++ (native/): kernels, decoder, threads. One call of `Model.forward` is one step.

Buffers hold a whole .goss file and begin at a multiple of 64 bytes, as a memory map does. `tensors` says
where each tensor lies, name -> (dtype, shape, byte offset, byte length); `matrices` is the header's table of
matrices, name -> {"storage", "values", "rows", "columns"}. Contents are checked before a kernel touches them
(FormatError).
"""

from collections.abc import Mapping
from collections.abc import Sequence as _Sequence
from typing import Any, Literal, TypedDict

import numpy as np

_Isa = Literal["scalar", "avx2", "avx512", "avx512-bf16", "amx", "amx-emulated"]
_Tensors = Mapping[str, tuple[str, tuple[int, ...], int, int]]

class _Kernel(TypedDict):
    family: str
    values: Literal["f32", "bf16", "i8", "i4"]
    storage: Literal["dense", "sparse"]
    isa: _Isa

class Sequence:
    """Cached keys and values of one sequence of tokens; memory is taken as it grows, 256 tokens at a time."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    def capacity(self) -> int:
        """Tokens that fit."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""

class Encoder:
    """An encoder over the packed file in `buffer`, made of what `config` says (`native_encoder_config()`).

    Texts lie one behind the other, `ids` and `types` of all of their tokens, `lengths` of each text: int32.
    What comes out depends neither on the number of threads nor on which texts are given together.

    config:
        hidden_size, vocab_size, num_heads, head_dim, intermediate_size: int, of all blocks.
        num_positions, num_types: int, rows of these tables; first_position: int, the row of a text's first
            token.
        norm_eps: float, of every LayerNorm.
        embedding: name of a matrix; positions, types: names of tables; norm: name of a LayerNorm, which is
            that of its weight and bias without these words.
        blocks: a list, in order, of {
            linears: the name of the matrix for each of q, k, v, o, up, down;
            biases: the name of a float32 vector for each of these that has one;
            attention_norm, feed_forward_norm: names of LayerNorms}.
        linears: the header's table of matrices, name -> {"storage", "values", "rows", "columns"}.
    Vectors and tables are stored with zeros up to a multiple of 16. FormatError names what is missing, has a
    wrong type or shape, or contradicts the file.
    """

    def __init__(
        self, buffer: np.ndarray, tensors: _Tensors, config: Mapping[str, Any], num_threads: int
    ) -> None: ...
    def hidden_states(self, ids: np.ndarray, types: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 [tokens, D]: what the last block says of each token. The GIL is released.

        EngineError when ids, types or lengths do not fit the model or each other; so for `encode`.
        """

    def encode(
        self,
        ids: np.ndarray,
        types: np.ndarray,
        lengths: np.ndarray,
        pooling: Literal["mean", "max", "cls"],
    ) -> np.ndarray:
        """float32 [texts, D]: of each text the mean or maximum of its hidden states, or its first token's.

        The GIL is released. ConfigError for another pooling.
        """

    @property
    def num_threads(self) -> int: ...

class Model:
    """A decoder over the packed file in `buffer`, made of what `config` says (`Packed.native_config()`).

    Keys and values are cached as `kv` says; i8 has a scale for every position and key/value head.

    config:
        hidden_size, vocab_size, num_heads, num_kv_heads, head_dim, intermediate_size: int, of all blocks.
        norm_eps: float, of every RMSNorm.
        inverse_frequencies: float32 [E / 2], the angle that each pair of a head turns by per position.
        rotary_scale: float, what cosines and sines of these angles are multiplied by.
        embedding, head: names of matrices (the same one where they are tied).
        final_norm: name of a tensor.
        blocks: a list, in order, of {
            linears: the name of the matrix for each of q, k, v, o, gate, up, down;
            biases: the name of a float32 vector for each of these that has one;
            attention_norm, feed_forward_norm: names of tensors;
            query_norm, key_norm: names of the weights [E] of an RMSNorm over each head, after the product and
                its bias and before the rotary embedding, or "" where there is none;
            rope: bool, whether queries and keys are rotated by their position;
            window: int, how many positions a token attends to, its own included, or 0: all before it}.
        linears: the header's table of matrices, name -> {"storage", "values", "rows", "columns"}.
    Vectors are stored with zeros up to a multiple of 16. FormatError names what is missing, has a wrong type
    or shape, or contradicts the file.
    """

    def __init__(
        self,
        buffer: np.ndarray,
        tensors: _Tensors,
        config: Mapping[str, Any],
        num_threads: int,
        kv: Literal["f32", "bf16", "i8"] = "f32",
    ) -> None: ...
    def new_sequence(self, capacity: int) -> Sequence:
        """An empty sequence with room for `capacity` tokens."""

    def forward(
        self, sequences: _Sequence[Sequence], ids: _Sequence[np.ndarray], all_logits: bool = False
    ) -> np.ndarray:
        """Feed int32 ids [new tokens] to each sequence; float32 logits [rows, V] of each one's last token.

        With `all_logits` there is a row for every new token, sequence after sequence. The GIL is released.
        EngineError when ids, sequences or capacities do not fit; then nothing has changed.
        """

    def score(
        self,
        sequences: _Sequence[Sequence],
        ids: _Sequence[np.ndarray],
        targets: _Sequence[np.ndarray],
        num_likeliest: int = 1,
    ) -> list[tuple[float, list[tuple[int, float]]]]:
        """Feed ids as `forward`; for each target, what `log_probabilities` says of it.

        `targets` has int32 arrays: what is expected after each of the last as many tokens of its sequence; at
        most 256 in all. EngineError as `forward`, and for targets that do not fit.
        """

    def time_linears(self, repeats: int, num_tokens: int = 1) -> list[float]:
        """Seconds of a pass over the matrices of all blocks with `num_tokens` (1 .. 256), `repeats` times."""

    def time_attention(self, context: int, repeats: int) -> tuple[int, list[float]]:
        """Bytes of cached keys and values, and the seconds that attending to all takes, `repeats` times.

        One new token of each of as many sequences of `context` tokens as no processor's cache holds, in all
        blocks, whose windows count: rotation, storing and merging included, matrix products not.
        """

    @property
    def bytes_per_step(self) -> int:
        """Bytes of the file that one decode step of one sequence reads."""

    @property
    def num_threads(self) -> int: ...

def levels() -> dict[str, bool]:
    """Level -> whether this machine, capped by GOSSAMER_ISA, runs it; each after the one it builds on."""

def isa() -> _Isa:
    """The instruction set in use: the best of this machine, capped by GOSSAMER_ISA."""

def kernels() -> list[_Kernel]:
    """The table of kernels, a row for each function: family, values, storage and instruction set.

    Rows of "amx-emulated" are those of amx with their tiles computed by avx512 code, for tests.
    """

def matmul(
    isa: str,
    buffer: np.ndarray,
    tensors: _Tensors,
    matrices: Mapping[str, Mapping[str, Any]],
    name: str,
    x_TK: np.ndarray,
) -> np.ndarray:
    """float32 y [T, N] of matrix `name` and inputs [T, K] (float32), by the kernel that `isa` runs."""

def accumulators(
    isa: str,
    buffer: np.ndarray,
    tensors: _Tensors,
    matrices: Mapping[str, Mapping[str, Any]],
    name: str,
    x_TK: np.ndarray,
) -> np.ndarray:
    """The exact int32 sums [T, N] under an int8 or int4 `matmul`, with signed int8 inputs."""

def time_matmul(
    isa: str,
    buffer: np.ndarray,
    tensors: _Tensors,
    matrices: Mapping[str, Mapping[str, Any]],
    name: str,
    x_TK: np.ndarray,
    repeats: int,
) -> list[float]:
    """Seconds of that product on one thread, `repeats` times."""

def int8_peak(isa: str, num_threads: int, repeats: int) -> float:
    """Multiply-adds of int8 a second, in registers, by the best instruction of `isa`; best of `repeats`."""

def f32_peak(isa: str, num_threads: int, repeats: int) -> float:
    """Multiply-adds of float32 a second, in registers, at the level `isa`; best of `repeats`."""

def rmsnorm(isa: str, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 y = weight * x / sqrt(mean(x^2) + eps), and max|y| [T, 1]."""

def layernorm(
    isa: str, x_TD: np.ndarray, weight_D: np.ndarray, bias_D: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """float32 y = weight * (x - mean) / sqrt(variance + eps) + bias, and max|y| [T, 1]."""

def gelu(isa: str, x_TN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 y = x / 2 (1 + erf(x / sqrt(2))), and max|y| [T, 1]."""

def largest(isa: str, x: np.ndarray) -> float:
    """max|x| of float32 numbers."""

def split(isa: str, x_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint16 bits of two bfloat16, high + low = x (but for the last bits), each [T, K]."""

def quantize(isa: str, x_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 q + 128 [T, K] and float32 scales [T, 1] of dynamic symmetric quantization per token."""

def geglu(isa: str, gate_TN: np.ndarray, up_TN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 y = gelu(gate) * up, and max|y| [T, 1]."""

def swiglu(isa: str, gate_TN: np.ndarray, up_TN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 y = gate / (1 + exp(-gate)) * up, and max|y| [T, 1]."""

def attention(
    isa: str,
    kv: str,
    q_TAE: np.ndarray,
    k_SE: np.ndarray,
    v_SE: np.ndarray,
    window: int = 1 << 30,
    split: bool = False,
    causal: bool = True,
) -> np.ndarray:
    """float32 [T * A, E]: softmax(q k^T / sqrt(E)) v of the last T of S positions at one key/value head.

    Each token sees `window` positions up to its own; if not `causal`, all S, or an odd
    window that it is in the middle of. `split`
    (one token): by chunks, which are merged then.
    """

def rope(isa: str, x_HE: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """float32 [H, E]: every head's halves (a, b) rotated to (a cos - b sin, b cos + a sin)."""

def sample(
    isa: str,
    logits_V: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> int:
    """The token that `uniform`, in [0, 1), draws from softmax(logits / temperature) after the filters.

    float32 logits; a temperature above 0; top_k 0, top_p 1 and min_p 0 keep all. Tokens lie in the order of
    their ids. EngineError when a logit is NaN or +inf, or none is finite.
    """

def log_probabilities(
    isa: str, logits_V: np.ndarray, index: int, num_likeliest: int = 0
) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithm of the softmax of float32 logits at `index`, within 1e-6, and the likeliest tokens.

    These are (id, its own logarithm), the highest first, and of equals the lower id first.
    """

def highest(isa: str, x: np.ndarray) -> float:
    """The highest of float32 numbers; NaN when one is."""

def keep(isa: str, x: np.ndarray, low: float, high: float) -> np.ndarray:
    """float32 [1, kept]: the x with low <= x < high, in their order."""

def mass(isa: str, x: np.ndarray, highest: float, inverse_temperature: float, low: float) -> int:
    """The sum of round(2^40 exp((x - highest) * inverse_temperature)) over the x that are at least `low`."""

class SparsePlan:
    """A fixed mask of a weight [N, K], and the products of training with its values alone.

    All arrays are float32 and row-major; `values` are in the plan's order. Outputs are written whole. The
    number of threads changes no bit; `isa` None is the best. The GIL is released. EngineError when shapes do
    not fit.
    """

    def __init__(self, mask_NK: np.ndarray) -> None:
        """`mask_NK`: bool, True where a weight lives."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def num_values(self) -> int: ...
    @property
    def num_bytes(self) -> int:
        """Memory of the indices."""

    def positions(self) -> np.ndarray:
        """int64: n * K + k of each value, in the plan's order."""

    def forward(
        self, values: np.ndarray, x_TK: np.ndarray, y_TN: np.ndarray, num_threads: int, isa: str | None = None
    ) -> None:
        """y = x W^T."""

    def backward_input(
        self,
        values: np.ndarray,
        dy_TN: np.ndarray,
        dx_TK: np.ndarray,
        num_threads: int,
        isa: str | None = None,
    ) -> None:
        """dx = dy W."""

    def backward_values(
        self,
        x_TK: np.ndarray,
        dy_TN: np.ndarray,
        dvalues: np.ndarray,
        num_threads: int,
        isa: str | None = None,
    ) -> None:
        """The mask's positions of dW = dy^T x."""

def sweep(
    w_BN: np.ndarray,
    u_BB: np.ndarray,
    kept_BN: np.ndarray,
    scale_N: np.ndarray | None,
    error_BN: np.ndarray,
    *,
    largest: float,
    num_threads: int,
    isa: str | None = None,
) -> None:
    """Fix the inputs of a block one after another, in place (native/kernels/sweep.hpp); writes `error_BN`."""

def adamw(
    values: np.ndarray,
    gradient: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    num_threads: int,
    isa: str | None = None,
) -> None:
    """The `step`th (from 1) update of AdamW with decoupled decay, in place; float32 arrays of one length.

    The same bits for every `isa` (None: the best) and number of threads. The GIL is released.
    """

def zero_marked(values: np.ndarray, marks: np.ndarray, num_threads: int) -> None:
    """Write 0 where `marks`, bool and as long as the float32 `values`, is true. The GIL is released."""

def count_marked(values: np.ndarray, marks: np.ndarray, num_threads: int) -> int:
    """How many of the float32 `values` are not 0 (NaN is not) where `marks` is true. The GIL is released."""

def head_loss(
    logits_NV: np.ndarray,
    targets_N: np.ndarray,
    ids_NK: np.ndarray | None = None,
    log_p_NK: np.ndarray | None = None,
    *,
    temperature: float = 1.0,
    cross_entropy_weight: float = 1.0,
    num_threads: int,
    isa: str | None = None,
) -> tuple[float, float]:
    """The sums of cross-entropy and, beside a teacher's K likeliest tokens, of the whole loss.

    They are what native/training/head_loss.hpp says. Logits, float32 or the uint16 bits of bfloat16, are
    overwritten by their gradient. Targets and ids are int64, the ids of a row differ, and log p is float32.
    The same bits for every `isa` (None: the best) and number of threads. The GIL is released. A row that has
    NaN or +inf is written as NaN, and the sums are NaN. EngineError for shapes that do not fit, targets and
    ids outside of [0, V), a temperature that is not above 0, and a weight that is not from 0 on; nothing is
    written then.
    """

def read_bandwidth(num_threads: int, prefetch_bytes: int, buffer: np.ndarray, repeats: int) -> list[float]:
    """Bytes/s of reading the whole buffer, `repeats` times; `prefetch_bytes` ahead in software (0: none)."""
