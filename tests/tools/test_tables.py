"""README's tables are what the generator makes of docs/results."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest

from gossamer.runs.recovery import SHIPPED
from gossamer.tools.bench import Bench, bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tables.py, a script beside its siblings."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    return tables


@pytest.mark.parametrize("name", ["README.md", "docs/results/README.md"])
def test_pages_have_the_tables_of_docs_results(tables: ModuleType, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    sections = tables.BRIEF if name == "README.md" else tables.COMPLETE
    assert page == tables.replaced(page, tables.render(sections)), "run python benchmarks/tables.py"


def kernel(storage: str, isa: str, tokens: int, rate: float, impossible: tuple[str, ...] = ()) -> dict:
    where = {"date": "2026-01-02 03:04:05", "cpu": "a CPU", "isa": "avx2", "impossible": impossible}
    what = {"values": "i8", "storage": storage, "kernel_isa": isa, "tokens": tokens}
    return where | what | {"giga_multiply_adds_per_s": rate}


def write(folder: Path, *rows: dict) -> None:
    (folder / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_newest_row_of_a_measurement_counts(tables: ModuleType, tmp_path: Path) -> None:
    write(
        tmp_path,
        kernel("dense", "avx2", 1, 5.0),
        kernel("dense", "avx2", 256, 70.0),
        kernel("sparse", "avx2", 1, 9.0),
        kernel("dense", "avx2", 1, 6.0),
    )
    lines = [
        [word.strip() for word in line.split("|")]
        for line in tables.render(tables.COMPLETE, tmp_path).splitlines()
    ]
    assert ["", "i8 dense", "", "6 / 70", "", "", ""] in lines
    assert ["", "i8 70%", "", "9 / -", "", "", ""] in lines
    assert not any("5 / 70" in line for line in lines)


def test_a_setting_that_two_jobs_measure_is_shown_once(tables: ModuleType, tmp_path: Path) -> None:
    """By its newest row, on README's page of a few jobs as well as on the page of all."""
    where = {"date": "2026-01-02 03:04:05", "cpu": "a CPU", "isa": "avx2", "impossible": ()}
    what = {"shape": "s", "layers": None, "values": "i8", "sparsity": 0.7, "prompt": 64, "gb_per_s": 9.0}
    shares = {"bandwidth_share": 0.5, "round_share": 0.5, "linears_speedup": None, "prompt_tokens_per_s": 7.0}
    measured = [("step-1b", 1, 48.4), ("batch-1b", 1, 43.2), ("batch-1b", 4, 141.9), ("context-1b", 1, 45.5)]
    rows = [
        where | what | shares | {"job": job, "batch": batch, "decode_tokens_per_s": rate}
        for job, batch, rate in measured
    ]
    (tmp_path / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for page in (tables.main_jobs(tmp_path), tables.decode(tmp_path)):
        lines = [line for line in page.splitlines() if line.startswith("| s ")]
        assert len(lines) == 2 and " 45.5 " in lines[0] and " 141.9 " in lines[1]


def test_rows_of_the_benchmarks_are_understood(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real row of `bench`, and a comparison of two engines of which ours is twice as fast."""
    import results

    monkeypatch.setattr(results, "RESULTS", tmp_path)
    row = bench(Bench(model=str(SHIPPED), new=2, repeats=1)).row
    results.write_row("decode", {"job": "j", "shape": "a shape", "layers": 3} | dataclasses.asdict(row))
    for peer, rate in (("gossamer", 30.0), ("other", 15.0)):
        what = {"peer": peer, "what": "w", "shape": "s", "tokens": 1, "tokens_per_s": rate}
        results.write_row("compare", {"run": "r", "round": 1, "weight_bytes": 4e9 / rate} | what)
    results.write_row("compare", {"run": "r", "round": 1, "peer": "memory", "read_gb_per_s": 9.0})
    text = tables.render(tables.COMPLETE, tmp_path)
    assert "| a shape, 3 layers |" in text and f" {row.decode_tokens_per_s:.1f} " in text
    assert "| 2.00x |" in text
    assert "15 tokens/s" in text


def test_shares_above_all_are_said_in_the_readme(tables: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, kernel("dense", "avx2", 1, 5.0))
    assert "yardstick" not in tables.render(tables.COMPLETE, tmp_path)
    write(tmp_path, kernel("dense", "avx2", 1, 5.0, ("peak_share: 104%",)))
    assert "Shares of 1 of 1 rows are above 100%" in tables.render(tables.COMPLETE, tmp_path)


def test_without_results_that_is_said(tables: ModuleType, tmp_path: Path) -> None:
    assert tables.render(tables.COMPLETE, tmp_path).startswith("No results yet")


def test_a_readme_without_markers_is_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="lacks"):
        tables.replaced("# Title", "tables")
