"""Files of data as they come: marks, encodings, half files, pointers. There is one reader for rows."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gossamer.data.sources import documents
from gossamer.data.supervised import supervised_examples
from gossamer.errors import ConfigError
from gossamer.evaluation.tasks import task_examples
from gossamer.tokens.tokenizer import Tokenizer

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0\nsize 99\n"
)
ROWS = [
    {"text": "one\u2028line", "prompt": "a\u2028b ", "answer": "c\x85d", "completion": "\u2029e"},
    {"text": "two\u0085", "prompt": "naïve ", "answer": "🦙", "completion": "x"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def noise(num: int) -> bytes:
    return random.Random(0).randbytes(num).hex().encode()


def long_window(content: bytes) -> bytes:
    """What `zstd --long=31` writes."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(
        buffer, closefd=False
    ) as writer:
        writer.write(content)
    return buffer.getvalue()


def tar_gz(num_files: int, characters: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for number in range(num_files):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = characters
            archive.addfile(member, io.BytesIO(noise(characters)[:characters]))
    return buffer.getvalue()


def parquet(text: str, num: int, damage: bool = False) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.table({"text": [f"{text} {number}" for number in range(num)]})
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    content = bytearray(buffer.getvalue())
    if damage:
        content[30:200] = b"\xff" * 170
    return bytes(content)


WHOLE: dict[str, tuple[str, bytes]] = {
    "separators within lines": (".jsonl", JSONL),
    "a byte order mark": (".jsonl", b"\xef\xbb\xbf" + JSONL),
    "lines that end as Windows ends them": (".jsonl", JSONL.replace(b"\n", b"\r\n")),
    "no line feed at the end": (".jsonl", JSONL.removesuffix(b"\n")),
    "compressed": (".jsonl.zst", zstandard.compress(JSONL)),
    "a long window": (".jsonl.zst", long_window(JSONL)),
    "two frames": (".jsonl.zst", zstandard.compress(JSONL[:40]) + zstandard.compress(JSONL[40:])),
}


@pytest.mark.parametrize(("suffix", "content"), WHOLE.values(), ids=WHOLE.keys())
def test_every_use_of_rows_reads_them_alike(
    suffix: str, content: bytes, tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    assert list(documents(str(file))) == [row["text"] for row in ROWS]
    examples = task_examples(str(file), 0, 0)
    assert [(e.prompt, e.answer) for e in examples] == [(row["prompt"], row["answer"]) for row in ROWS]
    tokenizer = Tokenizer.open(tiny_llama("llama2"))
    rows = list(supervised_examples(str(file), "prompt-completion", tokenizer, 512))
    assert [tokenizer.decode(ids) for ids, _ in rows] == [row["prompt"] + row["completion"] for row in ROWS]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfonce")
    assert list(documents(str(tmp_path / "a.txt"))) == ["once"]


def test_half_a_surrogate_pair_in_a_row_is_trained_on_as_a_replacement(
    tiny_llama: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\\ud83e", "completion": "b\\udd99 \\ud83e\\udd99"}\n')
    tokenizer = Tokenizer.open(tiny_llama("llama2"))
    ((ids, _),) = supervised_examples(f"{tmp_path}/a.jsonl", "prompt-completion", tokenizer, 512)
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd \N{LLAMA}"


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "a parquet pointer": (".parquet", POINTER, "git lfs pull"),
    "a zstd pointer": (".jsonl.zst", POINTER, "git lfs pull"),
    "a jsonl pointer": (".jsonl", POINTER, "git lfs pull"),
    "an archive's pointer": (".tar.gz", POINTER, "git lfs pull"),
    "a text's pointer": (".txt", POINTER, "git lfs pull"),
    "half a parquet file": (".parquet", parquet("a", 5000)[:5000], "cut short"),
    "a parquet file with a bad page": (".parquet", parquet("a", 5000, damage=True), "damaged"),
    "an empty parquet file": (".parquet", b"", "cut short"),
    "half a zstd file": (".jsonl.zst", zstandard.compress(JSONL * 9999)[:-9], "cut short.*ends too early"),
    "a zstd file with a bad end": (".jsonl.zst", zstandard.compress(JSONL) + b"junk", "damaged"),
    "no zstd file": (".jsonl.zst", JSONL, "of another kind"),
    "half an archive": (".tar.gz", tar_gz(3, 50_000)[:40_000], "cut short"),
    "an archive with a bad middle": (
        ".tar.gz",
        tar_gz(3, 50_000)[:30_000] + bytes(9) + tar_gz(3, 50_000)[30_009:],
        "damaged",
    ),
    "gzip without an archive": (".tar.gz", gzip.compress(b"no tar" * 200), "of another kind"),
    "no archive": (".tgz", b"PK\3\4", "of another kind"),
    "an empty archive": (".tgz", b"", "cut short"),
    "Latin-1 rows": (".jsonl", JSONL.splitlines()[0] + b'\n{"text": "na\xefve"}\n', r"a\.jsonl:2: not UTF-8"),
    "UTF-16 rows": (".jsonl", JSONL.decode().encode("utf-16"), r"a\.jsonl:1: not UTF-8"),
    "brackets without end": (".jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: not a line of JSON"),
    "one list of all rows": (".jsonl", json.dumps(ROWS).encode(), r"a\.jsonl:1: found list"),
}


@pytest.mark.parametrize(("suffix", "content", "says"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_named_with_what_to_do(
    suffix: str, content: bytes, says: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        list(documents(str(file)))
    assert str(file) in str(caught.value)
    if suffix.endswith((".jsonl", ".zst", ".parquet")):
        with pytest.raises(ConfigError, match=says):
            task_examples(str(file), 0, 0)


def test_tasks_need_their_fields(tmp_path: Path) -> None:
    for row, says in (
        ({"prompt": "a"}, r"text in the field answer; found fields \['prompt'\]"),
        ({"prompt": "", "answer": "b"}, "text in the field prompt; found \"\" in 'prompt'"),
    ):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + json.dumps(row))
        with pytest.raises(ConfigError, match=rf"a\.jsonl:2: .*{says}"):
            task_examples(f"{tmp_path}/a.jsonl", 0, 0)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="has no examples"):
        task_examples(f"{tmp_path}/a.jsonl", 0, 0)
    with pytest.raises(ConfigError, match=r"unknown task 'a\.json'; expected doctest"):
        task_examples("a.json", 0, 0)
