"""What `evaluate` measures through: transformers, also with sparse linears on a GPU, or the engine."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gossamer import _native
from gossamer.checkpoint.directory import Checkpoint
from gossamer.engine import LLM, KvCacheDtype, SamplingParams
from gossamer.engine.scoring import score
from gossamer.errors import UnsupportedError
from gossamer.gpu.found import gpu_device
from gossamer.tokens.tokenizer import Tokenizer

BATCH_ROWS = 16
HARNESS_ROWS = {"cpu": BATCH_ROWS, "cuda": 128}


class Backend(Protocol):
    """What an evaluation needs of a model."""

    tokenizer: Tokenizer
    context: int
    """The most tokens of a row."""

    def log_probs(self, ids_BT: NDArray[np.int64]) -> NDArray[np.float64]:
        """log p(token | those before it in its row), [B, T - 1]: a row's first token is not scored."""
        ...

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        """Greedy continuations up to `stop` (not included), the model's end token or `max_tokens`."""
        ...

    def for_harness(self) -> Any:
        """The same model as lm-evaluation-harness knows it."""
        ...


def instructions(backend: str) -> str:
    """What a backend computes with, on which the last bits of its figures depend."""
    if backend == "engine":
        return _native.isa()
    import torch

    cuda = torch.cuda.is_available()
    return torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar meanwhile."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def open_backend(
    model: str,
    backend: str,
    num_threads: int | None = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    *,
    offline: bool = False,
) -> Backend:
    """Open a model for evaluation; UnsupportedError for a packed file on another backend than the engine.

    `num_threads` and `kv_cache_dtype` are the engine's (see `LLM`).
    """
    if backend == "engine":
        return EngineBackend(model, num_threads, kv_cache_dtype, offline=offline)
    return TorchBackend(model, sparse=backend == "gpu", offline=offline)


def directory_of(model: str, backend: str) -> str:
    """The same model, which transformers is to read; UnsupportedError for a file."""
    if Path(model).is_file():
        raise UnsupportedError(
            f"{model} is a file; the {backend} backend reads directories (try --backend engine)"
        )
    return model


def open_decoder(model: str, backend: str, *, offline: bool) -> Checkpoint:
    """The directory of a decoder, which transformers is to read; UnsupportedError for an encoder, or a file.

    It names what is wrong with a directory better than transformers does.
    """
    source = Checkpoint.open(directory_of(model, backend), offline=offline)
    if source.architecture.is_encoder:
        raise UnsupportedError(
            f"{source.path}: a {source.architecture.model_type}, an encoder, which continues no text; "
            "`evaluate --kind sts`, retrieval, classification, tokens and qa measure those"
        )
    return source


def transformers_model(source: Checkpoint, kind: str, *, sparse: bool) -> Any:
    """transformers' model of this kind: in float32 and on the GPU if there is one, or with sparse linears.

    The latter are on a GPU, of a directory in bfloat16, or of W8A8 or W4A8 with the rest in float32.
    """
    import torch
    import transformers

    with without_bars():
        if sparse:
            from gossamer.gpu.opening import open_sparse

            return open_sparse(source, gpu_device(), kind)
        how = {"dtype": torch.float32, "local_files_only": True}
        model: Any = getattr(transformers, kind).from_pretrained(source.path, **how)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


class EngineBackend:
    """Gossamer's own engine; a directory is packed once into its cache."""

    def __init__(
        self,
        model: str,
        num_threads: int | None = None,
        kv_cache_dtype: KvCacheDtype = "auto",
        *,
        offline: bool = False,
    ) -> None:
        self._llm = LLM(
            model, num_threads, max_batch=BATCH_ROWS, kv_cache_dtype=kv_cache_dtype, offline=offline
        )
        self.tokenizer = self._llm.tokenizer
        self.context = self._llm.model.architecture.max_position_embeddings

    def log_probs(self, ids_BT: NDArray[np.int64]) -> NDArray[np.float64]:
        pairs = [(ids_T[:1].tolist(), ids_T[1:].tolist()) for ids_T in ids_BT]
        return np.array([log_probs for log_probs, _ in score(self._llm.model.native, pairs)])

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        params = SamplingParams(max_tokens=max_tokens, stop=[stop] if stop else [])
        return [generation.text for generation in self._llm.generate(prompts, params)]

    def for_harness(self) -> Any:
        from gossamer.evaluation.engine_lm import EngineLM

        return EngineLM(self._llm)


class TorchBackend:
    """transformers' model (see `transformers_model`), quantized directories included."""

    def __init__(self, model: str, *, sparse: bool = False, offline: bool = False) -> None:
        source = open_decoder(model, "gpu" if sparse else "torch", offline=offline)
        self.tokenizer = Tokenizer.open(source.path)
        self.context = source.architecture.max_position_embeddings
        self._path = source.path
        self._model = transformers_model(source, "AutoModelForCausalLM", sparse=sparse)
        self._device = self._model.device.type

    def log_probs(self, ids_BT: NDArray[np.int64]) -> NDArray[np.float64]:
        import torch

        ids = torch.from_numpy(np.ascontiguousarray(ids_BT)).to(self._device)
        with torch.no_grad():
            logits_NV = self._model(ids[:, :-1]).logits.flatten(0, 1).float()
        losses_N = torch.nn.functional.cross_entropy(logits_NV, ids[:, 1:].flatten(), reduction="none")
        return -losses_N.view(len(ids), -1).double().cpu().numpy()

    def complete(self, prompts: Sequence[str], stop: str, max_tokens: int) -> list[str]:
        """Left-padded batch, greedy; the texts are cut after decoding, so they equal the engine's."""
        import torch

        rows = [self.tokenizer.prompt(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids_BT = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        chosen_BT = self._decode(ids_BT.to(self._device), mask_BT.to(self._device), stop, max_tokens)
        return [self._text(row, stop) for row in chosen_BT.tolist()]

    def for_harness(self) -> Any:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        model: Any = HFLM  # its constructor's arguments are hidden by a decorator
        how = {"batch_size": HARNESS_ROWS[self._device], "softmax_dtype": "float32"}
        return model(pretrained=self._model, tokenizer=tokenizer, **how)

    def _decode(self, ids_BT: Any, mask_BT: Any, stop: str, max_tokens: int) -> Any:
        """Ids [B, steps] chosen greedily; ends early once every row holds an end token or `stop`."""
        import torch

        cache, chosen, fed = None, ids_BT[:, :0], ids_BT
        with torch.no_grad():
            for _ in range(max_tokens):
                positions = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -fed.shape[1] :]
                output = self._model(
                    fed, attention_mask=mask_BT, position_ids=positions, past_key_values=cache, use_cache=True
                )
                cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
                chosen = torch.cat([chosen, fed], dim=1)
                mask_BT = torch.cat([mask_BT, torch.ones_like(fed)], dim=1)
                if all(self._ended(row, stop) for row in chosen.tolist()):
                    break
        return chosen

    def _ended(self, ids: list[int], stop: str) -> bool:
        ended = not self.tokenizer.eos_ids.isdisjoint(ids)
        return ended or (bool(stop) and stop in self.tokenizer.decode(ids))

    def _text(self, ids: list[int], stop: str) -> str:
        end = next((i for i, token in enumerate(ids) if token in self.tokenizer.eos_ids), len(ids))
        text = self.tokenizer.decode(ids[:end])
        return text.split(stop)[0] if stop else text
