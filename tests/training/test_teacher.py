"""A teacher reads the ids of the student's tokenizer: which directories go together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.checkpoint.directory import Checkpoint
from gossamer.errors import ConfigError
from gossamer.training.teacher import open_teacher

Files = dict[str, str]
MODEL, OLD = {"tokenizer.model": "a"}, {"vocab.json": "a", "merges.txt": "b"}
TOGETHER: list[tuple[Files, Files]] = [
    ({"tokenizer.json": "a"}, {"tokenizer.json": "a", "tokenizer.model": "b"}),
    ({"tokenizer.model": "a"}, {"tokenizer.json": "b", "tokenizer.model": "a"}),
    (OLD, {**OLD, "tokenizer.json": "c"}),
    ({}, {}),
]
APART: list[tuple[Files, Files, str]] = [
    ({"tokenizer.json": "b", **MODEL}, {"tokenizer.json": "a", **MODEL}, "another tokenizer .tokenizer.json"),
    ({"tokenizer.model": "b"}, MODEL, "another tokenizer .tokenizer.model sha256 [0-9a-f]{12}. than"),
    ({**MODEL, "added_tokens.json": "c"}, MODEL, "another tokenizer .tokenizer.model sha256"),
    ({**OLD, "merges.txt": "c"}, OLD, "another tokenizer .vocab.json sha256"),
    (MODEL, {**OLD, "tokenizer.json": "a"}, "found tokenizer.model there, tokenizer.json and vocab"),
    ({}, {"tokenizer.json": "a"}, "found none there, tokenizer.json here; expected tokenizer.json in both"),
]


@pytest.fixture
def pair(tiny_llama: Callable[[str], Path], tmp_path: Path) -> Callable[[Files, Files], tuple[Path, Path]]:
    """Two copies of a model, a teacher and a student, with other files of a tokenizer."""

    def make(*of_each: Files) -> tuple[Path, Path]:
        paths = tmp_path / "teacher", tmp_path / "student"
        for path, files in zip(paths, of_each, strict=True):
            shutil.copytree(tiny_llama("llama2"), path, ignore=shutil.ignore_patterns("tokenizer.*"))
            for name, content in files.items():
                (path / name).write_text(content)
        return paths

    return make


@pytest.mark.parametrize(("theirs", "ours"), TOGETHER)
def test_the_same_tokenizer_is_told_by_a_file_that_both_have(
    theirs: Files, ours: Files, pair: Callable[..., tuple[Path, Path]]
) -> None:
    teacher, student = pair(theirs, ours)
    assert open_teacher(teacher, Checkpoint.open(student)).path == teacher


@pytest.mark.parametrize(("theirs", "ours", "message"), APART)
def test_another_tokenizer_is_refused(
    theirs: Files, ours: Files, message: str, pair: Callable[..., tuple[Path, Path]]
) -> None:
    teacher, student = pair(theirs, ours)
    with pytest.raises(ConfigError, match=message):
        open_teacher(teacher, Checkpoint.open(student))


def test_without_any_only_the_model_itself_is_a_teacher(pair: Callable[..., tuple[Path, Path]]) -> None:
    """Another one of the same shape may have had any vocabulary of that size."""
    teacher, student = pair({}, {})
    file = teacher / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"may have another tokenizer .* none there, none here; expected"):
        open_teacher(teacher, Checkpoint.open(student))
