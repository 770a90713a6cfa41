"""Several sources as one stream: shares, order, ends."""

from pathlib import Path

import pytest

from gossamer.data.mixture import Mixture
from gossamer.data.tables import BadRows
from gossamer.errors import ConfigError


def texts(*sources: str, seed: int = 0, num: int | None = None, **options: object) -> list[str]:
    """The first pieces of a mixture, all of them without `num`."""
    pieces = iter(Mixture(sources, seed, **options))  # type: ignore[arg-type]
    return [piece.text for _, piece in zip(range(num or 10**9), pieces, strict=False)]


def test_weights_are_shares_of_the_characters(tmp_path: Path) -> None:
    for name, length in (("a", 50), ("b", 900)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join([name * length] * 40))
    found = texts(f"{tmp_path}/a.txt@3", f"{tmp_path}/b.txt", seed=1, num=4000, repeat=True)
    assert len(found) == 4000
    assert sum(text.count("a") for text in found) / sum(map(len, found)) == pytest.approx(0.75, abs=0.01)


def test_a_mixture_is_seeded_shuffled_and_loses_nothing(tmp_path: Path) -> None:
    lines = [f"line {number}\n" * 40 for number in range(2000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    first, again, other = (texts(f"{tmp_path}/a.txt", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert max(map(len, first)) <= 4096 and sum(map(len, first)) == len("".join(lines))
    assert sorted("".join(first).splitlines()) == sorted("".join(lines).splitlines())
    shorter = texts(f"{tmp_path}/a.txt", piece_characters=500)
    assert max(map(len, shorter)) <= 500 and sum(map(len, shorter)) == len("".join(lines))


def test_it_ends_where_a_source_is_used_up_and_names_it(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 40)):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(f"{name}{i}" * 25 for i in range(count)))
    sources = (f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
    mixture = Mixture(sources, 0)
    found = [(piece.source, piece.text) for piece in mixture]
    assert mixture.used_up == sources[0] and mixture.num_documents == [10, 40]
    assert sorted(text for source, text in found if source == 0) == sorted(f"a{i}" * 25 for i in range(10))
    assert 8 <= sum(source == 1 for source, _ in found) <= 11
    assert len(texts(*sources, num=500, repeat=True)) == 500


def test_truncated_documents_begin_as_they_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"{i}\n" * 300 for i in range(9)))
    found = texts(f"{tmp_path}/a.txt", piece_characters=50, truncate=True)
    assert sorted(found) == [(f"{i}\n" * 300)[:200] for i in range(9)]


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n{\n{"text": "two"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: expected text in the field text or content"):
        texts(f"{tmp_path}/a.jsonl")
    bad = BadRows(2)
    assert sorted(texts(f"{tmp_path}/a.jsonl", bad=bad)) == ["one", "two"]
    assert [error.split(": ")[0].rpartition(":")[2] for error in bad.found] == ["2", "3"]
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: .*after 1 left out, the first: .*--skip-bad-rows N"):
        texts(f"{tmp_path}/a.jsonl", bad=BadRows(1))


def test_a_weight_of_zero_and_an_empty_source_are_refused(tmp_path: Path) -> None:
    for weight in ("0", "-1", "inf"):
        with pytest.raises(ConfigError, match=f"the weight is {weight}, expected a number above 0"):
            Mixture([f"a.txt@{weight}"], 0)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no text"):
        texts(f"{tmp_path}/a.txt")
    with pytest.raises(ConfigError, match="no dataset given"):
        Mixture([], 0)
