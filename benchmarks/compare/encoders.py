"""A packed encoder and its peers in turns on the same token ids; rows go to docs/results/encoders.jsonl.

    python benchmarks/compare/run.py --install onnxruntime    # once; and openvino, sentence-transformers
    python benchmarks/compare/encoders.py MODEL FILE.goss... --rounds 5

MODEL is the dense directory of transformers, which ONNX Runtime and OpenVINO quantize themselves, and
sentence-transformers computes in float32. A round runs every
contestant once, each in a process of its own; what counts is the median of rounds, over the better peer's.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from install import ROOT, how_to_install, installed, python

from gossamer.machine import default_threads

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.results import write_row

HERE = Path(__file__).resolve().parent
OF_GRAPHS = ("onnxruntime", "openvino")
PEERS = (*OF_GRAPHS, "sentence-transformers")


def commands(job: argparse.Namespace) -> Iterator[list[str]]:
    """The contestants of a round."""
    about = ["--threads", str(job.threads), "--repeats", str(job.repeats)]
    for file in job.files:
        yield [sys.executable, str(HERE / "ours_encoder.py"), file, "--name", Path(file).stem, *about]
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    sizes = ["--heads", str(config["num_attention_heads"]), "--width", str(config["hidden_size"])]
    for peer in PEERS:
        if not installed(peer, job.root):
            print(f"{peer} is missing; {how_to_install(peer, job.root)}", file=sys.stderr)
            continue
        program = [str(python(peer, job.root)), str(HERE / "peer_encoder.py"), peer]
        graph = ["--graph", str(graph_of(job))] if peer in OF_GRAPHS else []
        yield [*program, str(job.model), *graph, *about, *sizes]


def graph_of(job: argparse.Namespace) -> Path:
    """The model as an ONNX graph, exported the first time with the onnx of ONNX Runtime's environment."""
    graph = job.root / f"{job.model.resolve().parent.name}-{job.model.name}.onnx"
    if not graph.exists():
        [packages] = python("onnxruntime", job.root).parents[1].glob("lib/python*/site-packages")
        program = [sys.executable, str(HERE / "export_encoder.py"), str(job.model), str(graph)]
        subprocess.run(program, env={**os.environ, "PYTHONPATH": str(packages)}, check=True)
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--root", type=Path, default=ROOT, help="where the peers are installed")
    job = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    contestants = [*commands(job)]
    for index in range(job.rounds):
        for command in contestants:
            completed = subprocess.run(command, capture_output=True, text=True)
            if completed.returncode:
                raise SystemExit(completed.stderr)
            for line in completed.stdout.splitlines():
                if line.startswith('{"who"'):
                    row = json.loads(line)
                    write_row("encoders", {**row, "round": index})
                    found.setdefault(row["workload"], {}).setdefault(row["who"], []).append(
                        row["tokens_per_s"]
                    )
    for workload, of_each in found.items():
        medians = {who: float(np.median(speeds)) for who, speeds in of_each.items()}
        better = max((it for who, it in medians.items() if not who.startswith("Gossamer")), default=None)
        for who, speed in medians.items():
            ratio = f"{speed / better:.2f}x the better peer" if better else ""
            print(f"{workload:26} {who:36} {speed:10,.0f} tokens/s  {ratio}")


if __name__ == "__main__":
    main()
