"""What sentence-transformers' files say of pooling, and files that say something else."""

import json
from pathlib import Path
from typing import Any

import pytest

from encoders import save_encoder
from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import CheckpointError, GossamerError, UnsupportedError
from gossamer.tokens.pooling import Pooling

OLD = {f"pooling_mode_{it}": it == "cls_token" for it in ("mean_tokens", "cls_token", "max_tokens")}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_encoder(tmp_path)
    write(tmp_path, pooling=OLD)
    return tmp_path


def write(
    directory: Path,
    pooling: Any = None,
    modules: Any = ("Transformer", "Pooling", "Normalize"),
    length: Any = None,
    prompts: Any = None,
) -> None:
    (directory / "1_Pooling").mkdir(exist_ok=True)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    if isinstance(modules, tuple):
        modules = [{"type": f"sentence_transformers.models.{it}", "path": paths[it]} for it in modules]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": length,
        "config_sentence_transformers.json": prompts,
    }
    for name, content in files.items():
        if content is not None:
            (directory / name).write_text(json.dumps(content), encoding="utf-8")


def read(directory: Path) -> Pooling:
    return Pooling.open(directory, Checkpoint.open(directory).architecture)


def test_without_files_it_is_the_mean_as_sentence_transformers_has_it(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    assert read(tmp_path) == Pooling("mean", False, 66)


def test_files_are_read_and_lengths_capped(directory: Path) -> None:
    assert read(directory) == Pooling("cls", True, 66)
    prompts = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    write(directory, {"pooling_mode": "max"}, ("Transformer", "Pooling"), {"max_seq_length": 32}, prompts)
    found = read(directory)
    assert found == Pooling("max", False, 32, {"query": "query: ", "document": ""}, "query")
    anatomy = Checkpoint.open(directory).architecture
    assert Pooling.from_json(json.loads(json.dumps(found.to_json())), anatomy, "it") == found
    write(directory, length={"max_seq_length": 8192})
    assert read(directory).max_length == 66


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, UnsupportedError, "found a module Dense"),
        ({"modules": {"type": 1}}, CheckpointError, "not a list of modules"),
        ({"modules": [3]}, CheckpointError, "not a list of modules"),
        (
            {"pooling": OLD | {"pooling_mode_mean_tokens": True}},
            UnsupportedError,
            "by mean, cls; expected one of mean, cls, max",
        ),
        ({"pooling": {"pooling_mode_lasttoken": True}}, UnsupportedError, "pooling_mode_lasttoken"),
        ({"length": {"max_seq_length": "long"}}, CheckpointError, "maximum length 'long'"),
        ({"length": {"max_seq_length": 0}}, CheckpointError, "maximum length 0"),
        ({"length": [1]}, CheckpointError, "expected an object"),
        ({"prompts": {"prompts": {"query": 3}}}, CheckpointError, "the prompts"),
        ({"prompts": {"prompts": {"a": "b"}, "default_prompt_name": "c"}}, CheckpointError, "prompt 'c'"),
    ],
)
def test_other_files_are_refused(
    directory: Path, change: dict[str, Any], error: type[GossamerError], words: str
) -> None:
    write(directory, **change)
    with pytest.raises(error, match=words):
        read(directory)


def test_what_is_missing_or_damaged_is_named(directory: Path) -> None:
    (directory / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: found nothing"):
        read(directory)
    (directory / "modules.json").write_bytes(b"[{]")
    with pytest.raises(CheckpointError, match="the file is damaged"):
        read(directory)


@pytest.mark.parametrize(
    "change",
    [{"mode": ["cls"]}, {"normalize": 1}, {"other": 1}, {"max_length": True}, {"default_prompt": ["a"]}],
)
def test_a_packed_file_may_hold_anything(directory: Path, change: dict[str, Any]) -> None:
    anatomy = Checkpoint.open(directory).architecture
    with pytest.raises(CheckpointError, match="says of pooling"):
        Pooling.from_json(Pooling().to_json() | change, anatomy, "model.goss")
