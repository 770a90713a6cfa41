"""llama.cpp's `llama-bench` on a random-weight GGUF of a Llama shape: run in Gossamer's environment.

The prompt is timed as one pass, decoding from an empty context; llama-bench warms up before each.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median, pstdev

from install import ROOT, llama_bench, python
from stack import Row, options, print_rows

from gossamer.measure.synthetic import CONFIGS, Shape

TYPES = ("Q8_0", "Q4_0")


def gguf_file(shape: Shape, type_name: str, root: Path) -> tuple[Path, int]:
    """The GGUF of a shape, written on first use, and the bytes that a decoded token reads of it."""
    config = CONFIGS[shape]
    file = root / "llama.cpp" / "models" / f"{shape}-{config['num_hidden_layers']}x-{type_name}.gguf"
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = Path(__file__).with_name("gguf_file.py")
    command = [python("llama.cpp", root), writer, file, type_name, json.dumps(config)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return file, int(done.stdout)


def measure(
    shape: Shape, type_name: str, threads: int, repeats: int, prompt: int, new: int, root: Path = ROOT
) -> Iterator[Row]:
    """Two rows: a prompt of `prompt` tokens, and `new` tokens decoded one by one."""
    file, step_bytes = gguf_file(shape, type_name, root)
    numbers = {"-p": prompt, "-n": new, "-t": threads, "-r": repeats}
    flags = [str(word) for option in numbers.items() for word in option]
    command = [llama_bench(root), "-m", file, *flags, "-o", "json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for test in json.loads(done.stdout):
        speeds = test["samples_ts"]
        decoding = test["n_gen"] > 0
        yield {
            "peer": "llama.cpp",
            "version": test["build_commit"],
            "what": type_name,
            "threads": test["n_threads"],
            "shape": shape,
            "tokens": 1 if decoding else prompt,
            "repeats": len(speeds),
            "tokens_per_s": median(speeds),
            "deviation_tokens_per_s": pstdev(speeds),
            "weight_bytes": step_bytes,
            "gb_per_s": step_bytes * median(speeds) / 1e9 if decoding else None,
        }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", choices=CONFIGS, default="tinyllama-1.1b")
    parser.add_argument("--types", nargs="+", default=TYPES, help="GGUF types: Q8_0, Q4_0, F16, F32 ...")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--root", type=Path, default=ROOT)
    job = parser.parse_args()
    for type_name in job.types:
        print_rows(measure(job.shape, type_name, job.threads, job.repeats, job.prompt, job.new, job.root))


if __name__ == "__main__":
    main()
