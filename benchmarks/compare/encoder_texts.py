"""The same token ids for every contestant, and how their making of vectors is timed. Needs numpy only."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Ids = list[int]
WORKLOADS = {  # name -> lengths of the texts of each call
    "14 tokens, one by one": [[14]] * 16,
    "16 texts of 16 tokens": [[16] * 16],
    "a text of 256 tokens": [[256]],
    "32 texts of mixed length": [[9, 174, 23, 61, 12, 98, 31, 16, 250, 44, 19, 72, 11, 128, 27, 36] * 2],
}
BEGIN, END = 101, 102  # [CLS] and [SEP] of BERT


def made_up(lengths: Sequence[int], seed: int, vocabulary: int) -> list[Ids]:
    """Texts of so many tokens, marks included."""
    rng = np.random.default_rng(seed)
    return [[BEGIN, *rng.integers(1000, vocabulary, n - 2).tolist(), END] for n in lengths]


def time_workloads(who: dict, encode: Callable[[list[Ids]], object], repeats: int, vocabulary: int) -> None:
    """Print a row for each workload: the median seconds of all its calls, and tokens a second."""
    for name, calls in WORKLOADS.items():
        texts = [made_up(lengths, seed, vocabulary) for seed, lengths in enumerate(calls)]
        for _ in range(3):
            encode(texts[0])
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for batch in texts:
                encode(batch)
            seconds.append(time.perf_counter() - begin)
        tokens = sum(map(sum, calls))
        median = float(np.median(seconds))
        row = {**who, "workload": name, "tokens": tokens, "seconds": median, "tokens_per_s": tokens / median}
        print(json.dumps(row), flush=True)


def padded(texts: list[Ids]) -> dict[str, np.ndarray]:
    """A batch as an ONNX graph of a BERT takes it."""
    width = max(map(len, texts))
    ids = np.array([it + [0] * (width - len(it)) for it in texts], np.int64)
    mask = np.array([[1] * len(it) + [0] * (width - len(it)) for it in texts], np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def pooled(hidden_BTD: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """The mean of each text's tokens [B, D], of length 1."""
    mask_BT1 = mask_BT[..., None].astype(np.float32)
    vectors_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    return vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)


def vocabulary_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
