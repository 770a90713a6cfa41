"""Seconds and resident memory of `gossamer import` on a GGUF of 1 GB: 0.9 B random weights in Q8_0.

    python benchmarks/import_gguf.py SOURCE.gguf [--layers 19]

SOURCE.gguf, of any Llama, lends its tokenizer and its settings; the widths are TinyLlama's. The import runs
in a process of its own, so that its largest resident size can be asked for. Prints a row of JSON, and in it
the seconds that writing as many zeros as the import writes bytes takes here.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

WIDTH, INNER, HEADS, KV_HEADS = 2048, 5632, 32, 4
KV_WIDTH = WIDTH * KV_HEADS // HEADS
ROWS = {
    "attn_q": (WIDTH, WIDTH), "attn_k": (KV_WIDTH, WIDTH), "attn_v": (KV_WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}  # fmt: skip
BLOCK = 32  # inputs of a Q8_0 block: a float16 scale and 32 bytes


def q8_0(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Bytes [rows, columns / 32 * 34] of random Q8_0 blocks with a common scale."""
    blocks = rng.integers(0, 256, (rows * columns // BLOCK, BLOCK + 2), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(3e-4).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write_file(source: Path, file: Path, layers: int) -> None:
    """A Llama of TinyLlama's widths with the tokenizer and the settings of `source`."""
    given, writer = gguf.GGUFReader(source), gguf.GGUFWriter(file, "llama")
    ours = {
        "block_count": layers, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": WIDTH // HEADS,
    }  # fmt: skip
    for name, value in given.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = value.types[0]
        inner = value.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, ours.get(name.removeprefix("llama."), value.contents()), kind, inner)
    rng, vocabulary = (
        np.random.default_rng(0),
        next(int(tensor.shape[1]) for tensor in given.tensors if tensor.name == "token_embd.weight"),
    )
    ones, kind = np.ones(WIDTH, np.float32), gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", q8_0(rng, vocabulary, WIDTH), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(layers):
        for name, shape in ROWS.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", q8_0(rng, *shape), raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--layers", type=int, default=19)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file, output = Path(name) / "model.gguf", Path(name) / "imported"
        write_file(given.source, file, given.layers)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "gossamer", "import", file, "-o", output], check=True)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        written = sum(part.stat().st_size for part in output.glob("*.safetensors"))
        start = time.monotonic()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={name}/copy", "bs=1M", f"count={written >> 20}"], check=True
        )
        print(json.dumps({
            "num_bytes": file.stat().st_size, "written": written, "seconds": round(seconds, 1),
            "resident": peak, "plain_write_seconds": round(time.monotonic() - start, 1),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
