"""Gossamer and its peers in turns, each in a process of its own; rows go to docs/results/compare.jsonl.

    python benchmarks/compare/run.py                      everything that is installed
    python benchmarks/compare/run.py llama.cpp --rounds 5
    python benchmarks/compare/run.py --install llama.cpp

A round runs every contestant once and reads the memory's bandwidth before each: all see the same machine.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from install import PACKAGES, ROOT, how_to_install, install, installed, python
from report import tables

from gossamer.machine import default_threads
from gossamer.measure.readers import MAX_BYTES, Readers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.results import write_row

HERE = Path(__file__).resolve().parent
PEERS = ("llama.cpp", "openvino", "onnxruntime", "torch")
SCRIPTS = {peer: HERE / f"peer_{peer.replace('.', '_')}.py" for peer in PEERS}
Command = list[str]


def commands(job: argparse.Namespace) -> list[Command]:
    """The contestants of a round: ours before each peer that is there; what is missing is said."""
    found, about = [], ["--threads", str(job.threads), "--repeats", str(job.repeats)]
    for peer in job.peers:
        if not installed(peer, job.root):
            print(f"{peer} is missing; {how_to_install(peer, job.root)}", file=sys.stderr)
            continue
        shape = ["--shape", job.shape, "--prompt", str(job.prompt), "--new", str(job.new)]
        whole = peer == "llama.cpp"
        for values, sparsity, pattern in job.ours if whole else job.ours_stack:
            part = ["model", *shape] if whole else ["stack", "--tokens", *map(str, job.tokens)]
            words = [sys.executable, str(HERE / "ours.py"), *part, "--values", values]
            found.append([*words, "--sparsity", sparsity, "--pattern", pattern, *about])
        interpreter = Path(sys.executable) if whole else python(peer, job.root)
        special = [*shape, "--root", str(job.root)] if whole else ["--tokens", *map(str, job.tokens)]
        found.append([str(interpreter), str(SCRIPTS[peer]), *special, *about])
    return found


def rows_of(command: Command) -> Iterator[dict]:
    """What a contestant prints, line by line; CalledProcessError when it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def compare(job: argparse.Namespace) -> tuple[list[dict], int]:
    """All rows of all rounds, and how many contestants failed; each row is kept as soon as it is there."""
    memory = Readers.of(np.ones(MAX_BYTES, np.uint8), job.threads)
    found, failures, contestants = [], 0, commands(job)
    run = time.strftime("%Y-%m-%d %H:%M:%S")

    def keep(row: dict, number: int) -> None:
        row = {"run": run, "round": number} | row
        found.append(row)
        if job.record:
            write_row(job.rows, row)
        else:
            print(json.dumps(row), flush=True)

    for number in range(1, job.rounds + 1):
        for command in contestants:
            read = memory.best()
            keep({"peer": "memory", "threads": job.threads, "read_gb_per_s": read / 1e9}, number)
            try:
                for row in rows_of(command):
                    keep(row, number)
            except subprocess.CalledProcessError as error:
                failures += 1
                print(f"failed, status {error.returncode}: {' '.join(command)}", file=sys.stderr)
    return found, failures


def pack(text: str) -> tuple[str, str, str]:
    """`i8:0.7:1x4` as value type, sparsity and pattern."""
    values, sparsity, pattern, *_ = *text.split(":"), "", ""
    return values, sparsity or "0", pattern or "unstructured"


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--install", choices=sorted(PACKAGES), help="make this peer's environment, and end")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"where peers live (default: {ROOT})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="repeats of each process in a round")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--shape", default="tinyllama-1.1b", help="the whole model's")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 512], help="rows of the stack's input")
    parser.add_argument("--ours", type=pack, nargs="+", default=[pack("i8:0.7"), pack("i4:0.7")])
    parser.add_argument("--ours-stack", type=pack, nargs="+", default=[pack("i8:0.7"), pack("i8")])
    parser.add_argument("--rows", default="compare", help="file of docs/results that rows go to")
    parser.add_argument("--no-record", dest="record", action="store_false", help="print rows, keep none")
    return parser


def main() -> int:
    parser = options()
    job = parser.parse_args()
    if job.install:
        install(job.install, job.root)
        return 0
    if unknown := set(job.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    job.peers = job.peers or list(PEERS)
    rows, failures = compare(job)
    if rows:
        print(tables(rows))
    return 1 if failures or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
