"""`embed`: a vector for every line or row, in their order, in a file that is whole or not there."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from encoders import save_encoder
from gossamer import cli
from gossamer.engine import Encoder
from gossamer.errors import ConfigError
from gossamer.job.report import Event
from gossamer.tools.embed import Embed, embed

TEXTS = ["a b c", "", "z", "é", "x y " * 50]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("encoder") / "model"
    save_encoder(path)
    (path / "modules.json").write_text('[{"type": "models.Transformer", "path": ""}]', encoding="utf-8")
    prompts = '{"prompts": {"query": "q "}}'
    (path / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    return str(path)


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    else:
        path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", "-"])
def test_every_text_gets_its_vector(
    suffix: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = write(tmp_path / f"texts{suffix}", TEXTS * 60), tmp_path / "x.npy"
    if suffix == "-":
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(file.read_bytes())))
        file = Path("-")
    events: list[Event] = []
    result = embed(Embed(model, str(file), str(output), truncate=True, threads=1), events.append)
    encoder = Encoder(model, 1)
    np.testing.assert_array_equal(np.load(output), encoder.encode(TEXTS * 60))
    num_tokens = 60 * sum(len(row.ids) for row in encoder.token_ids(TEXTS))
    assert (result.texts, result.cut, result.dimension, result.tokens) == (300, 60, 24, num_tokens)
    assert [(it.done, it.total) for it in events if it.stage == "embed"] == [(256, 300), (300, 300)]
    assert not list(tmp_path.glob("*.partial"))


def test_prompts_lengths_and_what_is_there_already(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write(tmp_path / "texts.txt", TEXTS), tmp_path / "x.npy"
    words = [
        "embed",
        model,
        str(file),
        "-o",
        str(output),
        "--prompt-name",
        "query",
        "--normalize",
        "--truncate",
    ]
    assert cli.call([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["result"]["texts"] == len(TEXTS)
    expected_ND = Encoder(model).encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    np.testing.assert_array_equal(np.load(output), expected_ND)
    assert cli.call(words) == 2
    assert f"{output} exists" in capsys.readouterr().err
    assert cli.call([*words, "--overwrite"]) == 0
    assert "tokens per s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", "", "found no texts"),
        ("texts.csv", "a", "expected texts as .txt"),
        ("rows.jsonl", '{"word": "a"}\n', "rows.jsonl:1"),
    ],
)
def test_files_without_texts_are_refused(
    name: str, content: str | None, message: str, model: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        embed(Embed(model, str(tmp_path / name), str(tmp_path / "x.npy")))
    assert not (tmp_path / "x.npy").exists()


def test_a_folder_is_no_file_of_texts_and_is_made_for_the_output(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r": a folder; expected texts as \.txt"):
        embed(Embed(model, str(tmp_path), str(tmp_path / "x.npy")))
    file, output = write(tmp_path / "texts.txt", TEXTS[:2]), tmp_path / "new" / "x.npy"
    embed(Embed(model, str(file), str(output), threads=1))
    assert np.load(output).shape == (2, 24)


def test_texts_that_are_too_long_are_refused_before_any_is_computed(model: str, tmp_path: Path) -> None:
    file, events = write(tmp_path / "texts.txt", TEXTS * 60), list[Event]()
    with pytest.raises(
        ConfigError, match=r"60 of 300 texts, the first of them number 5, of more.*--truncate"
    ):
        embed(Embed(model, str(file), str(tmp_path / "x.npy"), threads=1), events.append)
    assert not [it for it in events if it.stage == "embed"]
    assert [*tmp_path.iterdir()] == [file]


def test_an_interrupted_run_leaves_nothing(model: str, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.stage == "embed":
            raise KeyboardInterrupt

    file = write(tmp_path / "texts.txt", TEXTS)
    with pytest.raises(KeyboardInterrupt):
        embed(Embed(model, str(file), str(tmp_path / "x.npy"), truncate=True, threads=1), interrupt)
    assert [*tmp_path.iterdir()] == [file]
