"""Markdown of a comparison: medians over rounds, and our speed against each peer's beside the bytes read.

python benchmarks/compare/report.py [RUN]     the last run in docs/results/compare.jsonl, or the one named
"""

import json
import sys
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

Rows = list[dict[str, Any]]
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "compare.jsonl"
OURS = "gossamer"


def grouped(rows: Rows) -> dict[tuple[str, str, str, int], Rows]:
    """Rows of the same measurement, round after round."""
    found: dict[tuple[str, str, str, int], Rows] = {}
    for row in rows:
        if row["peer"] != "memory":
            found.setdefault((row["shape"], row["peer"], row["what"], row["tokens"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][3], item[0][1] != OURS, item[0])))


def speeds(rows: Rows) -> tuple[list[float], str]:
    """Each round's speed: a model's in tokens/s, a stack's in TOPS."""
    unit = "tokens_per_s" if "tokens_per_s" in rows[0] else "tops"
    return [row[unit] for row in rows], "tokens/s" if unit == "tokens_per_s" else "TOPS"


def markdown(columns: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_bytes(row: dict[str, Any]) -> float:
    """Bytes read for a token: a model's; for a stack, whose depth differs between engines, a weight's."""
    return row["weight_bytes"] / row.get("num_weights", 1)


def speed_table(rows: Rows) -> str:
    """One line for each measurement; GB/s beside the best reading of memory in the whole run."""
    read = max(row["read_gb_per_s"] for row in rows if row["peer"] == "memory")
    cells = []
    for (shape, peer, what, tokens), group in grouped(rows).items():
        found, unit = speeds(group)
        speed, spread = f"{median(found):.3g} {unit}", f"{pstdev(found) / mean(found):.0%}"
        rates = [one["gb_per_s"] for one in group if one.get("gb_per_s")]
        rate = (f"{median(rates):.1f}", f"{median(rates) / read:.0%}") if rates else ("", "")
        cells.append((shape, str(tokens), peer, what, speed, spread, *rate))
    columns = ("shape", "tokens", "engine", "weights", "speed", "deviation", "GB/s", f"of {read:.1f} GB/s")
    return markdown(columns, cells)


def ratio_table(rows: Rows) -> str:
    """Ours over each peer's of the same shape and tokens; last, the share of what the bytes allow."""
    groups, cells = grouped(rows), []
    for (shape, peer, what, tokens), ours in groups.items():
        for (its_shape, other, its_what, its_tokens), theirs in groups.items():
            if peer != OURS or other == OURS or (its_shape, its_tokens) != (shape, tokens):
                continue
            speed = median(speeds(ours)[0]) / median(speeds(theirs)[0])
            bound = step_bytes(theirs[0]) / step_bytes(ours[0])
            share = (f"{bound:.2f}x", f"{speed / bound:.0%}") if tokens == 1 else ("", "")
            cells.append((shape, str(tokens), what, f"{other} {its_what}", f"{speed:.2f}x", *share))
    columns = ("shape", "tokens", "ours", "against", "speed", "fewer bytes", "of that")
    return markdown(columns, cells) if cells else ""


def tables(rows: Rows) -> str:
    return f"\n{speed_table(rows)}\n\n{ratio_table(rows)}"


def main() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    run = sys.argv[1] if len(sys.argv) > 1 else rows[-1]["run"]
    print(tables([row for row in rows if row["run"] == run]))


if __name__ == "__main__":
    main()
