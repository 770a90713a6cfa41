"""Sources of text: every kind, their order, what is held out, and what bad rows say."""

import io
import json
import sysconfig
import tarfile
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gossamer.data.sources import documents, manifest, parse_weight
from gossamer.data.tables import text_of
from gossamer.errors import ConfigError

TEXTS = ["first\ntext", "second: naïve café", "third"]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts).encode()


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_files_of_every_kind_hold_the_same_documents(tmp_path: Path) -> None:
    files = {f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)}
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"\n{text}\n" for text in TEXTS), encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)))
    (tmp_path / "a.tar.gz").write_bytes(tar_gz({**files, "x.png": b"\x89PNG"}))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for name, content in {**files, "notes.md": b"left out"}.items():
        (folder / name).write_bytes(content)
    for name in ("a.txt", "a.jsonl", "a.jsonl.zst", "a.tar.gz", "a.parquet", "folder"):
        assert list(documents(str(tmp_path / name))) == TEXTS, name


def test_a_text_without_markers_is_one_untouched_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n  all of it\n\n")
    assert list(documents(str(tmp_path / "a.txt"))) == ["\n  all of it\n\n"]


def test_python_files_are_read_in_the_encoding_they_declare(tmp_path: Path) -> None:
    text = "# -*- coding: latin-1 -*-\nname = 'Größe'\n"
    (tmp_path / "a.py").write_bytes(text.encode("latin-1"))
    assert list(documents(str(tmp_path))) == [text]


def test_the_library_leaves_out_tests_and_the_held_out_files() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    read = set(documents("python:stdlib"))
    held_out = list(documents("python:stdlib:held-out"))
    assert (library / "textwrap.py").read_text() in held_out and len(held_out) == 10
    assert not read & set(held_out)
    assert (library / "argparse.py").read_text() in read
    assert (library / "unittest" / "test" / "test_case.py").exists() is False or not any(
        text == (library / "unittest" / "test" / "test_case.py").read_text() for text in read
    )


def test_doctests_with_a_number_end_and_differ_by_seed() -> None:
    assert len(list(documents("python:doctests:5"))) == 5
    assert list(documents("python:doctests:5:1")) != list(documents("python:doctests:5:2"))
    assert len(list(islice(documents("python:doctests"), 7))) == 7


def test_text_is_that_of_the_first_field_that_holds_any() -> None:
    row = {"prompt": None, "query": " \n", "question": "a", "context": "b"}
    assert text_of(row, "here", "prompt", "query", "question", "context") == "a"
    assert text_of(row, "here", "prompt", "query", "question", blank=True) == " \n"
    with pytest.raises(ConfigError, match=r"^here: .* text in the field prompt; found null in 'prompt'$"):
        text_of(row, "here", "prompt", blank=True)
    said = r'^here: expected text in the field text, query or prompt; found " \\n" in \'query\'$'
    with pytest.raises(ConfigError, match=said):
        text_of(row, "here", "text", "query", "prompt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', r"a\.jsonl:3: .* in the field text or content; found fields \['body'\]"),
        (b'{"text": 7}', r"a\.jsonl:3: expected text in the field text or content; found 7 in 'text'"),
        (b"{oops", r"a\.jsonl:3: not a line of JSON"),
        (b"[1]", r"a\.jsonl:3: found list, expected an object"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:1]) + b"\n" + line + b"\n")
    with pytest.raises(ConfigError, match=message):
        list(documents(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "no such file or folder"),
        ("python:doctests:many", r"expected python:doctests\[:NUM\[:SEED\]\]"),
        ("python:sdtlib", "no such file or folder; a source is .*python:stdlib"),
        ("hf:a:b:c:d", r"expected hf:repo\[@revision\]\[:config\[:split\]\]"),
        ("hf:a@:b", r"expected hf:repo\[@revision\]\[:config\[:split\]\]"),
    ],
)
def test_bad_sources_say_what_a_source_is(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(documents(source))


def test_offline_refuses_to_stream() -> None:
    with pytest.raises(ConfigError, match="drop --offline"):
        list(documents("hf:some/dataset", offline=True))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigError, match=r"a\.txt: not text in its encoding"):
        list(documents(str(tmp_path / "a.txt")))
    (tmp_path / "b.csv").write_text("a,b")
    with pytest.raises(ConfigError, match=r"b\.csv': unknown kind of file"):
        list(documents(str(tmp_path / "b.csv")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.py or \.txt file"):
        list(documents(str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.txt", ("a.txt", 1.0)),
        ("a.txt@0.25", ("a.txt", 0.25)),
        ("hf:me/data@2", ("hf:me/data", 2.0)),
        ("hf:me/data@main", ("hf:me/data@main", 1.0)),
        ("hf:me/data@2@1", ("hf:me/data@2", 1.0)),
        ("hf:me/data@refs/pr/1:en@0.5", ("hf:me/data@refs/pr/1:en", 0.5)),
        ("/home/me@work/a.txt", ("/home/me@work/a.txt", 1.0)),
    ],
)
def test_weights_are_parsed(given: str, expected: tuple[str, float]) -> None:
    assert parse_weight(given) == expected


def test_the_manifest_changes_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = manifest(f"{tmp_path}/a.txt@0.5")
    assert before["kind"] == "file" and before["bytes"] == 3 and before["weight"] == 0.5
    (tmp_path / "a.txt").write_text("two")
    assert manifest(f"{tmp_path}/a.txt")["sha256"] != before["sha256"]
    assert manifest("python:stdlib:held-out")["num_files"] == 10
