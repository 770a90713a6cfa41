"""Tables of what is measured of encoders, of patterns of zeros, and of products that skip these."""

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from results import Row, all_rows, newest

from gossamer.cli import markdown
from gossamer.job.report import Table

PATTERNS = ("unstructured", "2:4", "1x4")
METRICS = {  # field of patterns.jsonl -> its name, and how it is written
    "sts_b": ("STS-B (Spearman)", ".4f"),
    "wikitext2_perplexity_40_rows": ("perplexity of WikiText-2", ".1f"),
}
STEPS = {512: "prompts of 512", 16: "16 tokens", 1: "one token"}


def titled(what: str, rows: list[Row], table: Table) -> str:
    """A table under what, where and when."""
    places = dict.fromkeys(f"{row['cpu']} ({row['isa']})" if "isa" in row else row["cpu"] for row in rows)
    return f"*{what}; {', '.join(places)}, {max(row['date'] for row in rows)[:10]}.*\n\n{markdown(table)}"


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of each combination of values, in the order in which these came."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def patterns(folder: Path) -> str:
    """What models are worth after `prune --pattern`, so that one can be chosen."""
    rows = newest(all_rows("patterns", folder), ("parent", "sparsity", "pattern"))
    if not rows:
        return ""
    lines = []
    for (parent, sparsity), some in grouped(rows, "parent", "sparsity").items():
        [metric] = {key for row in some for key in row} & METRICS.keys()
        name, form = METRICS[metric]
        values = {row["pattern"]: format(row[metric], form) for row in some}
        cells = [values.get(it, "") for it in PATTERNS] if sparsity else [values["dense"]] * 3
        lines.append((parent, name, f"{sparsity:.0%}", *cells))
    how = "; ".join(dict.fromkeys(f"{row['parent']}: {row['how']}" for row in rows if row["sparsity"]))
    what = f"What a pattern of zeros costs before any training (`prune --pattern`; {how})"
    return titled(what, rows, Table("", ("model", "measured", "zeros", *PATTERNS), sorted(lines)))


def skipping(folder: Path) -> str:
    """A stack of wide linears whose products leave zeros out."""
    setting = ("storage", "pattern", "sparsity", "tokens", "num_threads")
    rows = newest(all_rows("skipping", folder), setting)
    if not rows:
        return ""
    lines = []
    for (storage, pattern, sparsity), some in grouped(rows, "storage", "pattern", "sparsity").items():
        ratios = {row["tokens"]: f"{row['against_dense']:.2f}x" for row in some}
        lines.append((f"{storage}, {pattern} {sparsity:.0%}", *(ratios.get(it, "") for it in STEPS)))
    what = f"INT8 linears of 4096 x 11008 over dense INT8, {rows[0]['num_threads']} threads"
    return titled(what, rows, Table("", ("stored as", *STEPS.values()), lines))


def encoders(folder: Path) -> str:
    """Every engine's speed in its last run, over the better one of the others."""
    rows = [{**row, "who": re.sub(r" \d[\d.]*$", "", row["who"])} for row in all_rows("encoders", folder)]
    if not rows:
        return ""
    speeds = {
        key: median(row["tokens_per_s"] for row in last_run(some))
        for key, some in grouped(rows, "who", "workload").items()
    }
    workloads = [*dict.fromkeys(row["workload"] for row in rows)]
    better = dict.fromkeys(workloads, 0.0)
    for (who, workload), speed in speeds.items():
        if not is_ours(who):
            better[workload] = max(better[workload], speed)
    lines = []
    for who in dict.fromkeys(row["who"] for row in rows):
        cells = []
        for workload in workloads:
            speed, other = speeds.get((who, workload)), better[workload]
            ratio = f" ({speed / other:.2f}x)" if speed and other and is_ours(who) else ""
            cells.append(f"{speed:,.0f}{ratio}" if speed else "")
        lines.append((who, *cells))
    what = "Encoders: tokens/s of all-MiniLM-L6-v2, over the better peer; ours and most others in INT8"
    what += " (d8: dense, bNN-8: NN% zeros in 1x4)"
    return titled(what, rows, Table("", ("engine", *workloads), lines))


def is_ours(who: str) -> bool:
    return who.startswith("Gossamer")


def last_run(rows: list[Row]) -> list[Row]:
    """Those since the last first round."""
    begin = max(index for index, row in enumerate(rows) if row["round"] == 0)
    return rows[begin:]


def embed_server(folder: Path) -> str:
    """Texts a second by HTTP beside the Python API."""
    rows = newest(all_rows("embed_server", folder), ("model", "threads", "clients"))
    if not rows:
        return ""
    lines = [
        (
            f"{row['clients']}, {row['tokens_per_text']:.0f} tokens a text",
            str(row["threads"]),
            f"{row['http_texts_per_s']:,.0f}",
            f"{row['api_texts_per_s']:,.0f}",
            f"{row['http_of_api']:.2f}",
            f"{row['p50_ms']:.0f} / {row['p99_ms']:.0f}",
        )
        for row in rows
    ]
    columns = ("clients", "threads", "texts/s by HTTP", "by the Python API", "share", "p50 / p99 ms")
    return titled("An encoder's server under clients at once", rows, Table("", columns, lines))


def sparse_transfer(folder: Path) -> str:
    """Scores of tasks after sparse transfer, and their spread over seeds."""
    rows = newest(all_rows("sparse_transfer", folder), ("task", "epochs", "model", "seed"))
    if not rows:
        return ""
    lines = []
    for (task, epochs, model), some in grouped(rows, "task", "epochs", "model").items():
        scores = [row["score"] for row in some]
        spread = f"{stdev(scores):.4f}" if len(scores) > 1 else ""
        lines.append((f"{task}, {epochs} epochs", model, f"{mean(scores):.4f}", spread, str(len(scores))))
    what = f"Sparse transfer of {rows[0]['parent']} (accuracy of SST-2, F1 of BC5CDR's entities)"
    return titled(what, rows, Table("", ("task", "model", "score", "spread", "seeds"), lines))


SECTIONS = (patterns, skipping, encoders, embed_server, sparse_transfer)
