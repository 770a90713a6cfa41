"""A dense Llama writes text to learn from: its own distribution, which no corpus at hand has.

    python recipes/write_text.py MODEL -o ROWS.npy --num-tokens 8000000

Writes int32 [rows, T] rows as `gossamer.training.rows.Rows` takes them: each is BOS and what the model says
after it, sampled at a temperature. With `--starts FILE.npy` (rows of the same kind, of human text) every
second row is begun by the first few tokens of one of those, so that the model also writes on subjects that
it was not tuned to talk of. That a model may be compressed by what it says itself is from LLM-QAT (Liu et
al., arXiv 2305.17888).

All rows of a batch grow together, a token a step, in buffers of fixed shapes, so that a GPU replays the step
as one CUDA graph. On a CPU the same code runs eagerly.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from gossamer.allocator import keep_freed_memory
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import UnsupportedError
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.whole_model import load_model

LONGEST_START = 32
WINDOW = 128  # a step attends to the positions of the windows that are begun


class Writer:
    """The decoder of a Llama (`read_anatomy`'s plain block) that samples B rows of T tokens at once."""

    def __init__(
        self, model: Any, num_rows: int, row_length: int, device: str, temperature: float = 1.0
    ) -> None:
        self._temperature = temperature
        config, decoder = model.config, model.get_decoder()
        if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
            raise UnsupportedError(f"found a {config.model_type}; text is written by Llamas without biases")
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._config, self._rows, self._length, self._device = config, num_rows, row_length, device
        self._layers = [self._weights(layer) for layer in decoder.layers]
        self._embed_VD, self._norm_D = self._own(decoder.embed_tokens.weight), self._own(decoder.norm.weight)
        self._head_VD = self._own(model.get_output_embeddings().weight)
        self._head_dim = decoder.layers[0].self_attn.head_dim
        places = torch.arange(row_length)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1), places)
        self._cos_TH, self._sin_TH = (self._own(table[0].float(), torch.float32) for table in (cos, sin))
        self._cache = [
            torch.zeros(
                2,
                num_rows,
                config.num_key_value_heads,
                row_length,
                self._head_dim,
                device=device,
                dtype=self._dtype,
            )
            for _ in self._layers
        ]  # keys and values
        self._ids_BT = torch.zeros(num_rows, row_length, dtype=torch.long, device=device)
        self._given_BT = torch.zeros(num_rows, row_length, dtype=torch.bool, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._steps: list[Callable[[], None]] = []
        self._pool = torch.cuda.graph_pool_handle() if device == "cuda" else None  # graphs run in turn

    @torch.no_grad()
    def write(self, starts: list[list[int]]) -> np.ndarray:
        """Rows [B, T] that begin with these tokens (BOS among them)."""
        self._ids_BT.zero_()
        self._given_BT.zero_()
        for row, start in enumerate(starts):
            self._ids_BT[row, : len(start)] = torch.tensor(start)
            self._given_BT[row, : len(start)] = True
        self._place.zero_()
        if not self._steps:
            self._steps = [self._compiled(end) for end in self._ends()]
            self._place.zero_()
        for place in range(self._length - 1):
            self._steps[place // WINDOW]()
        return self._ids_BT.cpu().numpy().astype(np.int32)

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """[B, T, V] of given tokens, one step a token: what tests compare."""
        found = []
        for place in range(ids_BT.shape[1]):
            self._place.fill_(place)
            found.append(self._forward(ids_BT[:, place].to(self._device), self._length))
        return torch.stack(found, 1)

    def _ends(self) -> list[int]:
        return [min(self._length, begin + WINDOW) for begin in range(0, self._length, WINDOW)]

    def _compiled(self, end: int) -> Callable[[], None]:
        """A step that attends to positions before `end`; on a GPU one replay of a graph."""
        if self._device != "cuda":
            return lambda: self._step(end)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._place.fill_(end - 2)
                self._step(end)
        torch.cuda.current_stream().wait_stream(side)
        self._place.fill_(end - 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(end)
        return graph.replay

    def _step(self, end: int) -> None:
        """Read the token at the place, choose the next one where none is given, and move on."""
        now_B = self._ids_BT.index_select(1, self._place)[:, 0]
        logits_BV = self._forward(now_B, end)
        noise_BV = torch.empty_like(logits_BV).exponential_().clamp_min_(1e-20)
        chosen_B1 = (logits_BV / self._temperature - noise_BV.log_()).argmax(
            -1, keepdim=True
        )  # Gumbel's way to sample
        following = self._place + 1
        given_B1 = self._given_BT.index_select(1, following)
        kept_B1 = torch.where(given_B1, self._ids_BT.index_select(1, following), chosen_B1)
        self._ids_BT.index_copy_(1, following, kept_B1)
        self._place.add_(1)

    def _forward(self, ids_B: Tensor, end: int) -> Tensor:
        """float32 logits [B, V] after the token at the place; its keys and values go into the cache."""
        heads, key_heads, width = (
            self._config.num_attention_heads,
            self._config.num_key_value_heads,
            self._head_dim,
        )
        cos, sin = self._cos_TH.index_select(0, self._place), self._sin_TH.index_select(0, self._place)
        unseen_T = torch.arange(end, device=self._device) > self._place
        x_BD = self._embed_VD[ids_B]
        for layer, cache in zip(self._layers, self._cache, strict=True):
            h_BD = self._rms(x_BD, layer["input"])
            q_BHX, k_BHX, v_BHX = (
                (h_BD @ layer["qkv"].T).view(len(ids_B), -1, width).split([heads, key_heads, key_heads], 1)
            )
            q_BHX, k_BHX = _rotated(q_BHX, cos, sin), _rotated(k_BHX, cos, sin)
            cache[0].index_copy_(2, self._place, k_BHX[:, :, None])
            cache[1].index_copy_(2, self._place, v_BHX[:, :, None])
            grouped = q_BHX.reshape(len(ids_B), key_heads, heads // key_heads, width)
            scores = (grouped @ cache[0][:, :, :end].mT).float() * width**-0.5
            weights = scores.masked_fill_(unseen_T, -torch.inf).softmax(-1).to(self._dtype)
            x_BD = x_BD + (weights @ cache[1][:, :, :end]).reshape(len(ids_B), -1) @ layer["o"].T
            gate_BF, up_BF = (self._rms(x_BD, layer["after"]) @ layer["gate_up"].T).chunk(2, -1)
            x_BD = x_BD + (silu(gate_BF) * up_BF) @ layer["down"].T
        return (self._rms(x_BD, self._norm_D) @ self._head_VD.T).float()

    def _rms(self, x_BD: Tensor, weight_D: Tensor) -> Tensor:
        wide_BD = x_BD.float()
        scale_B1 = torch.rsqrt(wide_BD.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        return (wide_BD * scale_B1).to(self._dtype) * weight_D

    def _own(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return weight.detach().to(self._device, dtype or self._dtype)

    def _weights(self, layer: Any) -> dict[str, Tensor]:
        attention, ffn = layer.self_attn, layer.mlp
        return {
            "input": self._own(layer.input_layernorm.weight),
            "qkv": self._own(torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])),
            "o": self._own(attention.o_proj.weight),
            "after": self._own(layer.post_attention_layernorm.weight),
            "gate_up": self._own(torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])),
            "down": self._own(ffn.down_proj.weight),
        }


def _rotated(x_BHX: Tensor, cos_1X: Tensor, sin_1X: Tensor) -> Tensor:
    """Rotary embedding as transformers has it: pairs lie half a head apart."""
    first, second = x_BHX.float().chunk(2, -1)
    return (x_BHX.float() * cos_1X + torch.cat([-second, first], -1) * sin_1X).to(x_BHX.dtype)


def starts(
    bos: int, texts_ST: np.ndarray | None, num_rows: int, chance: np.random.Generator
) -> list[list[int]]:
    """What rows begin with: BOS, and in every second one the first tokens of a human text."""
    found = [[bos] for _ in range(num_rows)]
    if texts_ST is not None:
        for start in found[::2]:
            text_T = texts_ST[chance.integers(len(texts_ST))]
            begin = int(chance.integers(1, len(text_T) - LONGEST_START))
            taken_T = text_T[begin : begin + chance.integers(4, LONGEST_START + 1)]
            start.extend(int(token) for token in np.where(taken_T < 0, ~taken_T, taken_T) if token != bos)
    return found


def batches(
    model: Path,
    num_tokens: int,
    row_length: int,
    batch_rows: int,
    texts_ST: np.ndarray | None,
    temperature: float,
    seed: int,
) -> Iterator[np.ndarray]:
    """Marked rows [B, T] of at least `num_tokens` tokens in all."""
    source, device = Checkpoint.open(model), "cuda" if torch.cuda.is_available() else "cpu"
    writer = Writer(load_model(source), batch_rows, row_length, device, temperature)
    bos, chance = Tokenizer.open(source.path).required_bos(), np.random.default_rng(seed)
    torch.manual_seed(seed)
    for _ in range(-(-num_tokens // (batch_rows * row_length))):
        rows_BT = writer.write(starts(bos, texts_ST, batch_rows, chance))
        rows_BT[:, 0] = ~rows_BT[:, 0]
        yield rows_BT


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows of text that a dense Llama writes itself.")
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--num-tokens", type=int, default=1_000_000)
    parser.add_argument("--row-length", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=4096 if torch.cuda.is_available() else 64)
    parser.add_argument("--starts", type=Path, help="rows of human text (.npy)")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    texts_ST = None if options.starts is None else np.load(options.starts)
    written, start = [], time.monotonic()
    for rows_BT in batches(
        options.model,
        options.num_tokens,
        options.row_length,
        options.batch_rows,
        texts_ST,
        options.temperature,
        options.seed,
    ):
        written.append(rows_BT)
        rate = sum(rows.size for rows in written) / (time.monotonic() - start)
        print(f"{sum(rows.size for rows in written):,} tokens, {rate:,.0f} tokens/s", flush=True)
    np.save(options.output, np.concatenate(written))


if __name__ == "__main__":
    main()
