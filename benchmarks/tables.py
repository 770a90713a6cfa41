"""Tables of results, made from the newest rows of docs/results/*.jsonl.

    python benchmarks/tables.py     writes them into README.md and, all of them, into docs/results/README.md

They stand between <!-- results --> and <!-- /results -->.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path

import encoder_tables
from compare.report import ratio_table, speed_table
from results import RESULTS, Row, all_rows, newest

from gossamer.cli import markdown
from gossamer.job.report import Table

README, ALL = RESULTS.parents[1] / "README.md", RESULTS / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
LEVELS = ("scalar", "avx2", "avx512", "amx")
MAIN_JOBS = ("step-1b", "linears-7b", "batch-1b")  # of decode.py, for README
MAIN_SPARSITIES = (0.5, 0.7, 0.9)  # of training.py, for README
SETTING = ("shape", "layers", "values", "sparsity", "batch", "prompt")  # what tells rows of decode.py apart


def headed(what: str, rows: list[Row], table: Table) -> str:
    """A table under what, where and when; and how many rows contradict themselves."""
    places = ", ".join(dict.fromkeys(f"{row['cpu']} ({row['isa']})" for row in rows))
    wrong = sum(1 for row in rows if row["impossible"])
    warning = (
        f"**Shares of {wrong} of {len(rows)} rows are above 100%: their yardstick is too short.**\n\n"
        if wrong
        else ""
    )
    date = max(row["date"] for row in rows)[:10]
    return f"*{what}; {places}, {date}.*\n\n{warning}{markdown(table)}"


def decode(folder: Path, jobs: tuple[str, ...] = ()) -> str:
    """Whole models, one line for each setting that the named jobs (without names: all) have measured.

    Jobs overlap: a sweep of batches begins with the batch of 1 that another job measures as well. The newest
    row of a setting is shown, whichever job it comes from, so that no page has two figures for one setting.
    """
    setting, measured = itemgetter(*SETTING), all_rows("decode", folder)
    wanted = {setting(row) for row in measured if not jobs or row["job"] in jobs}
    rows = [row for row in newest(measured, SETTING) if setting(row) in wanted]
    if not rows:
        return ""
    columns = ("model", "weights", "batch", "context", "decode tokens/s", "GB/s")
    columns += ("of the run's best", "of its round's", "linears against dense f32", "prompt tokens/s")
    what = "Whole models: medians, beside the best reader of memory in the run, and in the same round of it"
    return headed(what, rows, Table("", columns, [decode_line(row) for row in rows]))


def decode_line(row: Row) -> tuple[str, ...]:
    return (
        row["shape"] + (f", {row['layers']} layers" if row["layers"] else ""),
        f"{row['values']} {row['sparsity']:.0%}",
        str(row["batch"]),
        str(row["prompt"]),
        f"{row['decode_tokens_per_s']:.1f}",
        f"{row['gb_per_s']:.1f}",
        f"{row['bandwidth_share']:.0%}",
        f"{row['round_share']:.0%}",
        f"{row['linears_speedup']:.1f}x" if row["linears_speedup"] else "",
        f"{row['prompt_tokens_per_s']:.0f}",
    )


def main_jobs(folder: Path) -> str:
    return decode(folder, MAIN_JOBS)


def prefill(folder: Path) -> str:
    """A stack of wide linears with a prompt."""
    rows = newest(all_rows("prefill", folder), ("values", "sparsity", "tokens", "num_threads"))
    if not rows:
        return ""
    lines = [
        (
            f"{row['values']} {row['sparsity']:.0%}",
            f"{row['tops']['median']:.2f} ± {row['tops']['deviation']:.2f}",
            f"{row['peak_share']:.0%} of {row.get('int8_peak_tops') or row['f32_peak_tops']:.2f}",
            f"{row['against_dense']:.2f}x",
        )
        for row in rows
    ]
    tokens, threads = rows[0]["tokens"], rows[0]["num_threads"]
    what = f"A prompt of {tokens} tokens through linears of 4096 x 11008, {threads} threads"
    return headed(what, rows, Table("", ("weights", "TOPS", "of the peak", "against dense"), lines))


def main_training(folder: Path) -> str:
    return training(folder, MAIN_SPARSITIES)


def training(folder: Path, sparsities: Sequence[float] = ()) -> str:
    """Training on the values alone: the linears by sparsity (without any named, all), then whole steps."""
    rows = newest(all_rows("training", folder), ("job", "sparsity"))
    linears = [row for row in rows if row["job"] == "linears"]
    linears = [row for row in linears if not sparsities or row["sparsity"] in sparsities]
    if not linears:
        return ""
    lines = [
        (
            f"{row['sparsity']:.0%}",
            f"{row['against_dense_f32']:.2f}x",
            f"{row['bound']:.2f}x",
            f"{row['against_dense_bf16']:.2f}x",
            f"{row['peak_share']['sparse_f32']:.0%} / {row['peak_share']['dense_f32']:.0%}",
        )
        for row in linears
    ]
    columns = ("zeros", "against dense float32", "1 / (1 - s)", "against dense bfloat16")
    columns += ("of the float32 peak, sparse / dense",)
    first = linears[0]
    what = (
        f"Training: forward and backward of a block's linears (width {first['width']}, FFN {first['ffn']}, "
    )
    what += f"{first['tokens']} tokens), float32 on the values alone; {first['num_threads']} threads"
    steps = "".join(f"\n{step_line(row)}\n" for row in rows if row["job"] == "step")
    return headed(what, linears, Table("", columns, lines)) + steps


def step_line(row: Row) -> str:
    seconds = {name: spread["median"] for name, spread in row["seconds"].items()}
    return (
        f"Whole steps of the Trainer ({row['layers']} layers x {row['width']}, {row['tokens']} tokens, "
        f"{row['sparsity']:.0%} zeros): {row['against_dense_f32']:.2f}x of dense float32 "
        f"({seconds['sparse_f32']:.1f} against {seconds['dense_f32']:.1f} s), "
        f"{row['against_dense_bf16']:.2f}x of dense with bfloat16 products "
        f"({seconds['sparse_bf16']:.1f} against {seconds['dense_bf16']:.1f} s); gradients and moments take "
        f"{row['optimizer_gradient_share']:.2f} of the memory."
    )


def kernels(folder: Path) -> str:
    """Every kernel on one thread at 1 and 256 tokens."""
    rows = newest(all_rows("kernels", folder), ("values", "storage", "kernel_isa", "tokens"))
    if not rows:
        return ""
    rates = {
        (row["values"], row["storage"], row["kernel_isa"], row["tokens"]): row["giga_multiply_adds_per_s"]
        for row in rows
    }

    def cell(values: str, storage: str, isa: str) -> str:
        found = [rates.get((values, storage, isa, tokens)) for tokens in (1, 256)]
        return " / ".join("-" if rate is None else f"{rate:.3g}" for rate in found) if any(found) else ""

    lines = [
        (f"{values} {'70%' if storage == 'sparse' else 'dense'}", *(cell(values, storage, i) for i in LEVELS))
        for values, storage in dict.fromkeys((row["values"], row["storage"]) for row in rows)
    ]
    what = "One thread, 10^9 multiply-adds/s with 1 / 256 tokens, those with zeros counted"
    return headed(what, rows, Table("", ("matrix product", *LEVELS), lines))


def last_comparison(folder: Path) -> list[Row]:
    rows = all_rows("compare", folder)
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def against_peers(folder: Path) -> str:
    """Our speed over each peer's in the last comparison, beside what the bytes allow."""
    rows = last_comparison(folder)
    what = "Against other engines in the same run (`benchmarks/compare/`)"
    return f"*{what}, {rows[0]['run'][:10]}.*\n\n{ratio_table(rows)}\n" if rows else ""


def whole_models(folder: Path) -> str:
    """The same for whole models that decode, for README."""
    found = last_comparison(folder)
    rows = [row for row in found if not str(row.get("shape")).startswith("stack") and row.get("tokens") == 1]
    what = "Whole models that decode, against llama.cpp in the same run (`benchmarks/compare/`)"
    return f"*{what}, {rows[0]['run'][:10]}.*\n\n{ratio_table(rows)}\n" if rows else ""


def peers(folder: Path) -> str:
    """Every engine's speed in the last comparison."""
    rows = last_comparison(folder)
    return f"*All engines in that run.*\n\n{speed_table(rows)}\n" if rows else ""


BRIEF: tuple[Callable[[Path], str], ...] = (main_jobs, whole_models, main_training)
COMPLETE: tuple[Callable[[Path], str], ...] = (
    *(decode, prefill, training, kernels, against_peers, peers),
    *encoder_tables.SECTIONS,
)


def render(sections: Iterable[Callable[[Path], str]], folder: Path = RESULTS) -> str:
    """Tables as Markdown; a line that says so where nothing was measured."""
    texts = [section(folder) for section in sections]
    return "\n".join(text for text in texts if text) or "No results yet: `benchmarks/` makes them.\n"


def replaced(page: str, tables: str) -> str:
    """A page with these tables between its markers; ValueError without the markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    for page, sections in ((README, BRIEF), (ALL, COMPLETE)):
        page.write_text(replaced(page.read_text(encoding="utf-8"), render(sections)), encoding="utf-8")


if __name__ == "__main__":
    main()
