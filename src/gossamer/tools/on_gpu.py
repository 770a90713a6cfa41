"""Generation on a GPU: transformers' model with sparse linears, which the engine asks in place of its own.

What surrounds a forward pass is the engine's, from templates to stops: so each option means what it means
there, and a seed draws the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.architecture.config import read_json
from gossamer.engine import LLM, OpenModel
from gossamer.evaluation.backends import open_decoder, without_bars
from gossamer.gpu.found import gpu_device
from gossamer.gpu.memory import memory_for
from gossamer.gpu.opening import open_sparse
from gossamer.tokens.tokenizer import Tokenizer


def open_on_gpu(model: str, *, offline: bool) -> LLM:
    """A directory, or a model of the hub; beside integers bfloat16 where its config says so, else float32.

    ConfigError without a GPU; UnsupportedError for a file, an encoder, or linears that have no kernels.
    """
    device = gpu_device()
    source = open_decoder(model, "gpu", offline=offline)
    tokenizer, options = Tokenizer.open(source.path), source.path / "generation_config.json"
    stored = source.config.get("dtype", source.config.get("torch_dtype"))
    with without_bars():
        dtype = torch.bfloat16 if stored == "bfloat16" else torch.float32
        native: Any = SparseModel(open_sparse(source, device, dtype=dtype))
    defaults = read_json(options) if options.is_file() else {}
    return LLM.of(OpenModel(source.path, native, tokenizer, source.architecture, 1, defaults), max_batch=1)


class Cached:
    """Keys and values of one sequence of tokens, on the GPU."""

    def __init__(self) -> None:
        self.length, self.held = 0, None


class SparseModel:
    """What the scheduler asks of `_native.Model`, of transformers' model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def new_sequence(self, capacity: int) -> Cached:
        """Memory is taken as it grows."""
        return Cached()

    def forward(
        self, sequences: Sequence[Cached], ids: Sequence[NDArray[np.int32]], all_logits: bool = False
    ) -> NDArray[np.float32]:
        """float32 [rows, V] as `_native.Model.forward`'s; sequences one after another."""
        fed = zip(sequences, ids, strict=True)
        return np.concatenate([self._row(sequence, ids_T, all_logits) for sequence, ids_T in fed])

    @torch.no_grad()
    def _row(self, sequence: Cached, ids_T: NDArray[np.int32], all_logits: bool) -> NDArray[np.float32]:
        ids_1T = torch.from_numpy(ids_T.astype(np.int64)).unsqueeze(0).to(self._model.device)
        how = {"use_cache": True, "logits_to_keep": 0 if all_logits else 1}
        with memory_for(f"{ids_T.size} tokens were computed behind {sequence.length}; give shorter texts"):
            found = self._model(ids_1T, past_key_values=sequence.held, **how)
        sequence.held, sequence.length = found.past_key_values, sequence.length + ids_T.size
        return found.logits[0].float().cpu().numpy()
