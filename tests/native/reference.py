"""The INT8 decoder in NumPy: what the engine computes, written for reading and without its kernels.

Per token and matrix: scale = max|x| / 127.5, q = clamp(round(x / scale), -128, 127),
y = (integer product) * (x_scale * w_scale); the head adds the same of x - q * scale. Everything else is
float32 as in transformers' Llama, in the order that the kernels' headers state: rounding to int8 turns a
sum's last bit into a whole step.
"""

import numpy as np

from gossamer.architecture.anatomy import EMBEDDING
from gossamer.architecture.frequencies import inverse_frequencies
from gossamer.packed.reader import Packed


class Reference:
    """Logits of one sequence, all tokens at once; tensors decoded by `Packed`, the format's specification."""

    def __init__(self, packed: Packed, kv: str = "f32") -> None:
        self.packed, self.anatomy, self.kv = packed, packed.architecture, kv
        self.cache = {name: packed.stored(name) for name in packed.matrices}

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        hidden_TD = self.cache[EMBEDDING][ids_T]
        for index in range(self.anatomy.num_layers):
            prefix = f"model.layers.{index}"
            x_TD = self.rmsnorm(hidden_TD, f"{prefix}.input_layernorm.weight")
            hidden_TD = hidden_TD + self.attention(x_TD, f"{prefix}.self_attn")
            x_TD = self.rmsnorm(hidden_TD, f"{prefix}.post_attention_layernorm.weight")
            gate_TF, up_TF = (self.linear(x_TD, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
            silu_TF = gate_TF / (1 + exponential(-gate_TF))
            hidden_TD = hidden_TD + self.linear(silu_TF * up_TF, f"{prefix}.mlp.down_proj")
        x_TD = self.rmsnorm(hidden_TD, "model.norm.weight")
        return self.linear(x_TD, self.packed.head) + self.linear(rest(x_TD), self.packed.head)

    def rmsnorm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        mean_T1 = np.square(x_TD, dtype=np.float64).mean(axis=1, keepdims=True).astype(np.float32)
        return self.packed.vector(name) * (x_TD * (1 / np.sqrt(mean_T1 + np.float32(self.anatomy.norm_eps))))

    def linear(self, x_TK: np.ndarray, name: str) -> np.ndarray:
        w_NK = self.cache[name]
        assert w_NK.dtype == np.int8
        q_TK, x_scale_T1 = rounded(x_TK)
        exact_TN = q_TK.astype(np.float64) @ w_NK.T.astype(np.float64)  # integers below 2^53
        sums_TN = exact_TN.astype(np.float32)
        return sums_TN * (x_scale_T1 * self.packed.scale(name))

    def attention(self, x_TD: np.ndarray, prefix: str) -> np.ndarray:
        heads, T = self.anatomy.attention, len(x_TD)
        q_ATE = self.rotate(self.heads(x_TD, f"{prefix}.q_proj", heads.num_heads))
        k_GTE = self.rotate(self.heads(x_TD, f"{prefix}.k_proj", heads.num_kv_heads))
        v_GTE = self.heads(x_TD, f"{prefix}.v_proj", heads.num_kv_heads)
        shared = heads.num_heads // heads.num_kv_heads
        k_ATE, v_ATE = k_GTE.repeat(shared, axis=0), v_GTE.repeat(shared, axis=0)
        scale = np.float32(1 / np.sqrt(heads.head_dim))
        product = integer_products if self.kv == "i8" else products_in_order
        (k_ATE, k_scale_AT1), (v_ATE, v_scale_AT1) = cached(k_ATE, self.kv), cached(v_ATE, self.kv)
        scores_ATT = product(q_ATE * scale, k_ATE.transpose(0, 2, 1)) * k_scale_AT1.transpose(0, 2, 1)
        scores_ATT = np.where(np.tri(T, dtype=bool), scores_ATT, -np.inf)
        weights_ATT = exponential(scores_ATT - scores_ATT.max(axis=2, keepdims=True))
        weights_ATT = np.where(np.tri(T, dtype=bool), weights_ATT, np.float32(0))
        scaled_ATT = weights_ATT * v_scale_AT1.transpose(0, 2, 1)
        out_ATE = product(scaled_ATT, v_ATE) / sums_in_lanes(weights_ATT)
        return self.linear(out_ATE.transpose(1, 0, 2).reshape(T, -1), f"{prefix}.o_proj")

    def heads(self, x_TD: np.ndarray, name: str, num_heads: int) -> np.ndarray:
        return self.linear(x_TD, name).reshape(len(x_TD), num_heads, -1).transpose(1, 0, 2)

    def rotate(self, x_HTE: np.ndarray) -> np.ndarray:
        """The rotate-half convention of Hugging Face."""
        rope, positions_T = self.anatomy.attention.rope, np.arange(x_HTE.shape[1], dtype=np.float32)
        angles_TE = np.outer(positions_T, inverse_frequencies(rope, x_HTE.shape[2]))
        halves = (f(angles_TE.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
        cosine, sine = (np.concatenate([half, half], axis=1) for half in halves)
        first, second = np.split(x_HTE, 2, axis=2)
        return x_HTE * cosine + np.concatenate([-second, first], axis=2) * sine


def rounded(x_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, in float32, and the scale [T, 1] of each token."""
    scale_T1 = np.abs(x_TK).max(axis=1, keepdims=True) / np.float32(127.5)
    return np.clip(np.rint(x_TK / scale_T1), -128, 127), scale_T1


def rest(x_TK: np.ndarray) -> np.ndarray:
    """What rounding took from each token."""
    q_TK, scale_T1 = rounded(x_TK)
    return x_TK - scale_T1 * q_TK


def cached(x_SE: np.ndarray, kv: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values [..., S, E] as a cache of type `kv` keeps them: numbers, and scales [..., S, 1]."""
    most_S1 = np.abs(x_SE).max(axis=-1, keepdims=True)
    if kv == "i8":
        steps_S1 = np.divide(np.float32(127), most_S1, where=most_S1 > 0, out=np.zeros_like(most_S1))
        return np.rint(x_SE * steps_S1), most_S1 / np.float32(127)
    if kv == "bf16":
        bits = np.ascontiguousarray(x_SE).view(np.uint32)
        x_SE = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return x_SE, np.ones_like(most_S1)


def exponential(x: np.ndarray) -> np.ndarray:
    """exp(x) in float32 as native/kernels/exponential.hpp defines it (Cephes; to about the last bit)."""
    x = np.clip(x, np.float32(-87), np.float32(88)).astype(np.float32)
    n = np.rint(x.astype(np.float64) * np.float32(1.44269504088896341)).astype(np.float32)
    r = fused(-n, np.float32(-2.12194440e-4), fused(-n, np.float32(0.693359375), x))
    p = np.float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fused(p, r, np.float32(c))
    return (fused(p, r * r, r) + np.float32(1)) * np.exp2(n)


def fused(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """a * b + c in float32, rounded once (but for rare ties: float64 holds the product exactly)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def products_in_order(a_AMK: np.ndarray, b_AKN: np.ndarray) -> np.ndarray:
    """a @ b in float32, fused, summed over k from the first to the last."""
    total_AMN = np.zeros((*a_AMK.shape[:2], b_AKN.shape[2]), np.float32)
    for k in range(a_AMK.shape[2]):
        total_AMN = fused(a_AMK[:, :, k, None], b_AKN[:, None, k, :], total_AMN)
    return total_AMN


def integer_products(a_AMK: np.ndarray, b_AKN: np.ndarray) -> np.ndarray:
    """a @ b for integers b; rows of a become 16-bit integers first, with one step each."""
    most_AM1 = np.abs(a_AMK).max(axis=2, keepdims=True)
    q_AMK = np.rint(a_AMK * (np.float32(32639) / most_AM1)).astype(np.float64)
    return (q_AMK @ b_AKN).astype(np.float32) * (most_AM1 / np.float32(32639))


def sums_in_lanes(weights_ATS: np.ndarray) -> np.ndarray:
    """Sums over the last axis [A, T, 1]: 16 running sums (of every 16th number), halved four times."""
    lanes = np.zeros((*weights_ATS.shape[:2], 16), np.float32)
    for s in range(weights_ATS.shape[2]):
        lanes[:, :, s % 16] += weights_ATS[:, :, s]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :, :half] + lanes[:, :, half:]
    return lanes
