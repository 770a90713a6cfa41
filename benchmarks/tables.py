"""README's tables of results, made from the newest rows of docs/results/*.jsonl.

python benchmarks/tables.py            writes them between <!-- results --> and <!-- /results -->
python benchmarks/tables.py --check    fails unless they are there
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from results import RESULTS

from gossamer.report import Table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
LEVELS = ("scalar", "avx2", "avx512", "amx")

Row = dict[str, Any]


def rows_of(benchmark: str, keys: Iterable[str], folder: Path = RESULTS) -> list[Row]:
    """The newest row of each measurement, told apart by `keys`, in the order first measured."""
    file, newest = folder / f"{benchmark}.jsonl", {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for row in map(json.loads, lines):
        newest[tuple(row[key] for key in keys)] = row
    return list(newest.values())


def title(what: str, rows: list[Row]) -> str:
    """What, where and when; and whether a row contradicts itself."""
    wrong = (
        " **Contains shares above 100%: a bug in the benchmark.**"
        if any(r["impossible"] for r in rows)
        else ""
    )
    places = ", ".join(dict.fromkeys(f"{row['cpu']} ({row['isa']})" for row in rows))
    return f"*{what}; {places}, {max(row['date'] for row in rows)[:10]}.*{wrong}"


def decode(folder: Path) -> Iterable[tuple[str, Table]]:
    """Whole models: one line a setting."""
    keys = ("job", "shape", "layers", "values", "sparsity", "batch", "prompt")
    if not (rows := rows_of("decode", keys, folder)):
        return
    columns = ("model", "weights", "batch", "context", "decode tokens/s", "GB/s", "of bandwidth")
    columns += ("linears against dense f32", "prompt tokens/s")
    lines = [
        (
            row["shape"] + (f", {row['layers']} layers" if row["layers"] else ""),
            f"{row['values']} {row['sparsity']:.0%}",
            str(row["batch"]),
            str(row["prompt"]),
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['bandwidth_share']:.0%}",
            f"{row['linears_speedup']:.1f}x" if row["linears_speedup"] else "",
            f"{row['prompt_tokens_per_s']:.0f}",
        )
        for row in rows
    ]
    yield (
        title("Whole models: medians, beside the best of all readers of memory in the run", rows),
        Table("", columns, lines),
    )


def prefill(folder: Path) -> Iterable[tuple[str, Table]]:
    """A stack of wide linears with a prompt."""
    if not (rows := rows_of("prefill", ("values", "sparsity", "tokens", "num_threads"), folder)):
        return
    lines = [
        (
            f"{row['values']} {row['sparsity']:.0%}",
            f"{row['tops']['median']:.2f} ± {row['tops']['deviation']:.2f}",
            f"{row['peak_share']:.0%} of {row['int8_peak_tops']:.2f}",
            f"{row['against_dense']:.2f}x",
        )
        for row in rows
    ]
    tokens, threads = rows[0]["tokens"], rows[0]["num_threads"]
    what = f"A prompt of {tokens} tokens through linears of 4096 x 11008, {threads} threads"
    yield title(what, rows), Table("", ("weights", "TOPS", "of the INT8 peak", "against dense"), lines)


def kernels(folder: Path) -> Iterable[tuple[str, Table]]:
    """Every kernel on one thread at 1 and 256 tokens."""
    if not (rows := rows_of("kernels", ("values", "storage", "kernel_isa", "tokens"), folder)):
        return
    rates = {
        (row["values"], row["storage"], row["kernel_isa"], row["tokens"]): row["giga_multiply_adds_per_s"]
        for row in rows
    }

    def cell(values: str, storage: str, isa: str) -> str:
        found = [rates.get((values, storage, isa, tokens)) for tokens in (1, 256)]
        return " / ".join("-" if rate is None else f"{rate:.3g}" for rate in found) if any(found) else ""

    matrices = dict.fromkeys((row["values"], row["storage"]) for row in rows)
    lines = [
        (f"{values} {'70%' if storage == 'sparse' else 'dense'}", *(cell(values, storage, i) for i in LEVELS))
        for values, storage in matrices
    ]
    what = "One thread, 10^9 multiply-adds/s with 1 / 256 tokens, zeros counted"
    yield title(what, rows), Table("", ("matrix product", *LEVELS), lines)


SECTIONS: tuple[Callable[[Path], Iterable[tuple[str, Table]]], ...] = (decode, prefill, kernels)


def render(folder: Path = RESULTS) -> str:
    """All tables as Markdown; a line that says so where nothing was measured."""
    found = [f"{head}\n\n{table.markdown()}" for section in SECTIONS for head, table in section(folder)]
    return "\n".join(found) or "No results yet: `benchmarks/` makes them.\n"


def replaced(readme: str, tables: str) -> str:
    """The README with these tables between its markers; ValueError without the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> int:
    readme = README.read_text(encoding="utf-8")
    wanted = replaced(readme, render())
    if "--check" in sys.argv[1:]:
        return int(readme != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
