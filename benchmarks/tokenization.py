"""How fast text becomes rows of tokens, and whether training waits for them, as rows of docs/results.

    python benchmarks/tokenization.py MODEL SRC... [--rows 4000]

Packs rows of 1,024 tokens of the sources with the tokenizer of the directory MODEL, as `pretrain` does, from
an empty cache of pieces; beside it, tokenizers alone on the same pieces of text. Seconds of CPU time are the
process's, on all threads: on a busy machine they say more than those of the clock. Then a dummy step takes
100,000 tokens/s of the rows, and it is counted how long it waits for them.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from results import write_row

from gossamer.data.mixture import Mixture
from gossamer.data.packing import BATCH_PIECES, CHARACTERS_A_TOKEN, ROWS, PackedText, pack, read_rows
from gossamer.tokens.tokenizer import Tokenizer
from gossamer.training.rows import Rows

ROW_LENGTH = 1024
STEP_ROWS = 16
TOKENS_A_SECOND = 100_000
SECONDS = 20.0


def mixture(sources: list[str]) -> Mixture:
    return Mixture(sources, 0, piece_characters=CHARACTERS_A_TOKEN * ROW_LENGTH, repeat=True)


def packing(
    tokenizer: Tokenizer, sources: list[str], num_rows: int, folder: Path
) -> tuple[PackedText, dict[str, Any]]:
    """Text from the disk to rows on the disk."""
    clock, cpu = time.monotonic(), time.process_time()
    packed = pack(mixture(sources), tokenizer, ROW_LENGTH, num_rows, folder / ROWS)
    cpu, clock = time.process_time() - cpu, time.monotonic() - clock
    return packed, speed("packing", sum(packed.num_tokens), cpu, clock)


def library(tokenizer: Tokenizer, sources: list[str], num_rows: int) -> dict[str, Any]:
    """tokenizers alone, on all cores, on the text of about as many rows."""
    texts = [piece.text for piece in islice(mixture(sources), num_rows)]
    clock, cpu, num_tokens = time.monotonic(), time.process_time(), 0
    for begin in range(0, len(texts), BATCH_PIECES):
        batch = texts[begin : begin + BATCH_PIECES]
        found = tokenizer._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(len(each.ids) for each in found)
    cpu, clock = time.process_time() - cpu, time.monotonic() - clock
    return speed("tokenizers alone", num_tokens, cpu, clock)


def speed(what: str, num_tokens: int, cpu: float, clock: float) -> dict[str, Any]:
    rates = {"tokens_per_cpu_s": num_tokens / cpu, "tokens_per_s": num_tokens / clock}
    return {"what": what, "num_tokens": num_tokens, "cpu_s": cpu, "clock_s": clock} | rates


def waiting(folder: Path, packed: PackedText) -> dict[str, Any]:
    """A step that takes its tokens at a fixed speed: the share of the time in which it waits for the next."""
    rows, waited, step, begin = Rows(read_rows(folder, packed)), 0.0, 0, time.monotonic()
    while time.monotonic() - begin < SECONDS:
        asked = time.monotonic()
        first = step * STEP_ROWS % (packed.num_rows - STEP_ROWS)
        rows.collate([*range(first, first + STEP_ROWS)])
        waited += time.monotonic() - asked
        time.sleep(STEP_ROWS * ROW_LENGTH / TOKENS_A_SECOND)
        step += 1
    return {"what": "waiting", "tokens_per_s": TOKENS_A_SECOND, "waits": waited / (time.monotonic() - begin)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--rows", type=int, default=4000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        packed, row = packing(Tokenizer.open(given.model), given.sources, given.rows, Path(name))
        write_row("tokenization", row)
        write_row("tokenization", library(Tokenizer.open(given.model), given.sources, given.rows))
        write_row("tokenization", waiting(Path(name), packed))


if __name__ == "__main__":
    main()
