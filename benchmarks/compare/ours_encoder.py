"""Our engine on a packed encoder: FILE.goss --name WHAT --threads N, a row for each workload."""

import argparse

import numpy as np
from encoder_texts import Ids, time_workloads

from gossamer import Encoder, _native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--name", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    job = parser.parse_args()
    encoder = Encoder(job.file, job.threads)
    mode = encoder.pooling.mode

    def encode(texts: list[Ids]) -> np.ndarray:
        ids = np.array([token for text in texts for token in text], np.int32)
        lengths = np.array([*map(len, texts)], np.int32)
        vectors_ND = encoder._native.encode(ids, np.zeros_like(ids), lengths, mode)
        return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)

    who = {"who": f"Gossamer {job.name}", "version": _native.isa(), "threads": job.threads}
    time_workloads(who, encode, job.repeats, encoder.architecture.vocab_size)


if __name__ == "__main__":
    main()
