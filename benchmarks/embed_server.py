"""An encoder's server under many clients at once, beside the Python API on the same texts, in turns.

    python benchmarks/embed_server.py MODEL --clients 200 --threads 2

Clients and server share the machine. Each client has a connection of its own and asks for one text after
another; texts have about 14 tokens. A row goes to docs/results/embed_server.jsonl.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
from results import write_row

from gossamer import Encoder

SERVER = """
import json, sys
from gossamer.server import Serve, serve
options = json.loads(sys.argv[1])
serve(Serve(**options), lambda it: it.lasting or print(json.dumps(dict(it.metrics)), flush=True))
"""
WORDS = ["the", "of", "in", "house", "river", "music", "people", "water", "light", "paper", "road"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    job = parser.parse_args()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(job.texts)]
    encoder = Encoder(job.model, job.threads)
    num_tokens = sum(len(row.ids) for row in encoder.token_ids(texts))
    rates: dict[str, list[float]] = {"api": [], "http": []}
    seconds: list[float] = []
    with served(job.model, job.threads) as (host, port):
        asyncio.run(ask(host, port, job.clients, texts[: 2 * job.clients]))
        encoder.encode(texts[: job.clients])
        for _ in range(job.rounds):
            start = time.perf_counter()
            encoder.encode(texts)
            rates["api"].append(len(texts) / (time.perf_counter() - start))
            start = time.perf_counter()
            seconds += asyncio.run(ask(host, port, job.clients, texts))
            rates["http"].append(len(texts) / (time.perf_counter() - start))
    row = {
        "model": job.model,
        "threads": job.threads,
        "clients": job.clients,
        "tokens_per_text": num_tokens / len(texts),
        "api_texts_per_s": median(rates["api"]),
        "http_texts_per_s": median(rates["http"]),
        "http_of_api": median(b / a for a, b in zip(rates["api"], rates["http"], strict=True)),
        "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
        "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
    }
    write_row("embed_server", row)


@contextmanager
def served(model: str, threads: int) -> Iterator[tuple[str, int]]:
    """The server's address, while it runs."""
    options: dict[str, Any] = {"model": model, "port": 0, "threads": threads, "max_queue": 4096, "name": "it"}
    command = [sys.executable, "-c", SERVER, json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        host, _, port = json.loads(process.stdout.readline())["url"].removeprefix("http://").partition(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.wait()


async def ask(host: str, port: int, clients: int, texts: Sequence[str]) -> list[float]:
    """Seconds of each request; every client waits for its answer, and asks again."""
    bodies = iter([json.dumps({"model": "it", "input": it, "encoding_format": "base64"}) for it in texts])
    seconds: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for body in bodies:
            start = time.perf_counter()
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: it\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise SystemExit(f"the server answers {answer!r}")
            await reader.readexactly(int(answer.partition(b"content-length:")[2].split()[0]))
            seconds.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds


if __name__ == "__main__":
    main()
