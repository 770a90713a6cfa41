"""A decoder of random weights on a GPU, as servers run one: fused linears, torch's attention, no sampling.

Needs torch, NumPy and this source alone. Shapes: R = B T rows, width of a head E.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention, silu

from gossamer.gpu.linear import LEAST_ZEROS, SparseLinear
from gossamer.gpu.packing import packed_bytes, packing_bytes, padded_bytes
from gossamer.measure.stopwatch import Stopwatch

DENSE = "dense bf16"
MAKING_BYTES = {"bf16": 9, "i8": 12, "i4": 22}  # at most for each weight of a linear that is being made
WHOLE_BYTES = 6  # of a weight in float32 and in what it is rounded to
MORE_PAIRS = 1.1  # than half of the weights of INT4: as many as the longer of two runs has

Linear = Callable[[Tensor], Tensor]
Cache = tuple[Tensor, Tensor]  # keys and values [B, G, T, E] of a layer


@dataclass(frozen=True)
class Sizes:
    """Of a decoder; those of Llama-3.1-8B."""

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def width(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a layer's: q, k and v in one, o, gate and up in one, down."""
        qkv = self.hidden + 2 * self.kv_heads * self.width
        inner = self.intermediate
        return [
            (qkv, self.hidden),
            (self.hidden, self.hidden),
            (2 * inner, self.hidden),
            (self.hidden, inner),
        ]

    @property
    def num_weights(self) -> int:
        """Of all layers' linears, zeros included."""
        return self.layers * sum(rows * columns for rows, columns in self.linears)


class Decoder:
    """Layers of linears with so many zeros, and a dense head in bfloat16.

    Positions are left unrotated, and new keys and values are not stored: both cost little beside products.
    """

    def __init__(self, at: Stopwatch, sizes: Sizes, values: str, zeros: float) -> None:
        """`values`: as `sparse` takes them; or dense bf16, which has no zeros."""
        self.at, self.sizes, self.values, self._zeros = at, sizes, values, zeros
        self.linears_bytes = 0
        self.layers = [
            [self._linear(*it, 4 * index + place) for place, it in enumerate(sizes.linears)]
            for index in range(sizes.layers)
        ]
        self.head = at.random(sizes.vocabulary, sizes.hidden).bfloat16() / sizes.hidden**0.5
        self.ones = torch.ones(sizes.hidden, device=at.device, dtype=torch.bfloat16)

    def _linear(self, rows: int, columns: int, seed: int) -> Linear:
        zeros = 0.0 if self.values == DENSE else self._zeros
        w_NK = self.at.weights(rows, columns, zeros, 2 * seed) / columns**0.5
        if self.values == DENSE:
            bf16 = w_NK.bfloat16()
            self.linears_bytes += bf16.nbytes
            return partial(linear, weight=bf16)
        made = sparse(self.values, w_NK)
        self.linears_bytes += made.num_bytes + (0 if made.scales is None else made.scales.nbytes)
        return made

    @property
    def step_bytes(self) -> int:
        """What a step reads beside keys and values."""
        return self.linears_bytes + self.head.nbytes + (2 * len(self.layers) + 1) * self.ones.nbytes

    def caches(self, batch: int, length: int) -> list[Cache]:
        """Random keys and values of `length` tokens of each sequence, of every layer."""
        shape = (batch, self.sizes.kv_heads, length, self.sizes.width)
        seeds = range(0, 2 * len(self.layers), 2)
        made = (tuple(self.at.random(*shape, seed=it + of).bfloat16() for of in range(2)) for it in seeds)
        return [(keys, values) for keys, values in made]

    def inputs(self, *shape: int) -> Tensor:
        """bfloat16 [*shape, D]: embedded tokens."""
        return self.at.random(*shape, self.sizes.hidden).bfloat16()

    def step(self, x_BD: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Logits [B, V] of a token of each sequence, which sees its cache."""
        return self._logits(x_BD.unsqueeze(1), caches)

    def prompt(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, V] of the last tokens of prompts, which see what is before them."""
        return self._logits(x_BTD, None)

    def _logits(self, x_BTD: Tensor, caches: Sequence[Cache] | None) -> Tensor:
        (batch, tokens, _), sizes = x_BTD.shape, self.sizes
        x_RD = x_BTD.flatten(0, 1)
        heads, kv = sizes.heads, sizes.kv_heads
        for index, (qkv, o, gate_up, down) in enumerate(self.layers):
            found = qkv(self._normed(x_RD)).view(batch, tokens, heads + 2 * kv, sizes.width).transpose(1, 2)
            q, *own = found.split((heads, kv, kv), dim=1)
            keys, values = own if caches is None else caches[index]
            seen = scaled_dot_product_attention(q, keys, values, is_causal=caches is None, enable_gqa=True)
            x_RD = x_RD + o(seen.transpose(1, 2).reshape(x_RD.shape))
            gate, up = gate_up(self._normed(x_RD)).chunk(2, dim=-1)
            x_RD = x_RD + down(silu(gate) * up)
        last_BD = x_RD.view(x_BTD.shape)[:, -1]
        return linear(self._normed(last_BD), self.head)

    def _normed(self, x_RD: Tensor) -> Tensor:
        return rms_norm(x_RD, self.ones.shape, self.ones)


def most_bytes(sizes: Sizes, values: str, zeros: float) -> float:
    """What a decoder takes with so many zeros, and at most more while its largest linear or head is made."""
    layer = sum(_linear_bytes(*shape, values, zeros) for shape in sizes.linears)
    rows, columns = max(sizes.linears, key=prod)
    largest, packing = rows * columns, packing_bytes(rows, columns, _type(values))
    making = max(MAKING_BYTES[values] * largest, WHOLE_BYTES * largest + packing)
    return sizes.layers * layer + max(making, WHOLE_BYTES * sizes.vocabulary * sizes.hidden)


def _linear_bytes(rows: int, columns: int, values: str, zeros: float) -> int:
    """Of a linear and its scales."""
    live, is_int4 = (1 - zeros) * rows * columns, values == "i4"
    scales = 0 if values == "bf16" else 4 * rows
    if zeros < LEAST_ZEROS and not is_int4:
        return scales + padded_bytes(rows, columns, _type(values))
    number = round(MORE_PAIRS / 2 * live if is_int4 else live)
    return scales + packed_bytes(rows, columns, _type(values), is_int4=is_int4, num_values=number)


def _type(values: str) -> torch.dtype:
    return torch.bfloat16 if values == "bf16" else torch.int8


def sparse(name: str, w_NK: Tensor, device: torch.device | None = None) -> SparseLinear:
    """Of weights rounded to bf16, i8 or i4, where they lie or on another device."""
    device = w_NK.device if device is None else device
    if name == "bf16":
        return SparseLinear.from_weight(w_NK.bfloat16().to(device))
    q_NK, scales_N, *multipliers = (it.to(device) for it in (int8 if name == "i8" else int4)(w_NK))
    return SparseLinear.from_weight(q_NK, scales_N, multiplier_NS=multipliers[0] if multipliers else None)


def int8(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Weights int8 [N, K] and float32 scales [N]."""
    scales_N = w_NK.abs().amax(1).clamp(min=1e-8) / 127
    return (w_NK / scales_N[:, None]).round().to(torch.int8), scales_N


def int4(w_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights int8 [N, K] from -7 to 7, scales [N], multipliers [N, S]; as many zeros as there were."""
    scales_N = w_NK.abs().amax(1).clamp(min=1e-8) / (7 * 16)
    groups_NS = pad(w_NK.abs(), (0, -w_NK.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2)
    multiplier_NS = (groups_NS / (7 * scales_N[:, None])).ceil().clamp(1, 16)
    each_NK = (multiplier_NS * scales_N[:, None]).repeat_interleave(128, 1)[:, : w_NK.shape[1]]
    q_NK = (w_NK / each_NK).round().clamp(-7, 7)
    return torch.where(q_NK == 0, w_NK.sign(), q_NK).to(torch.int8), scales_N, multiplier_NS.to(torch.uint8)
