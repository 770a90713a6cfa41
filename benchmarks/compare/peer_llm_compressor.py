"""llm-compressor's SparseGPT on given rows of tokens: run with the Python of its environment.

    /tmp/peers/llm-compressor/venv/bin/python peer_llm_compressor.py MODEL ROWS.npy OUT --sparsity 0.5 0.7

MODEL is a Hugging Face directory, ROWS.npy holds token ids [rows, T]. Each sparsity becomes the directory
OUT/SPARSITY, in float32 and dense storage, and a line of JSON on the output. `gossamer evaluate` measures it.
"""

import argparse
import importlib
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def prune(model: Path, rows_BT: np.ndarray, output: Path, sparsity: float, threads: int) -> dict[str, Any]:
    """Prune all linears of the decoder in one shot; returns what was run and its seconds."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    oneshot = importlib.import_module("llmcompressor").oneshot
    SparseGPTModifier = importlib.import_module("llmcompressor.modifiers.pruning").SparseGPTModifier
    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows_BT.tolist()]
    recipe = SparseGPTModifier(
        sparsity=sparsity, block_size=128, dampening_frac=0.01, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.monotonic()
    oneshot(
        model=loaded,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=rows_BT.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    seconds = time.monotonic() - start
    loaded.save_pretrained(output, save_compressed=False, disable_sparse_compression=True)
    return {
        "peer": "llm-compressor",
        "version": version("llmcompressor"),
        "what": "SparseGPT",
        "sparsity": sparsity,
        "rows": len(rows),
        "row_length": rows_BT.shape[1],
        "threads": threads,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--threads", type=int, default=2)
    job = parser.parse_args()
    for sparsity in job.sparsity:
        row = prune(job.model, np.load(job.rows), job.output / f"{sparsity:g}", sparsity, job.threads)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
